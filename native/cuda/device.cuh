// Everything a kernel uses beyond plain CUDA C++ goes through this header, so that the host shim
// (test/native/cuda_host) can compile and run the same sources on a CPU: launches, dynamic shared memory,
// conversions, the status word. Matrix instructions and asynchronous copies are in matrix.cuh, reductions in
// warp.cuh. How to add a kernel: docs/architecture.md, "CUDA".
//
// What a kernel may not do: depend on warps running in lockstep (use the *_sync forms and __syncwarp), wait for
// another block, return early before a __syncthreads(), or use blocks that are not a multiple of 32 threads. The shim
// reports each of these.
#pragma once
#include <cuda_runtime.h>

#include <cstdint>
#include <cstring>
#include <initializer_list>

#include "core/dtype.h"

#if defined(HEDDLE_CUDA_HOST)

#include "interpreter.h"

#else

#include <cuda_bf16.h>
#include <cuda_fp16.h>

// HEDDLE_LAUNCH((kernel<T, 4>), grid, block, dynamic_shared_bytes, stream, args...)
#define HEDDLE_LAUNCH(kernel, grid, block, shared, stream, ...) \
  (kernel)<<<(grid), (block), (shared), (stream)>>>(__VA_ARGS__)

// Declares `T* name`: the block's dynamic shared memory, of the size given at the launch; one per kernel.
#define HEDDLE_DYNAMIC_SHARED(T, name)                                          \
  extern __shared__ __align__(128) unsigned char heddle_dynamic_shared[];       \
  T* name = reinterpret_cast<T*>(heddle_dynamic_shared)

// Before a launch with more than 48 KB of dynamic shared memory (at most 163 KB on sm_80, 227 KB on sm_90).
#define HEDDLE_ALLOW_SHARED(kernel, bytes) \
  cudaFuncSetAttribute((kernel), cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(bytes))

// Tells AddressSanitizer which bytes of a cached block may be touched (host shim only).
#define HEDDLE_GUARD_BLOCK(block, used, size) static_cast<void>(size)

#endif

namespace heddle {

constexpr int kWarp = 32;
constexpr unsigned kFullMask = 0xffffffffu;
constexpr float kNegInf = -HUGE_VALF;

__host__ __device__ constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Whether rows of `row_bytes` behind these pointers can be read in words of `bytes` (views of device tensors may
// start anywhere).
inline bool is_aligned(int64_t bytes, std::initializer_list<const void*> pointers, int64_t row_bytes) {
  for (const void* p : pointers) {
    if (reinterpret_cast<uintptr_t>(p) % static_cast<uintptr_t>(bytes) != 0) return false;
  }
  return row_bytes % bytes == 0;
}

#if defined(HEDDLE_CUDA_HOST)
__device__ __forceinline__ float widen_bf16(uint16_t h) { return bf16_to_float(h); }
__device__ __forceinline__ float widen_f16(uint16_t h) { return f16_to_float(h); }
__device__ __forceinline__ uint16_t round_bf16(float f) { return float_to_bf16(f); }
__device__ __forceinline__ uint16_t round_f16(float f) { return float_to_f16(f); }
#else
__device__ __forceinline__ float widen_bf16(uint16_t h) { return __uint_as_float(static_cast<uint32_t>(h) << 16); }
__device__ __forceinline__ float widen_f16(uint16_t h) { return __half2float(__ushort_as_half(h)); }
__device__ __forceinline__ uint16_t round_bf16(float f) { return __bfloat16_as_ushort(__float2bfloat16_rn(f)); }
__device__ __forceinline__ uint16_t round_f16(float f) { return __half_as_ushort(__float2half_rn(f)); }
#endif

// Two floats as packed bf16, `low` in the low half: one register of a matrix fragment.
__device__ __forceinline__ uint32_t pack_bf16(float low, float high) {
  return static_cast<uint32_t>(round_bf16(low)) | static_cast<uint32_t>(round_bf16(high)) << 16;
}

// Storage of a floating type: Storage<DType::kBFloat16>::type is uint16_t.
template <DType T>
struct Storage {
  using type = uint16_t;
};
template <>
struct Storage<DType::kFloat32> {
  using type = float;
};

// Element i of fp32, bf16 or fp16 data as fp32, and back (rounded to nearest, ties to even).
template <DType T>
__device__ __forceinline__ float load_as_float(const void* p, int64_t i) {
  if constexpr (T == DType::kFloat32) {
    return static_cast<const float*>(p)[i];
  } else {
    const uint16_t h = static_cast<const uint16_t*>(p)[i];
    if constexpr (T == DType::kBFloat16) return widen_bf16(h);
    else return widen_f16(h);
  }
}
// The same where the type is known at run time only.
__device__ __forceinline__ float load_as_float(const void* p, DType type, int64_t i) {
  return type == DType::kFloat32    ? load_as_float<DType::kFloat32>(p, i)
         : type == DType::kBFloat16 ? load_as_float<DType::kBFloat16>(p, i)
                                    : load_as_float<DType::kFloat16>(p, i);
}
template <DType T>
__device__ __forceinline__ void store_float(void* p, int64_t i, float v) {
  if constexpr (T == DType::kFloat32) static_cast<float*>(p)[i] = v;
  else if constexpr (T == DType::kBFloat16) static_cast<uint16_t*>(p)[i] = round_bf16(v);
  else static_cast<uint16_t*>(p)[i] = round_f16(v);
}

__device__ __forceinline__ void store_float(void* p, DType type, int64_t i, float v) {
  if (type == DType::kFloat32) store_float<DType::kFloat32>(p, i, v);
  else if (type == DType::kBFloat16) store_float<DType::kBFloat16>(p, i, v);
  else store_float<DType::kFloat16>(p, i, v);
}

// Calls f(std::integral_constant<DType, ...>) for a floating type that is known at run time (host code).
template <DType T>
struct TypeTag {
  static constexpr DType value = T;
};
template <class F>
auto with_float_type(DType type, F&& f) {
  switch (type) {
    case DType::kBFloat16: return f(TypeTag<DType::kBFloat16>{});
    case DType::kFloat16: return f(TypeTag<DType::kFloat16>{});
    default: return f(TypeTag<DType::kFloat32>{});
  }
}

// Asks for the 128 bytes around an address, which must be inside an allocation.
__device__ __forceinline__ void prefetch_l2([[maybe_unused]] const void* p) {
#if !defined(HEDDLE_CUDA_HOST)
  asm volatile("prefetch.global.L2 [%0];" ::"l"(p));
#endif
}

// The job ends with bad_value(index) of the smallest index reported. `word`: job.status().
__device__ __forceinline__ void report_bad_value(unsigned long long* word, int64_t index) {
  atomicMin(word, static_cast<unsigned long long>(index) + 1ull);
}

}  // namespace heddle
