// Tile products on avx512's dot product instructions: bf16 pairs (vdpbf16ps), int8 quads (vpdpbusd), and 4-bit
// weights unpacked to quads. Beside the avx512 region because Skylake-X and Cascade Lake lack some of these.
//
// bf16: one instruction multiplies two k and adds both to the fp32 chain (the pair is summed first, rounding to
// nearest even, subnormals flushed: the instruction's definition).
// int8: x is stored as q + 128 because vpdpbusd takes unsigned times signed; 128 * (sum of the column) is taken
// off at the end. 4 bits: the weight is the unsigned operand (nibble, or 2 * E2M1 + 12 from a 16-entry table) and
// x the signed one, so the offset (8 or the zero point, or 12) times the sum of x starts the accumulator of each group.
#include "gemm/packed.h"
#include "simd/simd.h"

#if defined(HEDDLE_TARGET_X86) && !(defined(__GNUC__) && !defined(__clang__) && __GNUC__ < 10)
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx512bf16,avx2,fma,f16c,bmi,bmi2"))), apply_to = function)
#elif defined(__GNUC__)
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx512bf16,avx2,fma,f16c,bmi,bmi2,prefer-vector-width=512")
#endif
namespace heddle {
namespace avx512_dot {

// GCC 12 surrounds the intrinsics with register copies (three instructions for one, measured at less than half
// the rate), so the accumulating forms are written out.
#if defined(__GNUC__) || defined(__clang__)
HEDDLE_INLINE void dot_u8s8(__m512i& acc, __m512i u, __m512i s) { __asm__("vpdpbusd %2, %1, %0" : "+v"(acc) : "v"(u), "v"(s)); }
HEDDLE_INLINE void dot_bf16(__m512& acc, __m512i a, __m512i b) { __asm__("vdpbf16ps %2, %1, %0" : "+v"(acc) : "v"(a), "v"(b)); }
#else
HEDDLE_INLINE void dot_u8s8(__m512i& acc, __m512i u, __m512i s) { acc = _mm512_dpbusd_epi32(acc, u, s); }
HEDDLE_INLINE void dot_bf16(__m512& acc, __m512i a, __m512i b) { acc = _mm512_dpbf16_ps(acc, (__m512bh)a, (__m512bh)b); }
#endif

#include "gemm/kernels-inl.h"

HEDDLE_INLINE __m512i widen_bytes(const uint8_t* p) {
  return _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
}

template <int MR>
void tile_bf16(const TileCall& t) {
  const char* HEDDLE_RESTRICT b = static_cast<const char*>(t.b);
  const int32_t* HEDDLE_RESTRICT a = static_cast<const int32_t*>(t.a);
  __m512 acc[MR][2];
  HEDDLE_UNROLL(16)
  for (int m = 0; m < MR; ++m) {
    acc[m][0] = t.accumulate ? _mm512_loadu_ps(t.c + m * kPanel) : _mm512_setzero_ps();
    acc[m][1] = t.accumulate ? _mm512_loadu_ps(t.c + m * kPanel + 16) : _mm512_setzero_ps();
  }
  for (int64_t s = 0; s < t.steps; ++s) {
    if ((s & 1) == 0) prefetch_steps<2>(t, b, s);
    const __m512i b0 = _mm512_loadu_si512(b + s * kStepBytes), b1 = _mm512_loadu_si512(b + s * kStepBytes + 64);
    HEDDLE_UNROLL(16)
    for (int m = 0; m < MR; ++m) {
      const __m512i x = _mm512_set1_epi32(a[s * MR + m]);
      dot_bf16(acc[m][0], x, b0);
      dot_bf16(acc[m][1], x, b1);
    }
  }
  HEDDLE_UNROLL(16)
  for (int m = 0; m < MR; ++m) {
    _mm512_storeu_ps(t.c + m * kPanel, acc[m][0]);
    _mm512_storeu_ps(t.c + m * kPanel + 16, acc[m][1]);
  }
}

template <int MR>
void tile_int8(const TileCall& t) {
  const char* HEDDLE_RESTRICT b = static_cast<const char*>(t.b);
  const int32_t* HEDDLE_RESTRICT a = static_cast<const int32_t*>(t.a);
  __m512i acc[MR][2];
  HEDDLE_UNROLL(16)
  for (int m = 0; m < MR; ++m) acc[m][0] = acc[m][1] = _mm512_setzero_si512();
  for (int64_t s = 0; s < t.steps; ++s) {
    if ((s & 1) == 0) prefetch_steps<2>(t, b, s);
    const __m512i b0 = _mm512_loadu_si512(b + s * kStepBytes), b1 = _mm512_loadu_si512(b + s * kStepBytes + 64);
    HEDDLE_UNROLL(16)
    for (int m = 0; m < MR; ++m) {
      const __m512i x = _mm512_set1_epi32(a[s * MR + m]);
      dot_u8s8(acc[m][0], x, b0);
      dot_u8s8(acc[m][1], x, b1);
    }
  }
  HEDDLE_UNROLL(2)
  for (int h = 0; h < 2; ++h) {
    const __m512i offset = _mm512_loadu_si512(t.b_sum + 16 * h);
    const __m512 scale = _mm512_loadu_ps(t.b_scale + 16 * h);
    HEDDLE_UNROLL(16)
    for (int m = 0; m < MR; ++m) {
      const __m512 v = _mm512_cvtepi32_ps(_mm512_sub_epi32(acc[m][h], offset));
      _mm512_storeu_ps(t.c + m * kPanel + 16 * h, _mm512_mul_ps(_mm512_mul_ps(v, _mm512_set1_ps(t.a_scale[m])), scale));
    }
  }
}

// 4-bit groups. The float sums of a group stay in c (L1): integer and float accumulators of 14 rows do not fit
// the registers together, and a group is long enough (4 steps or more) to pay for the round trip.
template <int MR, bool kTable>
void tile_4bit(const TileCall& t) {
  const char* HEDDLE_RESTRICT b = static_cast<const char*>(t.b);
  const int32_t* HEDDLE_RESTRICT a = static_cast<const int32_t*>(t.a);
  const __m512i low = _mm512_set1_epi8(15);
  // 2 * E2M1 + 12 by code.
  const __m512i table = _mm512_broadcast_i32x4(_mm_setr_epi8(12, 13, 14, 15, 16, 18, 20, 24, 12, 11, 10, 9, 8, 6, 4, 0));
  constexpr int32_t kOffset = kTable ? 12 : 8;
  HEDDLE_UNROLL(16)
  for (int m = 0; m < MR; ++m) {
    _mm512_storeu_ps(t.c + m * kPanel, _mm512_setzero_ps());
    _mm512_storeu_ps(t.c + m * kPanel + 16, _mm512_setzero_ps());
  }
  for (int64_t s0 = 0, g = 0; s0 < t.steps; s0 += t.group_steps, ++g) {
    const int64_t s1 = s0 + t.group_steps < t.steps ? s0 + t.group_steps : t.steps;
    __m512i acc[MR][2];
    if (!kTable && t.b_zero) {  // an offset per column
      const __m512i z0 = widen_bytes(t.b_zero + g * kPanel), z1 = widen_bytes(t.b_zero + g * kPanel + 16);
      HEDDLE_UNROLL(16)
      for (int m = 0; m < MR; ++m) {
        const __m512i sum = _mm512_set1_epi32(-t.a_sum[g * MR + m]);
        acc[m][0] = _mm512_mullo_epi32(z0, sum);
        acc[m][1] = _mm512_mullo_epi32(z1, sum);
      }
    } else {
      HEDDLE_UNROLL(16)
      for (int m = 0; m < MR; ++m) acc[m][0] = acc[m][1] = _mm512_set1_epi32(-kOffset * t.a_sum[g * MR + m]);
    }
    for (int64_t s = s0; s < s1; ++s) {
      if ((s & 1) == 0) prefetch_steps<2>(t, b, s);
      const __m512i w0 = _mm512_loadu_si512(b + s * kStepBytes), w1 = _mm512_loadu_si512(b + s * kStepBytes + 64);
      __m512i l0 = _mm512_and_si512(w0, low), l1 = _mm512_and_si512(w1, low);
      __m512i h0 = _mm512_and_si512(_mm512_srli_epi16(w0, 4), low), h1 = _mm512_and_si512(_mm512_srli_epi16(w1, 4), low);
      if (kTable) {
        l0 = _mm512_shuffle_epi8(table, l0), l1 = _mm512_shuffle_epi8(table, l1);
        h0 = _mm512_shuffle_epi8(table, h0), h1 = _mm512_shuffle_epi8(table, h1);
      }
      HEDDLE_UNROLL(16)
      for (int m = 0; m < MR; ++m) {
        const __m512i x = _mm512_set1_epi32(a[2 * s * MR + m]);
        dot_u8s8(acc[m][0], l0, x);
        dot_u8s8(acc[m][1], l1, x);
      }
      HEDDLE_UNROLL(16)
      for (int m = 0; m < MR; ++m) {
        const __m512i x = _mm512_set1_epi32(a[(2 * s + 1) * MR + m]);
        dot_u8s8(acc[m][0], h0, x);
        dot_u8s8(acc[m][1], h1, x);
      }
    }
    HEDDLE_UNROLL(2)
    for (int h = 0; h < 2; ++h) {
      __m512 scale;
      if (kTable) {  // 2^(e - 127) / 2: the exponent's bits, or for e = 0 and 1 a subnormal
        const __m512i e = widen_bytes(t.b_exponent + g * kPanel + 16 * h), one = _mm512_set1_epi32(1);
        const __m512i tiny = _mm512_sllv_epi32(_mm512_set1_epi32(0x00200000), _mm512_min_epi32(e, one));
        scale = _mm512_castsi512_ps(_mm512_max_epi32(_mm512_slli_epi32(_mm512_sub_epi32(e, one), 23), tiny));
      } else {
        scale = _mm512_loadu_ps(t.b_scale + g * kPanel + 16 * h);
      }
      HEDDLE_UNROLL(16)
      for (int m = 0; m < MR; ++m) {
        float* c = t.c + m * kPanel + 16 * h;
        const __m512 v = _mm512_mul_ps(_mm512_cvtepi32_ps(acc[m][h]), _mm512_set1_ps(t.a_scale[g * MR + m]));
        _mm512_storeu_ps(c, _mm512_fmadd_ps(v, scale, _mm512_loadu_ps(c)));
      }
    }
  }
}

constexpr int kTileRows = 14;
constexpr int kTileRows4Bit = 12;  // four unpacked vectors besides the accumulators

template <int MR>
struct Bf16 {
  static void run(const TileCall& t) { tile_bf16<MR>(t); }
};
template <int MR>
struct Int8 {
  static void run(const TileCall& t) { tile_int8<MR>(t); }
};
template <int MR>
struct Int4 {
  static void run(const TileCall& t) { tile_4bit<MR, false>(t); }
};
template <int MR>
struct Mxfp4 {
  static void run(const TileCall& t) { tile_4bit<MR, true>(t); }
};

const TileKernels& dot_kernels(PackType type) {
  static const TileKernels bf16 = make_kernels<Bf16, kTileRows>();
  static const TileKernels int8 = make_kernels<Int8, kTileRows>();
  static const TileKernels int4 = make_kernels<Int4, kTileRows4Bit>();
  static const TileKernels mxfp4 = make_kernels<Mxfp4, kTileRows4Bit>();
  switch (type) {
    case PackType::kInt8: return int8;
    case PackType::kInt4: return int4;
    case PackType::kMxfp4: return mxfp4;
    default: return bf16;
  }
}

}  // namespace avx512_dot
}  // namespace heddle
#if defined(__clang__)
#pragma clang attribute pop
#elif defined(__GNUC__)
#pragma GCC pop_options
#endif
#endif
