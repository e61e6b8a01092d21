// bf16 products of avx512 (vdpbf16ps): two per lane and instruction. Used only where the CPU has them.
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512bf16"))), apply_to = function)
#elif defined(__GNUC__)
#pragma GCC push_options
#pragma GCC target("avx512bf16")
#endif
namespace paired {

constexpr int kPair = 2;

HEDDLE_INLINE vf mac(vf x, vf b, vf sum) {
  return _mm512_dpbf16_ps(sum, (__m512bh)_mm512_castps_si512(x), (__m512bh)_mm512_castps_si512(b));
}
HEDDLE_INLINE vf load_steps(const Vectors& x, int64_t at, int d) {
  if (at < 0) return set1(0.0f);
  const uint16_t* p = static_cast<const uint16_t*>(x.data) + at;
  const int n = x.dim - d;
  if (x.element_stride == 1) {
    const __mmask32 m = n >= 32 ? 0xffffffffu : (1u << n) - 1u;
    return _mm512_castsi512_ps(_mm512_maskz_loadu_epi16(m, p + d));
  }
  alignas(64) uint16_t t[32] = {};
  for (int i = 0; i < 32 && i < n; ++i) t[i] = p[(d + i) * x.element_stride];
  return _mm512_castsi512_ps(_mm512_load_si512(t));
}
HEDDLE_INLINE vf interleave(const Vectors& x, const int64_t* at, int c, vf* check) {
  const vf even = load_lanes(x, at[0], c), odd = load_lanes(x, at[1], c);
  *check = fma(even, set1(0.0f), *check);
  *check = fma(odd, set1(0.0f), *check);
  return as_float(ori(srl<16>(as_int(even)), as_int(odd)));  // widened bf16: the low halves are 0
}
HEDDLE_INLINE vf keep_weighted(float x, vf b) {
  const uint32_t pair = float_to_bits(x);
  const uint32_t keep = ((pair & 0x7fffu) ? 0xffffu : 0u) | ((pair & 0x7fff0000u) ? 0xffff0000u : 0u);
  return as_float(andi(as_int(b), set1i(static_cast<int32_t>(keep))));
}
// In place: the bytes written lie below those still to be read.
HEDDLE_INLINE void store_weights(float* row, int j, vf e) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(reinterpret_cast<uint16_t*>(row) + j),
                      (__m256i)_mm512_cvtneps_pbh(e));
}

#include "attention/micro-inl.h"

}  // namespace paired
#if defined(__clang__)
#pragma clang attribute pop
#elif defined(__GNUC__)
#pragma GCC pop_options
#endif
