// Opens the scalar region: one lane, no instruction beyond the platform's baseline. Close with simd/end.h.
#if defined(__clang__)
#pragma clang attribute push
#elif defined(__GNUC__)
#pragma GCC push_options
#endif
namespace heddle {
namespace scalar {
#define HEDDLE_REGION_ISA Isa::kScalar

using vf = float;
struct vi {  // a class of its own, so that integer lanes are never converted to float lanes by accident
  int32_t v;
};
struct vm {
  bool m;
};
constexpr int W = 1;

HEDDLE_INLINE vf set1(float x) { return x; }
HEDDLE_INLINE vi set1i(int32_t x) { return {x}; }
HEDDLE_INLINE vi iota() { return {0}; }
HEDDLE_INLINE vm first_n(int n) { return {n > 0}; }

HEDDLE_INLINE vf load(const float* p) { return *p; }
HEDDLE_INLINE void store(float* p, vf v) { *p = v; }
HEDDLE_INLINE vf load_n(const float* p, int n, float fill) { return n > 0 ? *p : fill; }
HEDDLE_INLINE void store_n(float* p, vf v, int n) {
  if (n > 0) *p = v;
}
HEDDLE_INLINE vi loadi(const int32_t* p) { return {*p}; }
HEDDLE_INLINE void storei(int32_t* p, vi v) { *p = v.v; }
HEDDLE_INLINE void storei_n(int32_t* p, vi v, int n) {
  if (n > 0) *p = v.v;
}
HEDDLE_INLINE vf load_bf16(const uint16_t* p) { return bf16_to_float(*p); }
HEDDLE_INLINE vf load_bf16_n(const uint16_t* p, int n) { return n > 0 ? bf16_to_float(*p) : 0.0f; }
HEDDLE_INLINE vf load_f16(const uint16_t* p) { return f16_to_float(*p); }
HEDDLE_INLINE vf load_f16_n(const uint16_t* p, int n) { return n > 0 ? f16_to_float(*p) : 0.0f; }
HEDDLE_INLINE void store_bf16(uint16_t* p, vf v) { *p = float_to_bf16(v); }
HEDDLE_INLINE void store_bf16_n(uint16_t* p, vf v, int n) {
  if (n > 0) *p = float_to_bf16(v);
}
HEDDLE_INLINE void store_f16(uint16_t* p, vf v) { *p = float_to_f16(v); }
HEDDLE_INLINE void store_f16_n(uint16_t* p, vf v, int n) {
  if (n > 0) *p = float_to_f16(v);
}

HEDDLE_INLINE vf add(vf a, vf b) { return a + b; }
HEDDLE_INLINE vf sub(vf a, vf b) { return a - b; }
HEDDLE_INLINE vf mul(vf a, vf b) { return a * b; }
HEDDLE_INLINE vf div(vf a, vf b) { return a / b; }
HEDDLE_INLINE vf fma(vf a, vf b, vf c) { return a * b + c; }
HEDDLE_INLINE vf fnma(vf a, vf b, vf c) { return c - a * b; }
HEDDLE_INLINE vf max(vf a, vf b) { return a > b ? a : b; }
HEDDLE_INLINE vf min(vf a, vf b) { return a < b ? a : b; }
HEDDLE_INLINE vf sqrt(vf a) { return ::sqrtf(a); }
HEDDLE_INLINE vf abs(vf a) { return ::fabsf(a); }
HEDDLE_INLINE vf neg(vf a) { return -a; }

HEDDLE_INLINE int32_t wrap(uint32_t x) { return static_cast<int32_t>(x); }
HEDDLE_INLINE vi addi(vi a, vi b) { return {wrap(static_cast<uint32_t>(a.v) + static_cast<uint32_t>(b.v))}; }
HEDDLE_INLINE vi subi(vi a, vi b) { return {wrap(static_cast<uint32_t>(a.v) - static_cast<uint32_t>(b.v))}; }
HEDDLE_INLINE vi andi(vi a, vi b) { return {a.v & b.v}; }
HEDDLE_INLINE vi ori(vi a, vi b) { return {a.v | b.v}; }
HEDDLE_INLINE vi xori(vi a, vi b) { return {a.v ^ b.v}; }
HEDDLE_INLINE vi maxi(vi a, vi b) { return a.v > b.v ? a : b; }
HEDDLE_INLINE vi mini(vi a, vi b) { return a.v < b.v ? a : b; }
template <int n> HEDDLE_INLINE vi shl(vi a) { return {wrap(static_cast<uint32_t>(a.v) << n)}; }
template <int n> HEDDLE_INLINE vi sra(vi a) { return {a.v >> n}; }
template <int n> HEDDLE_INLINE vi srl(vi a) { return {wrap(static_cast<uint32_t>(a.v) >> n)}; }

HEDDLE_INLINE vm lt(vf a, vf b) { return {a < b}; }
HEDDLE_INLINE vm le(vf a, vf b) { return {a <= b}; }
HEDDLE_INLINE vm gt(vf a, vf b) { return {a > b}; }
HEDDLE_INLINE vm ge(vf a, vf b) { return {a >= b}; }
HEDDLE_INLINE vm eq(vf a, vf b) { return {a == b}; }
HEDDLE_INLINE vm not_nan(vf a) { return {a == a}; }
HEDDLE_INLINE vm eqi(vi a, vi b) { return {a.v == b.v}; }
HEDDLE_INLINE vm gti(vi a, vi b) { return {a.v > b.v}; }
HEDDLE_INLINE vm mask_and(vm a, vm b) { return {a.m && b.m}; }
HEDDLE_INLINE vm mask_or(vm a, vm b) { return {a.m || b.m}; }
HEDDLE_INLINE vm mask_not(vm a) { return {!a.m}; }
HEDDLE_INLINE uint32_t mask_bits(vm m) { return m.m ? 1u : 0u; }
HEDDLE_INLINE vf select(vm m, vf a, vf b) { return m.m ? a : b; }
HEDDLE_INLINE vi select(vm m, vi a, vi b) { return m.m ? a : b; }

HEDDLE_INLINE vi as_int(vf a) { return {wrap(float_to_bits(a))}; }
HEDDLE_INLINE vf as_float(vi a) { return bits_to_float(static_cast<uint32_t>(a.v)); }
// Adding 1.5 * 2^23 rounds to nearest even in the low mantissa bits; exact for |a| < 2^22.
HEDDLE_INLINE vi to_int(vf a) { return {wrap(float_to_bits(a + 12582912.0f)) - 0x4b400000}; }
HEDDLE_INLINE vf to_float(vi a) { return static_cast<float>(a.v); }

HEDDLE_INLINE float reduce_add(vf v) { return v; }
HEDDLE_INLINE float reduce_max(vf v) { return v; }
HEDDLE_INLINE int32_t reduce_maxi(vi v) { return v.v; }
HEDDLE_INLINE int32_t reduce_mini(vi v) { return v.v; }
HEDDLE_INLINE vi spread_maxi(vi v) { return v; }
HEDDLE_INLINE vf reciprocal(vf d) { return 1.0f / d; }
template <int n> HEDDLE_INLINE vi rotl(vi a) { return ori(shl<n>(a), srl<32 - n>(a)); }
HEDDLE_INLINE void transpose(vf*) {}
