// Tile products on Arm's dot product extensions, beside the neon region because each is optional: sdot (dotprod),
// smmla (i8mm) and bfdot (bf16). Which one runs is chosen in select.cpp from the CPU's features.
//
// int8 and 4 bits: x is stored signed (Operand::kInt8; int8 weights are one group), so no compensation is needed;
// int4 nibbles multiply as 0..15 and zero point * sum(x) is taken off each group, as on x86.
// bf16: one instruction multiplies two k and adds both to the fp32 chain (rounded as the instruction defines).
#include "gemm/packed.h"
#include "simd/simd.h"

#if defined(HEDDLE_ARM_DOT)

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("dotprod"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("arch=armv8.2-a+dotprod")
#endif
namespace heddle {
namespace neon_sdot {
constexpr bool kMatrix = false;
HEDDLE_INLINE int32x4_t multiply_pairs(int32x4_t acc, int8x16_t, int8x16_t) { return acc; }  // never called
#include "gemm/neon_dot-inl.h"
}  // namespace neon_sdot
}  // namespace heddle
#if defined(__clang__)
#pragma clang attribute pop
#pragma clang attribute push(__attribute__((target("dotprod,i8mm"))), apply_to = function)
#else
#pragma GCC pop_options
#pragma GCC push_options
#pragma GCC target("arch=armv8.2-a+dotprod+i8mm")
#endif
namespace heddle {
namespace neon_smmla {
constexpr bool kMatrix = true;
HEDDLE_INLINE int32x4_t multiply_pairs(int32x4_t acc, int8x16_t rows, int8x16_t columns) {
  return vmmlaq_s32(acc, rows, columns);
}
#include "gemm/neon_dot-inl.h"
}  // namespace neon_smmla
}  // namespace heddle
#if defined(__clang__)
#pragma clang attribute pop
#pragma clang attribute push(__attribute__((target("bf16"))), apply_to = function)
#else
#pragma GCC pop_options
#pragma GCC push_options
#pragma GCC target("arch=armv8.2-a+bf16")
#endif
namespace heddle {
namespace neon_bfdot {
#include "gemm/kernels-inl.h"

template <int MR>
void tile_bf16(const TileCall& t) {
  constexpr int kVectors = 4;  // 16 columns at once
  const uint32_t* HEDDLE_RESTRICT a = static_cast<const uint32_t*>(t.a);
  for (int c0 = 0; c0 < kPanel; c0 += 4 * kVectors) {
    const char* HEDDLE_RESTRICT b = static_cast<const char*>(t.b) + c0 * 4;
    float32x4_t acc[MR][kVectors];
    HEDDLE_UNROLL(8)
    for (int m = 0; m < MR; ++m) {
      HEDDLE_UNROLL(4)
      for (int j = 0; j < kVectors; ++j) {
        acc[m][j] = t.accumulate ? vld1q_f32(t.c + m * kPanel + c0 + 4 * j) : vdupq_n_f32(0.0f);
      }
    }
    for (int64_t s = 0; s < t.steps; ++s) {
      if (c0 == 0 && (s & 1) == 0) prefetch_steps<2>(t, b, s);
      bfloat16x8_t w[kVectors];
      HEDDLE_UNROLL(4)
      for (int j = 0; j < kVectors; ++j) {
        w[j] = vreinterpretq_bf16_u8(vld1q_u8(reinterpret_cast<const uint8_t*>(b) + s * kStepBytes + 16 * j));
      }
      HEDDLE_UNROLL(8)
      for (int m = 0; m < MR; ++m) {
        const bfloat16x8_t x = vreinterpretq_bf16_u32(vdupq_n_u32(a[s * MR + m]));
        HEDDLE_UNROLL(4)
        for (int j = 0; j < kVectors; ++j) acc[m][j] = vbfdotq_f32(acc[m][j], w[j], x);
      }
    }
    HEDDLE_UNROLL(8)
    for (int m = 0; m < MR; ++m) {
      HEDDLE_UNROLL(4)
      for (int j = 0; j < kVectors; ++j) vst1q_f32(t.c + m * kPanel + c0 + 4 * j, acc[m][j]);
    }
  }
}

template <int MR>
struct BFloat16 {
  static void run(const TileCall& t) { tile_bf16<MR>(t); }
};

const TileKernels& dot_kernels() {
  static const TileKernels bf16 = make_kernels<BFloat16, 6>();
  return bf16;
}

}  // namespace neon_bfdot
}  // namespace heddle
#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#endif
