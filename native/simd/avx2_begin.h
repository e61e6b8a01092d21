// Opens the avx2 region (AVX2, FMA, F16C). Close with simd/end.h. Re-includable, hence no include guard.
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c,bmi,bmi2"))), apply_to = function)
#elif defined(__GNUC__)
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c,bmi,bmi2")
#endif
namespace heddle {
namespace avx2 {
#define HEDDLE_REGION_ISA Isa::kAvx2

using vf = __m256;
using vi = __m256i;
struct vm {  // a class of its own, so that a mask is never mistaken for integers
  __m256i m;
};
constexpr int W = 8;

HEDDLE_INLINE vf set1(float x) { return _mm256_set1_ps(x); }
HEDDLE_INLINE vi set1i(int32_t x) { return _mm256_set1_epi32(x); }
HEDDLE_INLINE vi iota() { return _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7); }
HEDDLE_INLINE vm first_n(int n) { return {_mm256_cmpgt_epi32(set1i(n), iota())}; }

HEDDLE_INLINE vf load(const float* p) { return _mm256_loadu_ps(p); }
HEDDLE_INLINE void store(float* p, vf v) { _mm256_storeu_ps(p, v); }
HEDDLE_INLINE vf load_n(const float* p, int n, float fill) {
  const __m256i m = first_n(n).m;
  return _mm256_blendv_ps(set1(fill), _mm256_maskload_ps(p, m), _mm256_castsi256_ps(m));
}
HEDDLE_INLINE void store_n(float* p, vf v, int n) { _mm256_maskstore_ps(p, first_n(n).m, v); }
HEDDLE_INLINE vi loadi(const int32_t* p) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)); }
HEDDLE_INLINE void storei(int32_t* p, vi v) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), v); }
HEDDLE_INLINE void storei_n(int32_t* p, vi v, int n) { _mm256_maskstore_epi32(p, first_n(n).m, v); }

HEDDLE_INLINE vf widen_bf16(__m128i h) { return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(h), 16)); }
HEDDLE_INLINE __m128i load_half_n(const uint16_t* p, int n) {
  alignas(16) uint16_t t[8] = {};
  for (int i = 0; i < n; ++i) t[i] = p[i];
  return _mm_load_si128(reinterpret_cast<const __m128i*>(t));
}
HEDDLE_INLINE void store_half_n(uint16_t* p, __m128i v, int n) {
  alignas(16) uint16_t t[8];
  _mm_store_si128(reinterpret_cast<__m128i*>(t), v);
  for (int i = 0; i < n; ++i) p[i] = t[i];
}
HEDDLE_INLINE vf load_bf16(const uint16_t* p) { return widen_bf16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))); }
HEDDLE_INLINE vf load_bf16_n(const uint16_t* p, int n) { return widen_bf16(load_half_n(p, n)); }
HEDDLE_INLINE vf load_f16(const uint16_t* p) { return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))); }
HEDDLE_INLINE vf load_f16_n(const uint16_t* p, int n) { return _mm256_cvtph_ps(load_half_n(p, n)); }
HEDDLE_INLINE __m128i narrow_bf16(vf v) {
  const vi u = _mm256_castps_si256(v);
  const vi odd = _mm256_and_si256(_mm256_srli_epi32(u, 16), set1i(1));
  const vi r = _mm256_add_epi32(u, _mm256_add_epi32(odd, set1i(0x7fff)));
  const __m256 nan = _mm256_cmp_ps(v, v, _CMP_UNORD_Q);
  const vi q = _mm256_or_si256(u, set1i(0x400000));
  const vi s = _mm256_srli_epi32(_mm256_castps_si256(_mm256_blendv_ps(_mm256_castsi256_ps(r), _mm256_castsi256_ps(q), nan)), 16);
  return _mm_packus_epi32(_mm256_castsi256_si128(s), _mm256_extracti128_si256(s, 1));
}
HEDDLE_INLINE void store_bf16(uint16_t* p, vf v) { _mm_storeu_si128(reinterpret_cast<__m128i*>(p), narrow_bf16(v)); }
HEDDLE_INLINE void store_bf16_n(uint16_t* p, vf v, int n) { store_half_n(p, narrow_bf16(v), n); }
HEDDLE_INLINE __m128i narrow_f16(vf v) { return _mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
HEDDLE_INLINE void store_f16(uint16_t* p, vf v) { _mm_storeu_si128(reinterpret_cast<__m128i*>(p), narrow_f16(v)); }
HEDDLE_INLINE void store_f16_n(uint16_t* p, vf v, int n) { store_half_n(p, narrow_f16(v), n); }

HEDDLE_INLINE vf add(vf a, vf b) { return _mm256_add_ps(a, b); }
HEDDLE_INLINE vf sub(vf a, vf b) { return _mm256_sub_ps(a, b); }
HEDDLE_INLINE vf mul(vf a, vf b) { return _mm256_mul_ps(a, b); }
HEDDLE_INLINE vf div(vf a, vf b) { return _mm256_div_ps(a, b); }
HEDDLE_INLINE vf fma(vf a, vf b, vf c) { return _mm256_fmadd_ps(a, b, c); }
HEDDLE_INLINE vf fnma(vf a, vf b, vf c) { return _mm256_fnmadd_ps(a, b, c); }
HEDDLE_INLINE vf max(vf a, vf b) { return _mm256_max_ps(a, b); }
HEDDLE_INLINE vf min(vf a, vf b) { return _mm256_min_ps(a, b); }
HEDDLE_INLINE vf sqrt(vf a) { return _mm256_sqrt_ps(a); }
HEDDLE_INLINE vf abs(vf a) { return _mm256_andnot_ps(set1(-0.0f), a); }
HEDDLE_INLINE vf neg(vf a) { return _mm256_xor_ps(a, set1(-0.0f)); }

HEDDLE_INLINE vi addi(vi a, vi b) { return _mm256_add_epi32(a, b); }
HEDDLE_INLINE vi subi(vi a, vi b) { return _mm256_sub_epi32(a, b); }
HEDDLE_INLINE vi andi(vi a, vi b) { return _mm256_and_si256(a, b); }
HEDDLE_INLINE vi ori(vi a, vi b) { return _mm256_or_si256(a, b); }
HEDDLE_INLINE vi xori(vi a, vi b) { return _mm256_xor_si256(a, b); }
HEDDLE_INLINE vi maxi(vi a, vi b) { return _mm256_max_epi32(a, b); }
HEDDLE_INLINE vi mini(vi a, vi b) { return _mm256_min_epi32(a, b); }
template <int n> HEDDLE_INLINE vi shl(vi a) { return _mm256_slli_epi32(a, n); }
template <int n> HEDDLE_INLINE vi sra(vi a) { return _mm256_srai_epi32(a, n); }
template <int n> HEDDLE_INLINE vi srl(vi a) { return _mm256_srli_epi32(a, n); }

HEDDLE_INLINE vm to_mask(__m256 m) { return {_mm256_castps_si256(m)}; }
HEDDLE_INLINE vm lt(vf a, vf b) { return to_mask(_mm256_cmp_ps(a, b, _CMP_LT_OQ)); }
HEDDLE_INLINE vm le(vf a, vf b) { return to_mask(_mm256_cmp_ps(a, b, _CMP_LE_OQ)); }
HEDDLE_INLINE vm gt(vf a, vf b) { return to_mask(_mm256_cmp_ps(a, b, _CMP_GT_OQ)); }
HEDDLE_INLINE vm ge(vf a, vf b) { return to_mask(_mm256_cmp_ps(a, b, _CMP_GE_OQ)); }
HEDDLE_INLINE vm eq(vf a, vf b) { return to_mask(_mm256_cmp_ps(a, b, _CMP_EQ_OQ)); }
HEDDLE_INLINE vm not_nan(vf a) { return to_mask(_mm256_cmp_ps(a, a, _CMP_ORD_Q)); }
HEDDLE_INLINE vm eqi(vi a, vi b) { return {_mm256_cmpeq_epi32(a, b)}; }
HEDDLE_INLINE vm gti(vi a, vi b) { return {_mm256_cmpgt_epi32(a, b)}; }
HEDDLE_INLINE vm mask_and(vm a, vm b) { return {_mm256_and_si256(a.m, b.m)}; }
HEDDLE_INLINE vm mask_or(vm a, vm b) { return {_mm256_or_si256(a.m, b.m)}; }
HEDDLE_INLINE vm mask_not(vm a) { return {_mm256_xor_si256(a.m, set1i(-1))}; }
HEDDLE_INLINE uint32_t mask_bits(vm m) { return static_cast<uint32_t>(_mm256_movemask_ps(_mm256_castsi256_ps(m.m))); }
HEDDLE_INLINE vf select(vm m, vf a, vf b) { return _mm256_blendv_ps(b, a, _mm256_castsi256_ps(m.m)); }
HEDDLE_INLINE vi select(vm m, vi a, vi b) { return _mm256_blendv_epi8(b, a, m.m); }

HEDDLE_INLINE vi as_int(vf a) { return _mm256_castps_si256(a); }
HEDDLE_INLINE vf as_float(vi a) { return _mm256_castsi256_ps(a); }
HEDDLE_INLINE vi to_int(vf a) { return _mm256_cvtps_epi32(a); }
HEDDLE_INLINE vf to_float(vi a) { return _mm256_cvtepi32_ps(a); }

HEDDLE_INLINE float reduce_add(vf v) {
  const __m128 b = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
  const __m128 c = _mm_add_ps(b, _mm_movehl_ps(b, b));
  return _mm_cvtss_f32(_mm_add_ss(c, _mm_movehdup_ps(c)));
}
HEDDLE_INLINE float reduce_max(vf v) {
  const __m128 b = _mm_max_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
  const __m128 c = _mm_max_ps(b, _mm_movehl_ps(b, b));
  return _mm_cvtss_f32(_mm_max_ss(c, _mm_movehdup_ps(c)));
}
HEDDLE_INLINE int32_t reduce_maxi(vi v) {
  const __m128i b = _mm_max_epi32(_mm256_castsi256_si128(v), _mm256_extracti128_si256(v, 1));
  const __m128i c = _mm_max_epi32(b, _mm_shuffle_epi32(b, 0x4e));
  return _mm_cvtsi128_si32(_mm_max_epi32(c, _mm_shuffle_epi32(c, 0xb1)));
}
HEDDLE_INLINE int32_t reduce_mini(vi v) {
  const __m128i b = _mm_min_epi32(_mm256_castsi256_si128(v), _mm256_extracti128_si256(v, 1));
  const __m128i c = _mm_min_epi32(b, _mm_shuffle_epi32(b, 0x4e));
  return _mm_cvtsi128_si32(_mm_min_epi32(c, _mm_shuffle_epi32(c, 0xb1)));
}
// Every lane holds the largest lane: no round trip through a general register.
HEDDLE_INLINE vi spread_maxi(vi v) {
  v = maxi(v, _mm256_permute2x128_si256(v, v, 1));
  v = maxi(v, _mm256_shuffle_epi32(v, 0x4e));
  return maxi(v, _mm256_shuffle_epi32(v, 0xb1));
}
HEDDLE_INLINE vf reciprocal(vf d) { return div(set1(1.0f), d); }
template <int n> HEDDLE_INLINE vi rotl(vi a) {
  return _mm256_or_si256(_mm256_slli_epi32(a, n), _mm256_srli_epi32(a, 32 - n));
}
// Transposes W x W lanes in place.
HEDDLE_INLINE void transpose(vf* v) {
  __m256 p[8];
  HEDDLE_UNROLL(2)
  for (int i = 0; i < 8; i += 4) {
    const __m256d a = _mm256_castps_pd(_mm256_unpacklo_ps(v[i], v[i + 1]));
    const __m256d b = _mm256_castps_pd(_mm256_unpackhi_ps(v[i], v[i + 1]));
    const __m256d c = _mm256_castps_pd(_mm256_unpacklo_ps(v[i + 2], v[i + 3]));
    const __m256d d = _mm256_castps_pd(_mm256_unpackhi_ps(v[i + 2], v[i + 3]));
    p[i] = _mm256_castpd_ps(_mm256_unpacklo_pd(a, c));
    p[i + 1] = _mm256_castpd_ps(_mm256_unpackhi_pd(a, c));
    p[i + 2] = _mm256_castpd_ps(_mm256_unpacklo_pd(b, d));
    p[i + 3] = _mm256_castpd_ps(_mm256_unpackhi_pd(b, d));
  }
  HEDDLE_UNROLL(4)
  for (int j = 0; j < 4; ++j) {
    v[j] = _mm256_permute2f128_ps(p[j], p[4 + j], 0x20);
    v[4 + j] = _mm256_permute2f128_ps(p[j], p[4 + j], 0x31);
  }
}
