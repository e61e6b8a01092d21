// Matrix-core instructions and asynchronous copies of sm_80 and later; a whole warp calls each.
//
// Fragments, with g = lane / 4 and t = lane % 4:
//   16-bit (k = 16), two elements a register:
//     a[0]: row g,     k 2t 2t+1      a[1]: row g + 8, k 2t 2t+1
//     a[2]: row g,     k 2t+8 2t+9    a[3]: row g + 8, k 2t+8 2t+9
//     b[0]: column g,  k 2t 2t+1      b[1]: column g,  k 2t+8 2t+9
//   8-bit (k = 32), four elements a register: 4t .. 4t+3 in place of 2t 2t+1, and 16 more in place of 8 more
//     d[0] d[1]: row g, columns 2t 2t+1     d[2] d[3]: row g + 8, the same columns
// d is read and written: d += a b.
#pragma once
#include "cuda/device.cuh"

namespace heddle {

#if defined(HEDDLE_CUDA_HOST)

__device__ inline void mma_bf16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  cuda_host::mma(cuda_host::run_mma_bf16, d, a, b);
}
__device__ inline void mma_f16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  cuda_host::mma(cuda_host::run_mma_f16, d, a, b);
}
__device__ inline void mma_s8(int32_t (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  cuda_host::mma(cuda_host::run_mma_s8, d, a, b);
}
__device__ inline void ldmatrix_x4(uint32_t (&r)[4], const void* row) { cuda_host::ldmatrix(r, 4, row, false); }
__device__ inline void ldmatrix_x4_trans(uint32_t (&r)[4], const void* row) { cuda_host::ldmatrix(r, 4, row, true); }
__device__ inline void ldmatrix_x2(uint32_t (&r)[2], const void* row) { cuda_host::ldmatrix(r, 2, row, false); }
__device__ inline void ldmatrix_x2_trans(uint32_t (&r)[2], const void* row) { cuda_host::ldmatrix(r, 2, row, true); }
__device__ inline void cp_async_16(void* shared, const void* global, int valid = 16) {
  cuda_host::cp_async(shared, global, valid);
}
__device__ inline void cp_async_commit() { cuda_host::cp_async_commit(); }
template <int Pending>
__device__ inline void cp_async_wait() {
  cuda_host::cp_async_wait(Pending);
}
__device__ inline float exp2_approx(float x) {
  const float y = exp2f(x);
  return y < 0x1p-126f ? 0.0f : y;
}
__device__ inline uint32_t permute_bytes(uint32_t low, uint32_t high, uint32_t selector) {
  const uint64_t both = static_cast<uint64_t>(high) << 32 | low;
  uint32_t out = 0;
  for (int i = 0; i < 4; ++i) {
    const uint32_t s = selector >> (4 * i) & 15u;
    const auto byte = static_cast<uint32_t>(both >> (8 * (s & 7u)) & 255u);
    out |= (s & 8u ? (byte & 128u ? 255u : 0u) : byte) << (8 * i);
  }
  return out;
}
__device__ inline uint32_t scale_bf16x2(uint32_t v) {
  constexpr float k = 0x1p120f;
  return pack_bf16(bf16_to_float(static_cast<uint16_t>(v)) * k, bf16_to_float(static_cast<uint16_t>(v >> 16)) * k);
}

#else

__device__ __forceinline__ uint32_t shared_address(const void* p) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(p));
}

__device__ __forceinline__ void mma_bf16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
__device__ __forceinline__ void mma_f16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
__device__ __forceinline__ void mma_s8(int32_t (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  asm volatile(
      "mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+r"(d[0]), "+r"(d[1]), "+r"(d[2]), "+r"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// Four 8 x 8 matrices of 16-bit elements: lanes 8i .. 8i+7 give the addresses of matrix i's rows (16-byte aligned,
// shared memory); r[i] holds row lane / 4, columns 2t 2t+1 of it (_trans: rows 2t 2t+1, column lane / 4).
__device__ __forceinline__ void ldmatrix_x4(uint32_t (&r)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_address(row))
               : "memory");
}
__device__ __forceinline__ void ldmatrix_x4_trans(uint32_t (&r)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_address(row))
               : "memory");
}
// Two matrices, from the addresses of lanes 0 to 15.
__device__ __forceinline__ void ldmatrix_x2(uint32_t (&r)[2], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0,%1}, [%2];"
               : "=r"(r[0]), "=r"(r[1])
               : "r"(shared_address(row))
               : "memory");
}
__device__ __forceinline__ void ldmatrix_x2_trans(uint32_t (&r)[2], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%0,%1}, [%2];"
               : "=r"(r[0]), "=r"(r[1])
               : "r"(shared_address(row))
               : "memory");
}

// Copies 16 bytes (both addresses 16-byte aligned) in the background; bytes beyond `valid` (0 to 16) become zero and
// are not read. The copies of a thread are in order by commit groups; they are there after cp_async_wait<Pending>()
// has left at most Pending groups open, for other threads after a barrier behind that.
__device__ __forceinline__ void cp_async_16(void* shared, const void* global, int valid = 16) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(shared)), "l"(global), "r"(valid)
               : "memory");
}
__device__ __forceinline__ void cp_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int Pending>
__device__ __forceinline__ void cp_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(Pending) : "memory");
}

// 2^x within 2 ULP; results below 2^-126 are 0. One instruction, where exp2f takes four.
__device__ __forceinline__ float exp2_approx(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// Byte i of the result is byte s & 7 of high:low, s nibble i of the selector; with s & 8 its top bit in all places.
__device__ __forceinline__ uint32_t permute_bytes(uint32_t low, uint32_t high, uint32_t selector) {
  uint32_t out;
  asm("prmt.b32 %0, %1, %2, %3;" : "=r"(out) : "r"(low), "r"(high), "r"(selector));
  return out;
}
// Two bf16 times 2^120, subnormal inputs included.
__device__ __forceinline__ uint32_t scale_bf16x2(uint32_t v) {
  uint32_t out;
  asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(out) : "r"(v), "r"(0x7b807b80u), "r"(0x80008000u));
  return out;
}

#endif

// bf16 or fp16, as T says: d += a b, and two floats as one register of a fragment.
template <DType T>
__device__ __forceinline__ void mma_any(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  if constexpr (T == DType::kBFloat16) mma_bf16(d, a, b);
  else mma_f16(d, a, b);
}
template <DType T>
__device__ __forceinline__ uint32_t pack_any(float low, float high) {
  if constexpr (T == DType::kBFloat16) return pack_bf16(low, high);
  else return static_cast<uint32_t>(round_f16(low)) | static_cast<uint32_t>(round_f16(high)) << 16;
}

}  // namespace heddle
