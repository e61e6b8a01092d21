// attention_backward() for bf16 and fp16 on the matrix cores; see attention_backward.cu.
//
// One kernel in two roles. A block owns 64 or 128 lines, 16 or 32 of them a warp, and streams the other side in tiles of
// 32 lines through two stages of shared memory:
//   kQuery            owns queries (x = q, y = upstream), streams keys (x = k, y = v):  dx = dq = sum ds x'
//   kKey, kValue ...  owns keys (x = k, y = v), streams queries (x = q, y = upstream):  dx = dk, dy = dv = sum p y'
// With owned lines as rows of the matrix product, its result has the layout of the next product's left operand: p and ds
// never leave the registers. Sums take 4 bytes x lines x head size over the block's threads, at most 128 registers; head
// sizes above 128 therefore compute dk and dv in two launches.
#pragma once
#include "attention/attention_backward_launch.h"
#include "attention/attention_backward_rows.cuh"
#include "attention/attention_launch.h"
#include "attention/attention_matrix.cuh"

namespace heddle {

constexpr int kStreamed = 32, kWorkBytes = 128;
__host__ __device__ constexpr int line_tiles(int width) { return width <= 64 ? 2 : 1; }  // of 16 lines, per warp
__host__ __device__ constexpr int owned_lines(int width, int warps) { return 16 * warps * line_tiles(width); }
__host__ __device__ constexpr int64_t backward_matrix_shared(int width, int warps, bool formed) {
  const int64_t lines = owned_lines(width, warps), slots = (formed ? 32 : 8) * line_tiles(width);
  return kWorkBytes + (4 * (width + 8) + int64_t{sizeof(GradRow)}) * (lines + 2 * kStreamed) + 4 * kWarp * warps * slots;
}

// out += owned lines times streamed lines, both in shared memory. `own` is the warp's first line.
template <DType T, int Width, int M>
__device__ __forceinline__ void line_products(float (&out)[M][4][4], const uint16_t* own, const uint16_t* tile) {
  constexpr int kPitch = Width + 8;
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  own += lane % 16 * kPitch + lane / 16 * 8;
  tile += (lane / 16 * 8 + lane % 8) * kPitch + lane / 8 % 2 * 8;
  [[maybe_unused]] constexpr int kUnroll = M == 1 ? 4 : 2;  // for the registers, and for the compile time
#pragma unroll kUnroll
  for (int d = 0; d < Width; d += 16) {
    uint32_t x[M][4];
#pragma unroll
    for (int m = 0; m < M; ++m) ldmatrix_x4(x[m], own + m * 16 * kPitch + d);
#pragma unroll
    for (int n = 0; n < 2; ++n) {
      uint32_t y[4];
      ldmatrix_x4(y, tile + n * 16 * kPitch + d);
      const uint32_t low[2] = {y[0], y[1]}, high[2] = {y[2], y[3]};
#pragma unroll
      for (int m = 0; m < M; ++m) {
        mma_any<T>(out[m][2 * n], x[m], low);
        mma_any<T>(out[m][2 * n + 1], x[m], high);
      }
    }
  }
}

// Left operands of the second products: 32 columns in two steps of 16.
template <int M>
using Factors = uint32_t[M][2][4];

// sums += factors times streamed lines.
template <DType T, int Width, int M>
__device__ __forceinline__ void add_products(float (&sums)[M][Width / 8][4], const Factors<M>& factors,
                                             const uint16_t* tile) {
  constexpr int kPitch = Width + 8;
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  tile += lane % 16 * kPitch + lane / 16 * 8;
#pragma unroll
  for (int k = 0; k < 2; ++k) {
#pragma unroll
    for (int n = 0; n < Width / 16; ++n) {
      uint32_t y[4];
      ldmatrix_x4_trans(y, tile + k * 16 * kPitch + n * 16);
      const uint32_t low[2] = {y[0], y[1]}, high[2] = {y[2], y[3]};
#pragma unroll
      for (int m = 0; m < M; ++m) {
        mma_any<T>(sums[m][2 * n], factors[m][k], low);
        mma_any<T>(sums[m][2 * n + 1], factors[m][k], high);
      }
    }
  }
}

// The same where the tile has infinities or NaN, which a factor of 0 must not bring in. `slots`: 8 M words a thread.
template <DType T, int Width, int Warps, int M>
__device__ inline void add_products_carefully(float (&sums)[M][Width / 8][4], const Factors<M>& factors,
                                              const uint16_t* tile, uint32_t* slots) {
  constexpr int kThreads = Warps * kWarp;
  const int t = static_cast<int>(threadIdx.x) % 4;
  uint32_t* mine = slots + threadIdx.x;
  __syncwarp();
#pragma unroll
  for (int i = 0; i < 8 * M; ++i) mine[i * kThreads] = factors[i / 8][i / 4 % 2][i % 4];
  __syncwarp();
#pragma unroll 1
  for (int j = 0; j < kStreamed; ++j) {
    const uint32_t* from = mine - t + j % 8 / 2 + (j / 16 * 4 + j / 8 % 2 * 2) * kThreads;
    const uint16_t* line = tile + j * (Width + 8) + 2 * t;
#pragma unroll
    for (int m = 0; m < M; ++m) {
      float factor[2];
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        const uint16_t half = static_cast<uint16_t>(from[(m * 8 + r) * kThreads] >> (j % 2 * 16));
        factor[r] = load_as_float<T>(&half, 0);
      }
#pragma unroll
      for (int n = 0; n < Width / 8; ++n) {
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          if (factor[e / 2] != 0.0f) {
            sums[m][n][e] = fmaf(factor[e / 2], load_as_float<T>(line, n * 8 + e % 2), sums[m][n][e]);
          }
        }
      }
    }
  }
}

// Whether this thread's share of a tile has an element that is not finite.
template <DType T, int Width, int Threads>
__device__ inline int has_broken(const uint16_t* tile) {
  constexpr uint16_t kInfinite = T == DType::kBFloat16 ? 0x7f80 : 0x7c00;
  int broken = 0;
#pragma unroll 1
  for (int c = static_cast<int>(threadIdx.x); c < kStreamed * (Width / 8); c += Threads) {
    const uint16_t* chunk = tile + c / (Width / 8) * (Width + 8) + c % (Width / 8) * 8;
    for (int i = 0; i < 8; ++i) broken |= (chunk[i] & kInfinite) == kInfinite;
  }
  return broken;
}

// Whether the block mask lets one of rows [row, row_end) see one of keys [key, key_end); asked by the whole block.
template <int Threads>
__device__ inline bool blocks_are_seen(const AttentionProblem& p, const Sequence& s, int64_t key_head, int64_t row,
                                       int64_t row_end, int64_t key, int64_t key_end) {
  int any = 0;
  const int64_t group = p.group(), end = key_end < s.keys ? key_end : s.keys;
#pragma unroll 1
  for (int64_t r = row + threadIdx.x; r < row_end; r += Threads) {
    const uint8_t* blocks = p.block_mask + s.batch * p.block_stride[0] + (key_head * group + r % group) * p.block_stride[1] +
                            (s.query_begin + r / group) / p.block_query * p.block_stride[2];
    const int64_t last = (s.key_begin + end - 1) / p.block_key;
#pragma unroll 1
    for (int64_t b = (s.key_begin + key) / p.block_key; b <= last; ++b) any |= blocks[b];
  }
  return __syncthreads_or(any) != 0;
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

  const auto query_line = [&](int64_t row) { return p.query_at(s, row / group, key_head * group + row % group); };
  const auto upstream_line = [&](int64_t row) { return a.upstream_at(s, row / group, key_head * group + row % group); };
  const auto row_info = [&](int64_t row) {
    return row < rows ? grad_row(p, terms, s, row / group, key_head * group + row % group) : no_row();
  };
  const auto load_queries = [&](auto lines, uint16_t* x, uint16_t* y, int64_t first, GradRow* info) {
    load_tile<decltype(lines)::value, Width, kPitch, kThreads>(x, p.query, p.head_dim, p.query_stride[3], aligned, [&](int i) {
      return first + i < rows ? query_line(first + i) : kNoLine;
    });
    load_tile<decltype(lines)::value, Width, kPitch, kThreads>(y, a.upstream, p.value_dim, 1, aligned, [&](int i) {
      return first + i < rows ? upstream_line(first + i) : kNoLine;
    });
    const int i = static_cast<int>(threadIdx.x);
    if (i < decltype(lines)::value) info[i] = row_info(first + i);
  };
  const auto load_keys = [&](auto lines, uint16_t* x, uint16_t* y, int64_t first) {
    load_tile<decltype(lines)::value, Width, kPitch, kThreads>(x, p.key, p.head_dim, p.key_stride[3], aligned, [&](int i) {
      return first + i < s.keys ? p.key_at(s, first + i, key_head) : kNoLine;
    });
    if (Part == BackwardPart::kValue) return;
    load_tile<decltype(lines)::value, Width, kPitch, kThreads>(y, p.value, p.value_dim, p.value_stride[3], aligned, [&](int i) {
      return first + i < s.keys ? p.value_at(s, first + i, key_head) : kNoLine;
    });
  };
  using Owned = std::integral_constant<int, kLines>;
  using Streamed = std::integral_constant<int, kStreamed>;
  const auto load_streamed = [&](int stage, int64_t tile) {
    uint16_t *x = tile_x + stage * kStreamed * kPitch, *y = tile_y + stage * kStreamed * kPitch;
    if constexpr (kByRow) load_keys(Streamed{}, x, y, tile);
    else load_queries(Streamed{}, x, y, tile, infos + stage * kStreamed);
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

  if constexpr (kByRow) load_queries(Owned{}, own_x, own_y, work.first, infos);
  else load_keys(Owned{}, own_x, own_y, work.first);
  int64_t tile = seen_from(work.streamed.lo / kStreamed * kStreamed);
  if (tile < work.streamed.hi) load_streamed(0, tile);

  [[maybe_unused]] float sum_x[kSumX ? M : 1][kSumX ? Width / 8 : 1][4] = {};
  [[maybe_unused]] float sum_y[kSumY ? M : 1][kSumY ? Width / 8 : 1][4] = {};
  const int own_line = warp * 16 * M;
  for (int stage = 0; tile < work.streamed.hi; stage ^= 1) {
    cp_async_wait<0>();
    __syncthreads();  // the tile is there, and nobody reads the other stage any more
    const int64_t next = seen_from(tile + kStreamed);
    if (next < work.streamed.hi) load_streamed(stage ^ 1, next);
    const uint16_t *x = tile_x + stage * kStreamed * kPitch, *y = tile_y + stage * kStreamed * kPitch;
    const GradRow* info = kByRow ? infos : infos + stage * kStreamed;
    bool whole = !formed;
    if (whole && kByRow) {
      whole = tile >= work.full.lo && tile + kStreamed <= work.full.hi;
    } else if (whole) {
      whole = tile + kStreamed <= rows && key_range(p, s, (tile + kStreamed - 1) / group).lo <= work.first &&
              key_range(p, s, tile / group).hi >= work.end;
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
            weight = exp2f(fmaf(weight, unit, -row.shift));
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

// Head sizes up to 128; those to 256 are in files of their own, for the compile time.
template <DType T>
int64_t launch_backward_matrix(const AttentionBackwardArgs& a, const RowTerms* terms, heddle_cuda_job& job) {
  const AttentionProblem& p = a.problem;
  if (p.head_dim > 64 || p.value_dim > 64) return launch_backward_warps<T, 128, 4>(a, terms, job);
  // The tiles of the other side are the same for both: so are the bits.
  const bool few = !p.query_offsets && p.queries * p.group() <= 64 && p.keys <= 64;
  return few ? launch_backward_warps<T, 64, 2>(a, terms, job) : launch_backward_warps<T, 64, 4>(a, terms, job);
}

}  // namespace heddle
