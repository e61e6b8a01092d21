// Reductions over a warp and a block. Every lane gets the result; the order of additions is fixed (a butterfly), so
// results do not depend on scheduling.
#pragma once
#include "cuda/device.cuh"

namespace heddle {

template <class T, class Op>
__device__ __forceinline__ T warp_reduce(T v, Op op) {
#pragma unroll
  for (int offset = kWarp / 2; offset > 0; offset /= 2) v = op(v, __shfl_xor_sync(kFullMask, v, offset));
  return v;
}

template <class T>
__device__ __forceinline__ T warp_sum(T v) {
  return warp_reduce(v, [](T a, T b) { return a + b; });
}
template <class T>
__device__ __forceinline__ T warp_max(T v) {
  return warp_reduce(v, [](T a, T b) { return a > b ? a : b; });
}
template <class T>
__device__ __forceinline__ T warp_min(T v) {
  return warp_reduce(v, [](T a, T b) { return a < b ? a : b; });
}

// Inclusive prefix sum over the lanes.
template <class T>
__device__ __forceinline__ T warp_scan(T v) {
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
#pragma unroll
  for (int offset = 1; offset < kWarp; offset *= 2) {
    const T below = __shfl_up_sync(kFullMask, v, offset);
    if (lane >= offset) v += below;
  }
  return v;
}

// Over a block of `Threads` threads in x; `shared` holds Threads / 32 values and may be reused after the call.
template <int Threads, class T, class Op>
__device__ __forceinline__ T block_reduce(T v, T* shared, Op op) {
  static_assert(Threads % kWarp == 0 && Threads <= 1024, "whole warps");
  constexpr int kWarps = Threads / kWarp;
  v = warp_reduce(v, op);
  if constexpr (kWarps == 1) return v;
  const int warp = static_cast<int>(threadIdx.x) / kWarp, lane = static_cast<int>(threadIdx.x) % kWarp;
  if (lane == 0) shared[warp] = v;
  __syncthreads();
  T total = shared[0];
  for (int w = 1; w < kWarps; ++w) total = op(total, shared[w]);
  __syncthreads();
  return total;
}
template <int Threads, class T>
__device__ __forceinline__ T block_sum(T v, T* shared) {
  return block_reduce<Threads>(v, shared, [](T a, T b) { return a + b; });
}
template <int Threads, class T>
__device__ __forceinline__ T block_max(T v, T* shared) {
  return block_reduce<Threads>(v, shared, [](T a, T b) { return a > b ? a : b; });
}

// Inclusive prefix sum over a block, and its total.
template <int Threads, class T>
__device__ __forceinline__ T block_scan(T v, T* shared, T* total) {
  constexpr int kWarps = Threads / kWarp;
  const int warp = static_cast<int>(threadIdx.x) / kWarp, lane = static_cast<int>(threadIdx.x) % kWarp;
  v = warp_scan(v);
  if (lane == kWarp - 1) shared[warp] = v;
  __syncthreads();
  T before = T(0), all = T(0);
  for (int w = 0; w < kWarps; ++w) {
    if (w < warp) before += shared[w];
    all += shared[w];
  }
  __syncthreads();
  *total = all;
  return before + v;
}

}  // namespace heddle
