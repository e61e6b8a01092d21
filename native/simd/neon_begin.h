// Opens the neon region (baseline of 64-bit Arm). Close with simd/end.h. Re-includable, hence no include guard.
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("neon"))), apply_to = function)
#elif defined(__GNUC__)
#pragma GCC push_options
#endif
namespace heddle {
namespace neon {
#define HEDDLE_REGION_ISA Isa::kNeon

using vf = float32x4_t;
using vi = int32x4_t;
using vm = uint32x4_t;
constexpr int W = 4;

HEDDLE_INLINE vf set1(float x) { return vdupq_n_f32(x); }
HEDDLE_INLINE vi set1i(int32_t x) { return vdupq_n_s32(x); }
HEDDLE_INLINE vi iota() {
  const int32_t v[4] = {0, 1, 2, 3};
  return vld1q_s32(v);
}
HEDDLE_INLINE vm first_n(int n) { return vcgtq_s32(set1i(n), iota()); }

HEDDLE_INLINE vf load(const float* p) { return vld1q_f32(p); }
HEDDLE_INLINE void store(float* p, vf v) { vst1q_f32(p, v); }
HEDDLE_INLINE vf load_n(const float* p, int n, float fill) {
  float t[4] = {fill, fill, fill, fill};
  for (int i = 0; i < n; ++i) t[i] = p[i];
  return vld1q_f32(t);
}
HEDDLE_INLINE void store_n(float* p, vf v, int n) {
  float t[4];
  vst1q_f32(t, v);
  for (int i = 0; i < n; ++i) p[i] = t[i];
}
HEDDLE_INLINE vi loadi(const int32_t* p) { return vld1q_s32(p); }
HEDDLE_INLINE void storei(int32_t* p, vi v) { vst1q_s32(p, v); }
HEDDLE_INLINE void storei_n(int32_t* p, vi v, int n) {
  int32_t t[4];
  vst1q_s32(t, v);
  for (int i = 0; i < n; ++i) p[i] = t[i];
}

HEDDLE_INLINE uint16x4_t load_half_n(const uint16_t* p, int n) {
  uint16_t t[4] = {0, 0, 0, 0};
  for (int i = 0; i < n; ++i) t[i] = p[i];
  return vld1_u16(t);
}
HEDDLE_INLINE void store_half_n(uint16_t* p, uint16x4_t v, int n) {
  uint16_t t[4];
  vst1_u16(t, v);
  for (int i = 0; i < n; ++i) p[i] = t[i];
}
HEDDLE_INLINE vf widen_bf16(uint16x4_t h) { return vreinterpretq_f32_u32(vshll_n_u16(h, 16)); }
HEDDLE_INLINE vf load_bf16(const uint16_t* p) { return widen_bf16(vld1_u16(p)); }
HEDDLE_INLINE vf load_bf16_n(const uint16_t* p, int n) { return widen_bf16(load_half_n(p, n)); }
HEDDLE_INLINE vf load_f16(const uint16_t* p) { return vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(p))); }
HEDDLE_INLINE vf load_f16_n(const uint16_t* p, int n) { return vcvt_f32_f16(vreinterpret_f16_u16(load_half_n(p, n))); }
HEDDLE_INLINE uint16x4_t narrow_bf16(vf v) {
  const uint32x4_t u = vreinterpretq_u32_f32(v);
  const uint32x4_t odd = vandq_u32(vshrq_n_u32(u, 16), vdupq_n_u32(1));
  const uint32x4_t r = vaddq_u32(u, vaddq_u32(odd, vdupq_n_u32(0x7fff)));
  const uint32x4_t ordered = vceqq_f32(v, v);
  return vshrn_n_u32(vbslq_u32(ordered, r, vorrq_u32(u, vdupq_n_u32(0x400000))), 16);
}
HEDDLE_INLINE void store_bf16(uint16_t* p, vf v) { vst1_u16(p, narrow_bf16(v)); }
HEDDLE_INLINE void store_bf16_n(uint16_t* p, vf v, int n) { store_half_n(p, narrow_bf16(v), n); }
HEDDLE_INLINE void store_f16(uint16_t* p, vf v) { vst1_u16(p, vreinterpret_u16_f16(vcvt_f16_f32(v))); }
HEDDLE_INLINE void store_f16_n(uint16_t* p, vf v, int n) { store_half_n(p, vreinterpret_u16_f16(vcvt_f16_f32(v)), n); }

HEDDLE_INLINE vf add(vf a, vf b) { return vaddq_f32(a, b); }
HEDDLE_INLINE vf sub(vf a, vf b) { return vsubq_f32(a, b); }
HEDDLE_INLINE vf mul(vf a, vf b) { return vmulq_f32(a, b); }
HEDDLE_INLINE vf div(vf a, vf b) { return vdivq_f32(a, b); }
HEDDLE_INLINE vf fma(vf a, vf b, vf c) { return vfmaq_f32(c, a, b); }
HEDDLE_INLINE vf fnma(vf a, vf b, vf c) { return vfmsq_f32(c, a, b); }
HEDDLE_INLINE vf max(vf a, vf b) { return vbslq_f32(vcgtq_f32(a, b), a, b); }
HEDDLE_INLINE vf min(vf a, vf b) { return vbslq_f32(vcltq_f32(a, b), a, b); }
HEDDLE_INLINE vf sqrt(vf a) { return vsqrtq_f32(a); }
HEDDLE_INLINE vf abs(vf a) { return vabsq_f32(a); }
HEDDLE_INLINE vf neg(vf a) { return vnegq_f32(a); }

HEDDLE_INLINE vi addi(vi a, vi b) { return vaddq_s32(a, b); }
HEDDLE_INLINE vi subi(vi a, vi b) { return vsubq_s32(a, b); }
HEDDLE_INLINE vi andi(vi a, vi b) { return vandq_s32(a, b); }
HEDDLE_INLINE vi ori(vi a, vi b) { return vorrq_s32(a, b); }
HEDDLE_INLINE vi xori(vi a, vi b) { return veorq_s32(a, b); }
HEDDLE_INLINE vi maxi(vi a, vi b) { return vmaxq_s32(a, b); }
HEDDLE_INLINE vi mini(vi a, vi b) { return vminq_s32(a, b); }
template <int n> HEDDLE_INLINE vi shl(vi a) { return vshlq_n_s32(a, n); }
template <int n> HEDDLE_INLINE vi sra(vi a) { return vshrq_n_s32(a, n); }
template <int n> HEDDLE_INLINE vi srl(vi a) { return vreinterpretq_s32_u32(vshrq_n_u32(vreinterpretq_u32_s32(a), n)); }

HEDDLE_INLINE vm lt(vf a, vf b) { return vcltq_f32(a, b); }
HEDDLE_INLINE vm le(vf a, vf b) { return vcleq_f32(a, b); }
HEDDLE_INLINE vm gt(vf a, vf b) { return vcgtq_f32(a, b); }
HEDDLE_INLINE vm ge(vf a, vf b) { return vcgeq_f32(a, b); }
HEDDLE_INLINE vm eq(vf a, vf b) { return vceqq_f32(a, b); }
HEDDLE_INLINE vm not_nan(vf a) { return vceqq_f32(a, a); }
HEDDLE_INLINE vm eqi(vi a, vi b) { return vceqq_s32(a, b); }
HEDDLE_INLINE vm gti(vi a, vi b) { return vcgtq_s32(a, b); }
HEDDLE_INLINE vm mask_and(vm a, vm b) { return vandq_u32(a, b); }
HEDDLE_INLINE vm mask_or(vm a, vm b) { return vorrq_u32(a, b); }
HEDDLE_INLINE vm mask_not(vm a) { return vmvnq_u32(a); }
HEDDLE_INLINE uint32_t mask_bits(vm m) {
  const uint32_t w[4] = {1, 2, 4, 8};
  return vaddvq_u32(vandq_u32(m, vld1q_u32(w)));
}
HEDDLE_INLINE vf select(vm m, vf a, vf b) { return vbslq_f32(m, a, b); }
HEDDLE_INLINE vi select(vm m, vi a, vi b) { return vbslq_s32(m, a, b); }

HEDDLE_INLINE vi as_int(vf a) { return vreinterpretq_s32_f32(a); }
HEDDLE_INLINE vf as_float(vi a) { return vreinterpretq_f32_s32(a); }
HEDDLE_INLINE vi to_int(vf a) { return vcvtnq_s32_f32(a); }
HEDDLE_INLINE vf to_float(vi a) { return vcvtq_f32_s32(a); }

HEDDLE_INLINE float reduce_add(vf v) { return vaddvq_f32(v); }
HEDDLE_INLINE float reduce_max(vf v) { return vmaxvq_f32(v); }
HEDDLE_INLINE int32_t reduce_maxi(vi v) { return vmaxvq_s32(v); }
HEDDLE_INLINE int32_t reduce_mini(vi v) { return vminvq_s32(v); }
HEDDLE_INLINE vi spread_maxi(vi v) { return vdupq_n_s32(vmaxvq_s32(v)); }
HEDDLE_INLINE vf reciprocal(vf d) { return div(set1(1.0f), d); }
template <int n> HEDDLE_INLINE vi rotl(vi a) {
  const uint32x4_t u = vreinterpretq_u32_s32(a);
  return vreinterpretq_s32_u32(vsriq_n_u32(vshlq_n_u32(u, n), u, 32 - n));
}
// Transposes W x W lanes in place.
HEDDLE_INLINE void transpose(vf* v) {
  const float32x4x2_t a = vtrnq_f32(v[0], v[1]), b = vtrnq_f32(v[2], v[3]);
  v[0] = vcombine_f32(vget_low_f32(a.val[0]), vget_low_f32(b.val[0]));
  v[1] = vcombine_f32(vget_low_f32(a.val[1]), vget_low_f32(b.val[1]));
  v[2] = vcombine_f32(vget_high_f32(a.val[0]), vget_high_f32(b.val[0]));
  v[3] = vcombine_f32(vget_high_f32(a.val[1]), vget_high_f32(b.val[1]));
}
