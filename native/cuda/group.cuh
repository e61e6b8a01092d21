// A group of threads that works on one row: a warp, or a whole block where a row needs more. The same kernel body
// serves both: Group<32> synchronises a warp, Group<256> a block of 256.
#pragma once
#include "cuda/warp.cuh"

namespace heddle {

template <int Threads>
struct Group {
  static constexpr bool kIsWarp = Threads == kWarp;
  static constexpr int kWords = kIsWarp ? 0 : Threads / kWarp;  // 32-bit words of shared memory that it needs

  int rank;         // of this thread in the group
  uint32_t* words;  // kWords words of shared memory

  __device__ __forceinline__ explicit Group(uint32_t* w) : rank(static_cast<int>(threadIdx.x) % Threads), words(w) {}

  __device__ __forceinline__ void sync() const {
    if constexpr (kIsWarp) __syncwarp();
    else __syncthreads();
  }
  __device__ __forceinline__ int largest(int v) const {
    if constexpr (kIsWarp) return __reduce_max_sync(kFullMask, v);
    else return block_max<Threads>(v, reinterpret_cast<int*>(words));
  }
  __device__ __forceinline__ int smallest(int v) const {
    if constexpr (kIsWarp) return __reduce_min_sync(kFullMask, v);
    else return block_reduce<Threads>(v, reinterpret_cast<int*>(words), [](int a, int b) { return a < b ? a : b; });
  }
  __device__ __forceinline__ float largest(float v) const {
    if constexpr (kIsWarp) return warp_max(v);
    else return block_max<Threads>(v, reinterpret_cast<float*>(words));
  }
  __device__ __forceinline__ float sum(float v) const {
    if constexpr (kIsWarp) return warp_sum(v);
    else return block_sum<Threads>(v, reinterpret_cast<float*>(words));
  }
};

}  // namespace heddle
