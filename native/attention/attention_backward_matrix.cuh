// attention_backward() for bf16 and fp16 on the matrix cores; see attention_backward.cu.
//
// One kernel in two roles. A block owns 64 or 128 lines, 16 or 32 of each warp, and streams the other side in tiles of
// 32 lines through two stages of shared memory:
//   kQuery            owns queries (x = q, y = upstream), streams keys (x = k, y = v):  dx = dq = sum ds x'
//   kKey, kValue ...  owns keys (x = k, y = v), streams queries (x = q, y = upstream):  dx = dk, dy = dv = sum p y'
// With owned lines as rows of the matrix product, its result has the layout of the next product's left operand: p and ds
// never leave the registers. Sums take 4 bytes x lines x head size over the block's threads, at most 128 registers; head
// sizes above 128 therefore compute dk and dv in two launches.
#pragma once
#include "attention/attention_backward_launch.h"
#include "attention/attention_backward_tiles.cuh"
#include "attention/attention_launch.h"

namespace heddle {

constexpr int kWorkBytes = 128;
__host__ __device__ constexpr int line_tiles(int width) { return width <= 64 ? 2 : 1; }  // of 16 lines, per warp
__host__ __device__ constexpr int owned_lines(int width, int warps) { return 16 * warps * line_tiles(width); }
__host__ __device__ constexpr int64_t backward_matrix_shared(int width, int warps, bool formed) {
  const int64_t lines = owned_lines(width, warps), slots = (formed ? 32 : 8) * line_tiles(width);
  return kWorkBytes + (4 * (width + 8) + int64_t{sizeof(GradRow)}) * (lines + 2 * kStreamed) + 4 * kWarp * warps * slots;
}

// What a block does: lines [first, end) of a sequence that it owns, and the lines that it streams.
struct OwnedWork {
  Sequence sequence;
  int64_t key_head, first, end, rows;  // rows of the sequence
  KeyRange streamed;
  KeyRange full;  // keys that every owned row sees; tiles in there need no look at single keys
};
static_assert(sizeof(OwnedWork) <= kWorkBytes);
template <bool ByRow>
__device__ inline OwnedWork find_work(const AttentionProblem& p, int lines) {
  OwnedWork w = {};
  BlockRows block;
  // The last queries first: causal ones see the most keys.
  if (!(ByRow ? find_rows(p, lines, gridDim.x - 1 - blockIdx.x, blockIdx.y, &block)
              : find_keys(p, lines, blockIdx.x, blockIdx.y, &block))) {
    return w;
  }
  const int64_t group = p.group();
  w.sequence = block.sequence;
  w.key_head = block.key_head;
  w.first = block.first;
  w.end = block.first + lines < block.count ? block.first + lines : block.count;
  w.rows = w.sequence.queries * group;
  if (ByRow) {
    w.streamed = union_range(p, w.sequence, w.first / group, (w.end - 1) / group);
    w.full = {key_range(p, w.sequence, (w.end - 1) / group).lo, key_range(p, w.sequence, w.first / group).hi};
  } else {
    const KeyRange positions = seeing_positions(p, w.sequence, w.first, w.end);
    w.streamed = {positions.lo * group, positions.hi * group};
  }
  return w;
}

// Warps: 4, or 2 for short sequences of small heads, of which more blocks then fit.
template <DType T, int Width, int Warps, BackwardPart Part>
__global__ void __launch_bounds__(Warps* kWarp, Width > 128 ? 1 : 8 / Warps)
    attention_backward_matrix_kernel(AttentionBackwardArgs a, const RowTerms* terms, bool aligned) {
  constexpr bool kByRow = Part == BackwardPart::kQuery;
  constexpr bool kSumX = Part != BackwardPart::kValue, kSumY = Part == BackwardPart::kValue || Part == BackwardPart::kKeyValue;
  constexpr int M = line_tiles(Width), kThreads = Warps * kWarp, kLines = owned_lines(Width, Warps), kPitch = Width + 8;
  HEDDLE_DYNAMIC_SHARED(uint16_t, shared);
  auto& work = *reinterpret_cast<OwnedWork*>(shared);  // here, because the sums want the registers
  uint16_t* own_x = shared + kWorkBytes / 2;       // [kLines][kPitch]
  uint16_t* own_y = own_x + kLines * kPitch;
  uint16_t* tile_x = own_y + kLines * kPitch;      // [2][kStreamed][kPitch]
  uint16_t* tile_y = tile_x + 2 * kStreamed * kPitch;
  auto* infos = reinterpret_cast<GradRow*>(tile_y + 2 * kStreamed * kPitch);  // owned rows, or [2][kStreamed]
  auto* slots = reinterpret_cast<float*>(infos + kLines + 2 * kStreamed);     // [8 M or 32 M][threads]

  const AttentionProblem& p = a.problem;
  if (threadIdx.x == 0) work = find_work<kByRow>(p, kLines);
  __syncthreads();
  if (work.first >= work.end) return;
  const Sequence& s = work.sequence;
  const int warp = static_cast<int>(threadIdx.x) / kWarp, lane = static_cast<int>(threadIdx.x) % kWarp;
  const int g = lane / 4, t = lane % 4;
  const int64_t &key_head = work.key_head, &rows = work.rows;
  const int32_t group = p.group();
  const bool formed = has_transform(p) || p.uniform_empty;

  // Element offsets of both vectors of a line, the query's or the key's.
  struct Place {
    int64_t x, y;
  };
  const auto row_place = [&](int64_t row) -> Place {
    if (row >= rows) return {kNoLine, kNoLine};
    const int64_t position = position_of(row, group), head = key_head * group + (row - position * group);
    return {p.query_at(s, position, head), a.upstream_at(s, position, head)};
  };
  const auto key_place = [&](int64_t key) -> Place {
    if (key >= s.keys) return {kNoLine, kNoLine};
    return {p.key_at(s, key, key_head), p.value_at(s, key, key_head)};
  };
  // Where the terms of a row are kept, and its description with them.
  const auto row_terms = [&](int64_t row) {
    const int64_t position = position_of(row, group);
    return terms[terms_at(p, s, position, key_head * group + (row - position * group))];
  };
  const auto row_info = [&](int64_t row, const RowTerms& t) {
    const int64_t position = position_of(row, group);
    return grad_row(p, t, s, position, key_head * group + (row - position * group));
  };
  // The lanes of a warp find one streamed line each: a line is found once a warp instead of once per 16 bytes.
  const auto load_streamed = [&](int stage, int64_t tile) {
    const Place at = kByRow ? key_place(tile + lane) : row_place(tile + lane);
    const void *from_x = kByRow ? p.key : p.query, *from_y = kByRow ? p.value : a.upstream;
    load_tile<kStreamed, Width, kPitch, kThreads>(tile_x + stage * kStreamed * kPitch, from_x, p.head_dim,
                                                  kByRow ? p.key_stride[3] : p.query_stride[3], aligned,
                                                  [&](int i) { return __shfl_sync(kFullMask, at.x, i); });
    load_tile<kStreamed, Width, kPitch, kThreads>(tile_y + stage * kStreamed * kPitch, from_y, p.value_dim,
                                                  kByRow ? p.value_stride[3] : int64_t{1}, aligned,
                                                  [&](int i) { return __shfl_sync(kFullMask, at.y, i); });
  };
  // The first tile from there on that the block mask does not exclude.
  const auto seen_from = [&](int64_t tile) {
    if (p.block_mask && !p.uniform_empty) {
      while (tile < work.streamed.hi) {
        const int64_t tile_end = tile + kStreamed < work.streamed.hi ? tile + kStreamed : work.streamed.hi;
        if (kByRow ? blocks_are_seen<kThreads>(p, s, key_head, work.first, work.end, tile, tile_end)
                   : blocks_are_seen<kThreads>(p, s, key_head, tile, tile_end, work.first, work.end)) {
          break;
        }
        tile += kStreamed;
      }
    }
    return tile;
  };

  load_tile<kLines, Width, kPitch, kThreads>(
      own_x, kByRow ? p.query : p.key, p.head_dim, kByRow ? p.query_stride[3] : p.key_stride[3], aligned,
      [&](int i) { return kByRow ? row_place(work.first + i).x : key_place(work.first + i).x; });
  if constexpr (Part != BackwardPart::kValue) {
    load_tile<kLines, Width, kPitch, kThreads>(
        own_y, kByRow ? a.upstream : p.value, p.value_dim, kByRow ? int64_t{1} : p.value_stride[3], aligned,
        [&](int i) { return kByRow ? row_place(work.first + i).y : key_place(work.first + i).y; });
  }
  int64_t tile = seen_from(work.streamed.lo / kStreamed * kStreamed);
  if (tile < work.streamed.hi) load_streamed(0, tile);
  if (static_cast<int>(threadIdx.x) < (kByRow ? kLines : kStreamed)) {
    const int64_t row = (kByRow ? work.first : tile) + threadIdx.x;
    infos[threadIdx.x] = row < rows ? row_info(row, row_terms(row)) : no_row();
  }

  [[maybe_unused]] float sum_x[kSumX ? M : 1][kSumX ? Width / 8 : 1][4] = {};
  [[maybe_unused]] float sum_y[kSumY ? M : 1][kSumY ? Width / 8 : 1][4] = {};
  const int own_line = warp * 16 * M;
  for (int stage = 0; tile < work.streamed.hi; stage ^= 1) {
    cp_async_wait<0>();
    __syncthreads();  // the tile is there, and nobody reads the other stage any more
    const int64_t next = seen_from(tile + kStreamed);
    if (next < work.streamed.hi) load_streamed(stage ^ 1, next);
    // The next rows' terms: asked for here, put into shared memory when the products are done.
    const int64_t next_row = next + threadIdx.x;
    const bool fetches = !kByRow && next < work.streamed.hi && threadIdx.x < kStreamed;
    RowTerms fetched = {};
    if (fetches && next_row < rows) fetched = row_terms(next_row);
    const uint16_t *x = tile_x + stage * kStreamed * kPitch, *y = tile_y + stage * kStreamed * kPitch;
    const GradRow* info = kByRow ? infos : infos + stage * kStreamed;
    bool whole = !formed;
    if (whole && kByRow) {
      whole = tile >= work.full.lo && tile + kStreamed <= work.full.hi;
    } else if (whole) {
      whole = tile + kStreamed <= rows && key_range(p, s, position_of(tile + kStreamed - 1, group)).lo <= work.first &&
              key_range(p, s, position_of(tile, group)).hi >= work.end;
    }

    int broken = 0;
    if (!whole) {
      if (kSumX) broken |= has_broken<T, Width, kThreads>(x);
      if (kSumY) broken |= has_broken<T, Width, kThreads>(y);
      broken = __syncthreads_or(broken);
    }
    const int64_t now = tile;
    tile = next;
    if (work.first + own_line >= work.end) continue;  // no line for this warp

    float w[M][4][4] = {}, ds[M][4][4] = {};
    line_products<T, Width, M>(w, own_x + own_line * kPitch, x);
    if constexpr (kSumX) line_products<T, Width, M>(ds, own_y + own_line * kPitch, y);
    if (formed) {
      // By way of shared memory, so that the code for one pair stands here once instead of once per register.
      float* mine = slots + threadIdx.x;
#pragma unroll
      for (int i = 0; i < 16 * M; ++i) {
        mine[2 * i * kThreads] = w[i / 16][i / 4 % 4][i % 4];
        mine[(2 * i + 1) * kThreads] = ds[i / 16][i / 4 % 4][i % 4];
      }
#pragma unroll 1
      for (int i = 0; i < 16 * M; ++i) {
        const int line = own_line + i / 16 * 16 + g + i % 4 / 2 * 8, column = i / 4 % 4 * 8 + 2 * t + i % 2;
        const GradRow row = info[kByRow ? line : column];
        const int64_t key = kByRow ? now + column : work.first + line;
        float* at = mine + 2 * i * kThreads;
        const PairGrad pair = pair_grad(p, s, row, key, has_transform(p), at[0], at[kThreads]);
        at[0] = pair.weight;
        at[kThreads] = pair.product;
        if (kByRow && a.bias_grad && row.head >= 0 && key < s.keys) {
          a.bias_grad[p.bias_at(s, row.position, row.head, key)] = pair.logit;
        }
      }
#pragma unroll
      for (int i = 0; i < 16 * M; ++i) {
        w[i / 16][i / 4 % 4][i % 4] = mine[2 * i * kThreads];
        ds[i / 16][i / 4 % 4][i % 4] = mine[(2 * i + 1) * kThreads];
      }
    } else {
      const float unit = p.scale * kLog2OfE;
#pragma unroll
      for (int n = 0; n < 4; ++n) {
#pragma unroll
        for (int c = 0; c < 2; ++c) {
          const int column = n * 8 + 2 * t + c;
#pragma unroll
          for (int i = 0; i < 2 * M; ++i) {
            const int line = own_line + g + 8 * i;
            const GradRow& row = info[kByRow ? line : column];
            float &weight = w[i / 2][n][i % 2 * 2 + c], &slope = ds[i / 2][n][i % 2 * 2 + c];
            if (!whole) {
              const int64_t key = kByRow ? now + column : work.first + line;
              if (key < row.lo || key >= row.hi) weight = kNegInf;
            }
            weight = exp2_approx(fmaf(weight, unit, -row.shift));
            slope = weight == 0.0f ? 0.0f : weight * (slope - row.delta);
          }
        }
      }
    }

    const auto add = [&](auto& sums, const auto& values, const uint16_t* lines) {
      Factors<M> factors;
#pragma unroll
      for (int m = 0; m < M; ++m) {
#pragma unroll
        for (int n = 0; n < 4; ++n) {
#pragma unroll
          for (int r = 0; r < 2; ++r) {
            factors[m][n / 2][n % 2 * 2 + r] = pack_any<T>(values[m][n][2 * r], values[m][n][2 * r + 1]);
          }
        }
      }
      if (!broken) add_products<T, Width, M>(sums, factors, lines);
      else add_products_carefully<T, Width, Warps, M>(sums, factors, lines, reinterpret_cast<uint32_t*>(slots));
    };
    if constexpr (kSumY) add(sum_y, w, y);
    if constexpr (kSumX) add(sum_x, ds, x);
    if (fetches) {  // by the first warp, which always has lines
      infos[(stage ^ 1) * kStreamed + threadIdx.x] = next_row < rows ? row_info(next_row, fetched) : no_row();
    }
  }
  cp_async_wait<0>();

#pragma unroll
  for (int m = 0; m < M; ++m) {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const int64_t line = work.first + own_line + m * 16 + g + 8 * r;
      if (line >= work.end) continue;
      if constexpr (kSumX) {
        const GradOut<T> to = kByRow ? query_grad_of<T>(a, s, line / group, key_head * group + line % group)
                                     : key_grad_of<T>(a, s, line, key_head);
#pragma unroll
        for (int n = 0; n < Width / 8; ++n) {
          to.put_two(n * 8 + 2 * t, p.head_dim, sum_x[m][n][2 * r] * p.scale, sum_x[m][n][2 * r + 1] * p.scale);
        }
      }
      if constexpr (kSumY) {
        const GradOut<T> to = value_grad_of<T>(a, s, line, key_head);
#pragma unroll
        for (int n = 0; n < Width / 8; ++n) {
          to.put_two(n * 8 + 2 * t, p.value_dim, sum_y[m][n][2 * r], sum_y[m][n][2 * r + 1]);
        }
      }
    }
  }
}

// Whether every row can be read 16 bytes at a time.
inline bool aligned_backward(const AttentionBackwardArgs& a) {
  const AttentionProblem& p = a.problem;
  return aligned_rows(p) && is_aligned(16, {a.upstream, p.prefix.present ? a.prefix_upstream : nullptr}, 2 * p.value_dim);
}

template <DType T, int Width, int Warps, BackwardPart Part>
int64_t launch_backward_part(const AttentionBackwardArgs& a, const RowTerms* terms, heddle_cuda_job& job) {
  const AttentionProblem& p = a.problem;
  constexpr int kLines = owned_lines(Width, Warps);
  const int64_t blocks = Part == BackwardPart::kQuery ? row_blocks(p, kLines) : key_blocks(p, kLines);
  if (blocks == 0) return kOk;
  const int64_t bytes = backward_matrix_shared(Width, Warps, has_transform(p) || p.uniform_empty);
  HEDDLE_ALLOW_SHARED((attention_backward_matrix_kernel<T, Width, Warps, Part>), bytes);
  const dim3 grid(static_cast<unsigned>(blocks), static_cast<unsigned>(p.key_heads));
  HEDDLE_LAUNCH((attention_backward_matrix_kernel<T, Width, Warps, Part>), grid, dim3(Warps * kWarp), bytes, job.stream, a,
                terms, aligned_backward(a));
  return job.launched();
}

template <DType T, int Width, int Warps>
int64_t launch_backward_warps(const AttentionBackwardArgs& a, const RowTerms* terms, heddle_cuda_job& job) {
  int64_t status;
  if constexpr (Width <= 128) {
    status = launch_backward_part<T, Width, Warps, BackwardPart::kKeyValue>(a, terms, job);
  } else {
    status = launch_backward_part<T, Width, Warps, BackwardPart::kValue>(a, terms, job);
    if (status == kOk) status = launch_backward_part<T, Width, Warps, BackwardPart::kKey>(a, terms, job);
  }
  if (status == kOk) status = launch_backward_part<T, Width, Warps, BackwardPart::kQuery>(a, terms, job);
  return status;
}

// Head sizes up to 64. Larger ones are in files of their own, for the compile time.
template <DType T>
int64_t launch_backward_narrow(const AttentionBackwardArgs& a, const RowTerms* terms, heddle_cuda_job& job) {
  const AttentionProblem& p = a.problem;
  // The tiles of the other side are the same for both: so are the bits.
  const bool few = !p.query_offsets && p.queries * p.group() <= 64 && p.keys <= 64;
  return few ? launch_backward_warps<T, 64, 2>(a, terms, job) : launch_backward_warps<T, 64, 4>(a, terms, job);
}

}  // namespace heddle
