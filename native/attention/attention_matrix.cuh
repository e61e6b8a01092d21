// attention() for bf16 and fp16 on the matrix cores; see attention.cu.
#pragma once
#include "attention/attention_end.cuh"
#include "attention/attention_launch.h"
#include "cuda/matrix.cuh"

namespace heddle {

constexpr int kMatrixRows = 64, kMatrixThreads = 128;

// Rows of `dim` 16-bit elements to shared memory [rows][Pitch]; `start` gives a row's first element, or kNoLine. Columns up to
// Width are filled with zeros. In the background where everything is aligned to 16 bytes.
template <int Rows, int Width, int Pitch, int Threads = kMatrixThreads, class Start>
__device__ __forceinline__ void load_tile(uint16_t* to, const void* from, int32_t dim, int64_t step, bool aligned,
                                          Start start) {
  const auto* data = static_cast<const uint16_t*>(from);
  constexpr int kChunks = Width / 8;
#pragma unroll 1
  for (int c = static_cast<int>(threadIdx.x); c < Rows * kChunks; c += Threads) {
    const int row = c / kChunks, column = c % kChunks * 8;
    const int64_t at = start(row);
    const int left = at == kNoLine ? 0 : dim - column;
    uint16_t* target = to + row * Pitch + column;
    if (aligned) {
      cp_async_16(target, left > 0 ? data + at + column : data, left >= 8 ? 16 : left > 0 ? 2 * left : 0);
    } else {
#pragma unroll
      for (int i = 0; i < 8; ++i) target[i] = i < left ? data[at + (column + i) * step] : uint16_t{0};
    }
  }
  cp_async_commit();
}

// out += weights values: z [16 rows of the warp][Keys] as fragments, values [Keys][Width + 8] in shared memory.
template <DType T, int Keys, int Width>
__device__ __forceinline__ void add_weighted(float (&out)[Width / 8][4], const float (&z)[Keys / 8][4],
                                             const uint16_t* values, int lane) {
#pragma unroll
  for (int k = 0; k < Keys / 16; ++k) {
    const uint32_t x[4] = {pack_any<T>(z[2 * k][0], z[2 * k][1]), pack_any<T>(z[2 * k][2], z[2 * k][3]),
                           pack_any<T>(z[2 * k + 1][0], z[2 * k + 1][1]), pack_any<T>(z[2 * k + 1][2], z[2 * k + 1][3])};
#pragma unroll
    for (int n = 0; n < Width / 16; ++n) {
      uint32_t y[4];
      ldmatrix_x4_trans(y, values + (k * 16 + lane % 16) * (Width + 8) + n * 16 + lane / 16 * 8);
      const uint32_t low[2] = {y[0], y[1]}, high[2] = {y[2], y[3]};
      mma_any<T>(out[2 * n], x, low);
      mma_any<T>(out[2 * n + 1], x, high);
    }
  }
}

// The same where values may not be finite: a weight of zero takes nothing from its value. `weights`: [16][Pitch] of
// this warp in shared memory, which no lane reads any more.
template <DType T, int Keys, int Width, int Pitch>
__device__ __forceinline__ void add_weighted_each(float (&out)[Width / 8][4], const float (&z)[Keys / 8][4],
                                                  const uint16_t* values, uint16_t* weights, int lane) {
  const int t = lane % 4;
  uint16_t* w = weights + lane / 4 * Pitch;
#pragma unroll
  for (int n = 0; n < Keys / 8; ++n) {
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      w[e / 2 * 8 * Pitch + n * 8 + 2 * t + e % 2] = static_cast<uint16_t>(pack_any<T>(z[n][e], 0.0f));
    }
  }
  __syncwarp();
#pragma unroll 1
  for (int j = 0; j < Keys; ++j) {
    const float weight[2] = {load_as_float<T>(w, j), load_as_float<T>(w, 8 * Pitch + j)};
#pragma unroll
    for (int n = 0; n < Width / 8; ++n) {
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        if (weight[e / 2] == 0.0f) continue;
        out[n][e] = fmaf(weight[e / 2], load_as_float<T>(values, j * (Width + 8) + n * 8 + 2 * t + e % 2), out[n][e]);
      }
    }
  }
}

__host__ __device__ constexpr int matrix_keys(int width) { return width > 128 ? 32 : 64; }
__host__ __device__ constexpr int64_t matrix_shared(int width) {
  return 2 * (kMatrixRows + 2 * matrix_keys(width)) * (width + 8) + 4 * kMatrixThreads * (matrix_keys(width) / 2);
}

// Width: head_dim and value_dim rounded up. The four warps have 16 rows each. `skip_short`: sequences of few keys are
// another kernel's.
template <DType T, int Width>
__global__ void __launch_bounds__(kMatrixThreads, Width == 64 ? 2 : 1) attention_matrix_kernel(AttentionArgs a, bool aligned,
                                                                                             bool skip_short) {
  constexpr int kKeys = matrix_keys(Width), kPitch = Width + 8, kWeightPitch = kKeys + 8;
  HEDDLE_DYNAMIC_SHARED(uint16_t, shared);
  uint16_t* queries = shared;
  uint16_t* keys = queries + kMatrixRows * kPitch;
  uint16_t* values = keys + kKeys * kPitch;
  // For formed logits, and for the weights of tiles whose values are not finite.
  auto* logits = reinterpret_cast<float*>(values + kKeys * kPitch);
  auto* weights = reinterpret_cast<uint16_t*>(logits);  // [64][kWeightPitch]
  const AttentionProblem& p = a.problem;
  BlockRows rows;
  if (!find_rows(p, kMatrixRows, blockIdx.x, blockIdx.y, &rows)) return;
  const Sequence& s = rows.sequence;
  if (skip_short && s.keys <= kShortKeys) return;
  const int warp = static_cast<int>(threadIdx.x) / kWarp, lane = static_cast<int>(threadIdx.x) % kWarp;
  const int g = lane / 4, t = lane % 4;
  const int64_t group = p.group(), key_head = rows.key_head;
  const int64_t last = (rows.first + kMatrixRows < rows.count ? rows.first + kMatrixRows : rows.count) - 1;
  const KeyRange all = union_range(p, s, rows.first / group, last / group);
  const bool formed = has_transform(p);
  const float unit = formed ? kLog2OfE : p.scale * kLog2OfE;
  const int64_t begin = all.lo / kKeys * kKeys;

  load_tile<kMatrixRows, Width, kPitch>(queries, p.query, p.head_dim, p.query_stride[3], aligned, [&](int r) {
    const int64_t row = rows.first + r;
    return row > last ? kNoLine : p.query_at(s, row / group, key_head * group + row % group);
  });
  auto load_keys = [&](int64_t tile) {
    load_tile<kKeys, Width, kPitch>(keys, p.key, p.head_dim, p.key_stride[3], aligned, [&](int j) {
      return tile + j < s.keys ? p.key_at(s, tile + j, key_head) : kNoLine;
    });
  };
  load_keys(begin);

  // The lane's rows: g and g + 8 of its warp.
  int64_t position[2], head[2];
  KeyRange own[2];
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    int64_t row = rows.first + warp * 16 + g + 8 * r;
    if (row > last) row = last;
    position[r] = row / group;
    head[r] = key_head * group + row % group;
    own[r] = key_range(p, s, position[r]);
  }
  // Tiles that every row of the block sees as a whole need no look at single keys.
  int64_t full_lo = 0, full_hi = 0;
  if (!formed) {
    full_lo = key_range(p, s, last / group).lo;
    full_hi = key_range(p, s, rows.first / group).hi;
  }

  float out[Width / 8][4] = {};
  float m[2] = {kNegInf, kNegInf}, total[2] = {0.0f, 0.0f};
  for (int64_t tile = begin; tile < all.hi; tile += kKeys) {
    const bool whole = !formed && tile >= full_lo && tile + kKeys <= full_hi;
    load_tile<kKeys, Width, kPitch>(values, p.value, p.value_dim, p.value_stride[3], aligned, [&](int j) {
      return tile + j < s.keys ? p.value_at(s, tile + j, key_head) : kNoLine;
    });
    cp_async_wait<1>();
    __syncthreads();

    float z[kKeys / 8][4] = {};
#pragma unroll
    for (int d = 0; d < Width; d += 16) {
      uint32_t x[4];
      ldmatrix_x4(x, queries + (warp * 16 + lane % 16) * kPitch + d + lane / 16 * 8);
#pragma unroll
      for (int n = 0; n < kKeys / 16; ++n) {
        uint32_t y[4];
        ldmatrix_x4(y, keys + (n * 16 + lane / 16 * 8 + lane % 8) * kPitch + d + lane / 8 % 2 * 8);
        const uint32_t low[2] = {y[0], y[1]}, high[2] = {y[2], y[3]};
        mma_any<T>(z[2 * n], x, low);
        mma_any<T>(z[2 * n + 1], x, high);
      }
    }
    if (formed) {
      // By way of shared memory, so that the code for one logit stands here once instead of once per register.
      float* own_logits = logits + threadIdx.x;
#pragma unroll
      for (int i = 0; i < kKeys / 2; ++i) own_logits[i * kMatrixThreads] = z[i / 4][i % 4];
#pragma unroll 1
      for (int i = 0; i < kKeys / 2; ++i) {
        const bool second = i % 4 >= 2;
        const int64_t at = second ? position[1] : position[0], h = second ? head[1] : head[0];
        const KeyRange range = second ? own[1] : own[0];
        const int64_t key = tile + i / 4 * 8 + 2 * t + i % 2;
        float* logit = own_logits + i * kMatrixThreads;
        *logit = sees(p, s, at, h, range, key) ? logit_of(p, s, at, h, key, *logit, nullptr) : kNegInf;
      }
#pragma unroll
      for (int i = 0; i < kKeys / 2; ++i) z[i / 4][i % 4] = own_logits[i * kMatrixThreads];
    } else if (!whole) {
#pragma unroll
      for (int n = 0; n < kKeys / 8; ++n) {
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          const int64_t key = tile + n * 8 + 2 * t + e % 2;
          if (key < own[e / 2].lo || key >= own[e / 2].hi) z[n][e] = kNegInf;
        }
      }
    }
    float keep[2];
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      float top = kNegInf;
#pragma unroll
      for (int n = 0; n < kKeys / 8; ++n) top = fmaxf(top, fmaxf(z[n][2 * r], z[n][2 * r + 1]));
      top = fmaxf(top, __shfl_xor_sync(kFullMask, top, 1));
      top = fmaxf(top, __shfl_xor_sync(kFullMask, top, 2));
      top = fmaxf(m[r], top * unit);
      const float base = top == kNegInf ? 0.0f : top;
      keep[r] = m[r] == kNegInf ? 0.0f : exp2f(m[r] - base);
      m[r] = top;
      float sum = 0.0f;
#pragma unroll
      for (int n = 0; n < kKeys / 8; ++n) {
#pragma unroll
        for (int e = 2 * r; e < 2 * r + 2; ++e) {
          z[n][e] = z[n][e] == kNegInf ? 0.0f : exp2f(fmaf(z[n][e], unit, -base));
          sum += z[n][e];
        }
      }
      sum += __shfl_xor_sync(kFullMask, sum, 1);
      sum += __shfl_xor_sync(kFullMask, sum, 2);
      total[r] = total[r] * keep[r] + sum;
    }
#pragma unroll
    for (int n = 0; n < Width / 8; ++n) {
#pragma unroll
      for (int e = 0; e < 4; ++e) out[n][e] *= keep[e / 2];
    }

    cp_async_wait<0>();
    int broken = 0;
    if (!whole) {
      // The thread's own chunks are there; __syncthreads_or makes everybody's visible.
      constexpr int kChunks = Width / 8;
      const uint16_t infinite = T == DType::kBFloat16 ? 0x7f80 : 0x7c00;
#pragma unroll 1
      for (int c = static_cast<int>(threadIdx.x); c < kKeys * kChunks; c += kMatrixThreads) {
        const uint16_t* chunk = values + c / kChunks * kPitch + c % kChunks * 8;
        for (int i = 0; i < 8; ++i) broken |= (chunk[i] & infinite) == infinite;
      }
      broken = __syncthreads_or(broken);
    } else {
      __syncthreads();
    }
    if (tile + kKeys < all.hi) load_keys(tile + kKeys);
    if (!broken) add_weighted<T, kKeys, Width>(out, z, values, lane);
    else add_weighted_each<T, kKeys, Width, kWeightPitch>(out, z, values, weights + warp * 16 * kWeightPitch, lane);
    __syncthreads();  // the values are read: the next tile may take their place
  }
  cp_async_wait<0>();

#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const int64_t row = rows.first + warp * 16 + g + 8 * r;
    if (row > last) continue;
    const RowEnd end = end_row(p, head[r], m[r], total[r]);
    const RowOut<T> to(a, s, position[r], head[r]);
#pragma unroll
    for (int n = 0; n < Width / 8; ++n) {
#pragma unroll
      for (int e = 2 * r; e < 2 * r + 2; ++e) {
        const int i = n * 8 + 2 * t + e % 2;
        if (i < p.value_dim) to.put(i, end.empty ? 0.0f : out[n][e] * end.factor);
      }
    }
    if (end.empty && p.uniform_empty) put_means(p, s, key_head, t, 4, to);
    if (t == 0) put_lse(a, s, position[r], head[r], end.lse);
  }
}

template <DType T, int Width>
int64_t launch_matrix(const AttentionArgs& a, heddle_cuda_job& job) {
  const AttentionProblem& p = a.problem;
  const int64_t bytes = matrix_shared(Width);
  HEDDLE_ALLOW_SHARED((attention_matrix_kernel<T, Width>), bytes);
  const dim3 grid(static_cast<unsigned>(row_blocks(p, kMatrixRows)), static_cast<unsigned>(p.key_heads));
  HEDDLE_LAUNCH((attention_matrix_kernel<T, Width>), grid, dim3(kMatrixThreads), bytes, job.stream, a, aligned_rows(p),
                serves_short(p));
  return job.launched();
}

template <DType T>
int64_t launch_matrix_attention(const AttentionArgs& a, heddle_cuda_job& job) {
  const int32_t width = attention_width(a.problem);
  if (width <= 32) return launch_matrix<T, 32>(a, job);
  if (width <= 64) return launch_matrix<T, 64>(a, job);
  if (width <= 128) return launch_matrix<T, 128>(a, job);
  return launch_matrix<T, 256>(a, job);
}

}  // namespace heddle
