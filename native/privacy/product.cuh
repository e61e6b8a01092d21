// Products of 64 x 64 tiles that are never stored: what norms and clipped sums are made of.
//
//   C[i][j] = sum_k x(k, i) y(k, j)
//
// Exact: fp32 FMA, 16 values of k at a time in shared memory, sums of 256 values added to the total (so that long sums
// keep their bits). Matrix: 16-bit operands on the matrix cores, 32 values of k at a time. In both a thread of 256 owns
// 16 elements of C, and k ascends: results do not depend on the launch.
#pragma once
#include "cuda/matrix.cuh"
#include "cuda/warp.cuh"
#include "privacy/kernels.h"

namespace heddle {

constexpr int kProductTile = 64, kProductThreads = 256;
constexpr int64_t kProductShared = 4 * 2 * 16 * (kProductTile + 4);  // bytes; the matrix form needs 2 * 2 * 64 * 40 at most
constexpr int64_t kMatrixShared = 2 * 2 * kProductTile * 40;

__device__ inline float load_source(const RowSource& s, int64_t row, int64_t column) {
  return load_as_float(s.data, s.type, row * s.stride + column);
}

// `DepthFirst`: neighbours in memory differ in k (rows of the operand are x's i), else in i.
template <bool DepthFirst>
struct ExactProduct {
  float c[16];

  __device__ static int row(int e) { return static_cast<int>(threadIdx.x) / 16 * 4 + e / 4; }
  __device__ static int column(int e) { return static_cast<int>(threadIdx.x) % 16 * 4 + e % 4; }

  template <class X, class Y>
  __device__ __forceinline__ void run(int64_t depth, void* memory, X x, Y y) {
    constexpr int kStep = 16, kPitch = kProductTile + 4;
    auto* xs = static_cast<float*>(memory);
    float* ys = xs + kStep * kPitch;
    const int ty = static_cast<int>(threadIdx.x) / 16 * 4, tx = static_cast<int>(threadIdx.x) % 16 * 4;
    float part[16];
#pragma unroll
    for (int e = 0; e < 16; ++e) c[e] = part[e] = 0.0f;
    for (int64_t k0 = 0; k0 < depth; k0 += kStep) {
      __syncthreads();
#pragma unroll
      for (int n = 0; n < kStep * kProductTile / kProductThreads; ++n) {
        const int e = n * kProductThreads + static_cast<int>(threadIdx.x);
        const int k = DepthFirst ? e % kStep : e / kProductTile, i = DepthFirst ? e / kStep : e % kProductTile;
        const bool inside = k0 + k < depth;
        xs[k * kPitch + i] = inside ? x(k0 + k, i) : 0.0f;
        ys[k * kPitch + i] = inside ? y(k0 + k, i) : 0.0f;
      }
      __syncthreads();
#pragma unroll
      for (int k = 0; k < kStep; ++k) {
        float p[4], q[4];
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          p[i] = xs[k * kPitch + ty + i];
          q[i] = ys[k * kPitch + tx + i];
        }
#pragma unroll
        for (int e = 0; e < 16; ++e) part[e] = fmaf(p[e / 4], q[e % 4], part[e]);
      }
      if ((k0 + kStep) % 256 == 0) {
#pragma unroll
        for (int e = 0; e < 16; ++e) {
          c[e] += part[e];
          part[e] = 0.0f;
        }
      }
    }
#pragma unroll
    for (int e = 0; e < 16; ++e) c[e] += part[e];
    __syncthreads();
  }
};

// Eight warps: 16 rows and 32 columns each. Products of values that were scaled are rounded to T once more.
template <DType T, bool DepthFirst>
struct MatrixProduct {
  float c[16];

  __device__ static int row(int e) {
    const int t = static_cast<int>(threadIdx.x);
    return t / kWarp % 4 * 16 + t % kWarp / 4 + e % 4 / 2 * 8;
  }
  __device__ static int column(int e) {
    const int t = static_cast<int>(threadIdx.x);
    return t / kWarp / 4 * 32 + e / 4 * 8 + t % 4 * 2 + e % 2;
  }

  template <class X, class Y>
  __device__ __forceinline__ void run(int64_t depth, void* memory, X x, Y y) {
    constexpr int kStep = 32, kPitch = DepthFirst ? kStep + 8 : kProductTile + 8;
    auto* xs = static_cast<uint16_t*>(memory);
    uint16_t* ys = xs + (DepthFirst ? kProductTile : kStep) * kPitch;
    const int lane = static_cast<int>(threadIdx.x) % kWarp, warp = static_cast<int>(threadIdx.x) / kWarp;
    const int i0 = warp % 4 * 16, j0 = warp / 4 * 32, block = lane / 8, line = lane % 8;
    float d[4][4] = {};
    for (int64_t k0 = 0; k0 < depth; k0 += kStep) {
      __syncthreads();
#pragma unroll
      for (int n = 0; n < kStep * kProductTile / kProductThreads; ++n) {
        const int e = n * kProductThreads + static_cast<int>(threadIdx.x);
        const int k = DepthFirst ? e % kStep : e / kProductTile, i = DepthFirst ? e / kStep : e % kProductTile;
        const bool inside = k0 + k < depth;
        const int at = DepthFirst ? i * kPitch + k : k * kPitch + i;
        xs[at] = round(inside ? x(k0 + k, i) : 0.0f);
        ys[at] = round(inside ? y(k0 + k, i) : 0.0f);
      }
      __syncthreads();
#pragma unroll
      for (int k = 0; k < kStep; k += 16) {
        uint32_t p[4];
        if constexpr (DepthFirst) ldmatrix_x4(p, xs + (i0 + lane % 16) * kPitch + k + lane / 16 * 8);
        else ldmatrix_x4_trans(p, xs + (k + block / 2 * 8 + line) * kPitch + i0 + block % 2 * 8);
#pragma unroll
        for (int j = 0; j < 2; ++j) {
          uint32_t q[4];
          if constexpr (DepthFirst) ldmatrix_x4(q, ys + (j0 + j * 16 + block / 2 * 8 + line) * kPitch + k + block % 2 * 8);
          else ldmatrix_x4_trans(q, ys + (k + lane % 16) * kPitch + j0 + j * 16 + lane / 16 * 8);
          const uint32_t low[2] = {q[0], q[1]}, high[2] = {q[2], q[3]};
          multiply(d[2 * j], p, low);
          multiply(d[2 * j + 1], p, high);
        }
      }
    }
#pragma unroll
    for (int e = 0; e < 16; ++e) c[e] = d[e / 4][e % 4];
    __syncthreads();
  }

 private:
  __device__ static uint16_t round(float v) { return T == DType::kBFloat16 ? round_bf16(v) : round_f16(v); }
  __device__ static void multiply(float (&d)[4], const uint32_t (&p)[4], const uint32_t (&q)[2]) {
    if constexpr (T == DType::kBFloat16) mma_bf16(d, p, q);
    else mma_f16(d, p, q);
  }
};

template <DType T, bool DepthFirst>
struct ProductOf {
  using type = MatrixProduct<T, DepthFirst>;
};
template <bool DepthFirst>
struct ProductOf<DType::kFloat32, DepthFirst> {
  using type = ExactProduct<DepthFirst>;
};

// The type of the product for two sources: 16 bits only where both have it.
inline DType product_type(const RowSource& a, const RowSource& b) { return a.type == b.type ? a.type : DType::kFloat32; }

}  // namespace heddle
