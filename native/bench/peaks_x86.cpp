// Peaks of the dot-product instructions, which have no place in the common vocabulary.
#include "bench/peaks.h"
#include "simd/simd.h"

#if defined(__GNUC__) || defined(__clang__)
#define HEDDLE_TARGET(x) __attribute__((target(x)))
#else
#define HEDDLE_TARGET(x)
#endif

namespace heddle {

#if defined(HEDDLE_TARGET_X86)
namespace {

constexpr int kChains = 12;

HEDDLE_TARGET("avx512f,avx512bw,avx512vl,avx512bf16") float bf16_512(int64_t iterations) {
  __m512 acc[kChains];
  for (int j = 0; j < kChains; ++j) acc[j] = _mm512_set1_ps(static_cast<float>(j));
  const __m512bh a = _mm512_cvtne2ps_pbh(_mm512_set1_ps(0.5f), _mm512_set1_ps(-0.5f));
  const __m512bh b = _mm512_cvtne2ps_pbh(_mm512_set1_ps(0.25f), _mm512_set1_ps(0.25f));
  for (int64_t i = 0; i < iterations; ++i) {
    HEDDLE_UNROLL(12)
    for (int j = 0; j < kChains; ++j) acc[j] = _mm512_dpbf16_ps(acc[j], a, b);
  }
  for (int j = 1; j < kChains; ++j) acc[0] = _mm512_add_ps(acc[0], acc[j]);
  return _mm512_cvtss_f32(acc[0]);
}

HEDDLE_TARGET("avx512f,avx512bw,avx512vnni") float int8_512(int64_t iterations) {
  __m512i acc[kChains];
  for (int j = 0; j < kChains; ++j) acc[j] = _mm512_set1_epi32(j);
  const __m512i a = _mm512_set1_epi8(3);
  const __m512i b = _mm512_set1_epi8(-2);
  for (int64_t i = 0; i < iterations; ++i) {
    HEDDLE_UNROLL(12)
    for (int j = 0; j < kChains; ++j) acc[j] = _mm512_dpbusd_epi32(acc[j], a, b);
  }
  for (int j = 1; j < kChains; ++j) acc[0] = _mm512_xor_si512(acc[0], acc[j]);
  return static_cast<float>(_mm_cvtsi128_si32(_mm512_castsi512_si128(acc[0])));
}

#if (defined(__clang__) && __clang_major__ >= 12) || (!defined(__clang__) && defined(__GNUC__) && __GNUC__ >= 11) || \
    (defined(_MSC_VER) && !defined(__clang__))
#define HEDDLE_HAS_AVX_VNNI 1
HEDDLE_TARGET("avx2,avxvnni") float int8_256(int64_t iterations) {
  __m256i acc[kChains];
  for (int j = 0; j < kChains; ++j) acc[j] = _mm256_set1_epi32(j);
  const __m256i a = _mm256_set1_epi8(3);
  const __m256i b = _mm256_set1_epi8(-2);
  for (int64_t i = 0; i < iterations; ++i) {
    HEDDLE_UNROLL(12)
    for (int j = 0; j < kChains; ++j) acc[j] = _mm256_dpbusd_avx_epi32(acc[j], a, b);
  }
  for (int j = 1; j < kChains; ++j) acc[0] = _mm256_xor_si256(acc[0], acc[j]);
  return static_cast<float>(_mm_cvtsi128_si32(_mm256_castsi256_si128(acc[0])));
}
#endif

}  // namespace

PeakArithmetic peak_bf16(Isa isa) {
  if (isa == Isa::kAvx512 && cpu_features().avx512_bf16) return {bf16_512, 2.0 * 32 * kChains};
  return {};
}

PeakArithmetic peak_int8(Isa isa) {
  if (isa == Isa::kAvx512 && cpu_features().avx512_vnni) return {int8_512, 2.0 * 64 * kChains};
#if defined(HEDDLE_HAS_AVX_VNNI)
  if (isa == Isa::kAvx2 && cpu_features().avx_vnni) return {int8_256, 2.0 * 32 * kChains};
#endif
  return {};
}

#else

PeakArithmetic peak_bf16(Isa) { return {}; }
PeakArithmetic peak_int8(Isa) { return {}; }

#endif

}  // namespace heddle
