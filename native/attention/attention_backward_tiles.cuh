// Tiles of attention_backward() on the matrix cores: their products, and what may stand in their way.
#pragma once
#include "attention/attention_backward_rows.cuh"
#include "attention/attention_matrix.cuh"

namespace heddle {

constexpr int kStreamed = 32;  // lines of a streamed tile

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

}  // namespace heddle
