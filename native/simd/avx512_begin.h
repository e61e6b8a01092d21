// Opens the avx512 region (F, BW, DQ, VL). Close with simd/end.h. Re-includable, hence no include guard.
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c,bmi,bmi2"))), apply_to = function)
#elif defined(__GNUC__)
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c,bmi,bmi2,prefer-vector-width=512")
#endif
namespace heddle {
namespace avx512 {
#define HEDDLE_REGION_ISA Isa::kAvx512

using vf = __m512;
using vi = __m512i;
using vm = __mmask16;
constexpr int W = 16;

HEDDLE_INLINE vm first_n(int n) { return static_cast<vm>((1u << n) - 1u); }

HEDDLE_INLINE vf set1(float x) { return _mm512_set1_ps(x); }
HEDDLE_INLINE vi set1i(int32_t x) { return _mm512_set1_epi32(x); }
HEDDLE_INLINE vi iota() { return _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15); }

HEDDLE_INLINE vf load(const float* p) { return _mm512_loadu_ps(p); }
HEDDLE_INLINE void store(float* p, vf v) { _mm512_storeu_ps(p, v); }
HEDDLE_INLINE vf load_n(const float* p, int n, float fill) { return _mm512_mask_loadu_ps(set1(fill), first_n(n), p); }
HEDDLE_INLINE void store_n(float* p, vf v, int n) { _mm512_mask_storeu_ps(p, first_n(n), v); }
HEDDLE_INLINE vi loadi(const int32_t* p) { return _mm512_loadu_si512(p); }
HEDDLE_INLINE void storei(int32_t* p, vi v) { _mm512_storeu_si512(p, v); }
HEDDLE_INLINE void storei_n(int32_t* p, vi v, int n) { _mm512_mask_storeu_epi32(p, first_n(n), v); }

HEDDLE_INLINE vf widen_bf16(__m256i h) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(h), 16));
}
HEDDLE_INLINE vf load_bf16(const uint16_t* p) { return widen_bf16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))); }
HEDDLE_INLINE vf load_bf16_n(const uint16_t* p, int n) { return widen_bf16(_mm256_maskz_loadu_epi16(first_n(n), p)); }
HEDDLE_INLINE vf load_f16(const uint16_t* p) { return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))); }
HEDDLE_INLINE vf load_f16_n(const uint16_t* p, int n) { return _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(first_n(n), p)); }
HEDDLE_INLINE __m256i narrow_bf16(vf v) {
  const vi u = _mm512_castps_si512(v);
  const vi odd = _mm512_and_si512(_mm512_srli_epi32(u, 16), _mm512_set1_epi32(1));
  vi r = _mm512_add_epi32(u, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
  const vm nan = _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q);
  r = _mm512_mask_or_epi32(r, nan, u, _mm512_set1_epi32(0x400000));
  return _mm512_cvtepi32_epi16(_mm512_srli_epi32(r, 16));
}
HEDDLE_INLINE void store_bf16(uint16_t* p, vf v) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), narrow_bf16(v)); }
HEDDLE_INLINE void store_bf16_n(uint16_t* p, vf v, int n) { _mm256_mask_storeu_epi16(p, first_n(n), narrow_bf16(v)); }
HEDDLE_INLINE void store_f16(uint16_t* p, vf v) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}
HEDDLE_INLINE void store_f16_n(uint16_t* p, vf v, int n) {
  _mm256_mask_storeu_epi16(p, first_n(n), _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}

HEDDLE_INLINE vf add(vf a, vf b) { return _mm512_add_ps(a, b); }
HEDDLE_INLINE vf sub(vf a, vf b) { return _mm512_sub_ps(a, b); }
HEDDLE_INLINE vf mul(vf a, vf b) { return _mm512_mul_ps(a, b); }
HEDDLE_INLINE vf div(vf a, vf b) { return _mm512_div_ps(a, b); }
HEDDLE_INLINE vf fma(vf a, vf b, vf c) { return _mm512_fmadd_ps(a, b, c); }
HEDDLE_INLINE vf fnma(vf a, vf b, vf c) { return _mm512_fnmadd_ps(a, b, c); }
HEDDLE_INLINE vf max(vf a, vf b) { return _mm512_max_ps(a, b); }
HEDDLE_INLINE vf min(vf a, vf b) { return _mm512_min_ps(a, b); }
HEDDLE_INLINE vf sqrt(vf a) { return _mm512_sqrt_ps(a); }
HEDDLE_INLINE vf abs(vf a) { return _mm512_abs_ps(a); }
HEDDLE_INLINE vf neg(vf a) { return _mm512_xor_ps(a, _mm512_set1_ps(-0.0f)); }

HEDDLE_INLINE vi addi(vi a, vi b) { return _mm512_add_epi32(a, b); }
HEDDLE_INLINE vi subi(vi a, vi b) { return _mm512_sub_epi32(a, b); }
HEDDLE_INLINE vi andi(vi a, vi b) { return _mm512_and_si512(a, b); }
HEDDLE_INLINE vi ori(vi a, vi b) { return _mm512_or_si512(a, b); }
HEDDLE_INLINE vi xori(vi a, vi b) { return _mm512_xor_si512(a, b); }
HEDDLE_INLINE vi maxi(vi a, vi b) { return _mm512_max_epi32(a, b); }
HEDDLE_INLINE vi mini(vi a, vi b) { return _mm512_min_epi32(a, b); }
template <int n> HEDDLE_INLINE vi shl(vi a) { return _mm512_slli_epi32(a, n); }
template <int n> HEDDLE_INLINE vi sra(vi a) { return _mm512_srai_epi32(a, n); }
template <int n> HEDDLE_INLINE vi srl(vi a) { return _mm512_srli_epi32(a, n); }

HEDDLE_INLINE vm lt(vf a, vf b) { return _mm512_cmp_ps_mask(a, b, _CMP_LT_OQ); }
HEDDLE_INLINE vm le(vf a, vf b) { return _mm512_cmp_ps_mask(a, b, _CMP_LE_OQ); }
HEDDLE_INLINE vm gt(vf a, vf b) { return _mm512_cmp_ps_mask(a, b, _CMP_GT_OQ); }
HEDDLE_INLINE vm ge(vf a, vf b) { return _mm512_cmp_ps_mask(a, b, _CMP_GE_OQ); }
HEDDLE_INLINE vm eq(vf a, vf b) { return _mm512_cmp_ps_mask(a, b, _CMP_EQ_OQ); }
HEDDLE_INLINE vm not_nan(vf a) { return _mm512_cmp_ps_mask(a, a, _CMP_ORD_Q); }
HEDDLE_INLINE vm eqi(vi a, vi b) { return _mm512_cmpeq_epi32_mask(a, b); }
HEDDLE_INLINE vm gti(vi a, vi b) { return _mm512_cmpgt_epi32_mask(a, b); }
HEDDLE_INLINE vm mask_and(vm a, vm b) { return static_cast<vm>(a & b); }
HEDDLE_INLINE vm mask_or(vm a, vm b) { return static_cast<vm>(a | b); }
HEDDLE_INLINE vm mask_not(vm a) { return static_cast<vm>(~a); }
HEDDLE_INLINE uint32_t mask_bits(vm m) { return m; }
HEDDLE_INLINE vf select(vm m, vf a, vf b) { return _mm512_mask_blend_ps(m, b, a); }
HEDDLE_INLINE vi select(vm m, vi a, vi b) { return _mm512_mask_blend_epi32(m, b, a); }

HEDDLE_INLINE vi as_int(vf a) { return _mm512_castps_si512(a); }
HEDDLE_INLINE vf as_float(vi a) { return _mm512_castsi512_ps(a); }
HEDDLE_INLINE vi to_int(vf a) { return _mm512_cvtps_epi32(a); }
HEDDLE_INLINE vf to_float(vi a) { return _mm512_cvtepi32_ps(a); }

HEDDLE_INLINE float reduce_add(vf v) {
  const __m256 a = _mm256_add_ps(_mm512_castps512_ps256(v), _mm512_extractf32x8_ps(v, 1));
  const __m128 b = _mm_add_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
  const __m128 c = _mm_add_ps(b, _mm_movehl_ps(b, b));
  return _mm_cvtss_f32(_mm_add_ss(c, _mm_movehdup_ps(c)));
}
HEDDLE_INLINE float reduce_max(vf v) { return _mm512_reduce_max_ps(v); }
HEDDLE_INLINE int32_t reduce_maxi(vi v) { return _mm512_reduce_max_epi32(v); }
HEDDLE_INLINE int32_t reduce_mini(vi v) { return _mm512_reduce_min_epi32(v); }
// Every lane holds the largest lane: no round trip through a general register.
HEDDLE_INLINE vi spread_maxi(vi v) {
  v = maxi(v, _mm512_shuffle_i64x2(v, v, 0x4e));
  v = maxi(v, _mm512_shuffle_i64x2(v, v, 0xb1));
  v = maxi(v, _mm512_shuffle_epi32(v, static_cast<_MM_PERM_ENUM>(0x4e)));
  return maxi(v, _mm512_shuffle_epi32(v, static_cast<_MM_PERM_ENUM>(0xb1)));
}
// 1 / d to 1 ULP for normal, finite d: the 14-bit estimate and one Newton step cost 4 instructions where the division
// unit is busy for 16 cycles.
HEDDLE_INLINE vf reciprocal(vf d) {
  const vf r = _mm512_rcp14_ps(d);
  return fma(fnma(d, r, set1(1.0f)), r, r);
}
template <int n> HEDDLE_INLINE vi rotl(vi a) { return _mm512_rol_epi32(a, n); }
// Transposes W x W lanes in place.
HEDDLE_INLINE void transpose(vf* v) {
  __m512d p[16];
  HEDDLE_UNROLL(4)
  for (int i = 0; i < 16; i += 4) {
    const __m512d a = _mm512_castps_pd(_mm512_unpacklo_ps(v[i], v[i + 1]));
    const __m512d b = _mm512_castps_pd(_mm512_unpackhi_ps(v[i], v[i + 1]));
    const __m512d c = _mm512_castps_pd(_mm512_unpacklo_ps(v[i + 2], v[i + 3]));
    const __m512d d = _mm512_castps_pd(_mm512_unpackhi_ps(v[i + 2], v[i + 3]));
    p[i] = _mm512_unpacklo_pd(a, c);
    p[i + 1] = _mm512_unpackhi_pd(a, c);
    p[i + 2] = _mm512_unpacklo_pd(b, d);
    p[i + 3] = _mm512_unpackhi_pd(b, d);
  }
  HEDDLE_UNROLL(4)
  for (int j = 0; j < 4; ++j) {  // p[4i + j]: column 4l + j of rows 4i .. 4i + 3 in 128-bit part l
    const __m512d a = _mm512_shuffle_f64x2(p[j], p[4 + j], 0x88), b = _mm512_shuffle_f64x2(p[8 + j], p[12 + j], 0x88);
    const __m512d c = _mm512_shuffle_f64x2(p[j], p[4 + j], 0xdd), d = _mm512_shuffle_f64x2(p[8 + j], p[12 + j], 0xdd);
    v[j] = _mm512_castpd_ps(_mm512_shuffle_f64x2(a, b, 0x88));
    v[8 + j] = _mm512_castpd_ps(_mm512_shuffle_f64x2(a, b, 0xdd));
    v[4 + j] = _mm512_castpd_ps(_mm512_shuffle_f64x2(c, d, 0x88));
    v[12 + j] = _mm512_castpd_ps(_mm512_shuffle_f64x2(c, d, 0xdd));
  }
}
