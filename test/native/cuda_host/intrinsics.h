// Test only: CUDA's scalar intrinsics and atomics. One thread runs at a time, so atomics are plain updates.
#pragma once

template <class T>
T atomicAdd(T* p, T v) {
  const T old = *p;
  *p = static_cast<T>(old + v);
  return old;
}
template <class T>
T atomicMin(T* p, T v) {
  const T old = *p;
  if (v < old) *p = v;
  return old;
}
template <class T>
T atomicMax(T* p, T v) {
  const T old = *p;
  if (v > old) *p = v;
  return old;
}
template <class T>
T atomicExch(T* p, T v) {
  const T old = *p;
  *p = v;
  return old;
}
template <class T>
T atomicOr(T* p, T v) {
  const T old = *p;
  *p = old | v;
  return old;
}
template <class T>
T atomicAnd(T* p, T v) {
  const T old = *p;
  *p = old & v;
  return old;
}
template <class T>
T atomicCAS(T* p, T expected, T v) {
  const T old = *p;
  if (old == expected) *p = v;
  return old;
}

inline int __float_as_int(float f) { return static_cast<int>(heddle::float_to_bits(f)); }
inline unsigned __float_as_uint(float f) { return heddle::float_to_bits(f); }
inline float __int_as_float(int i) { return heddle::bits_to_float(static_cast<uint32_t>(i)); }
inline float __uint_as_float(unsigned u) { return heddle::bits_to_float(u); }
inline int __popc(unsigned v) { return __builtin_popcount(v); }
inline int __popcll(unsigned long long v) { return __builtin_popcountll(v); }
inline int __ffs(int v) { return __builtin_ffs(v); }
inline int __ffsll(long long v) { return __builtin_ffsll(v); }
inline int __clz(int v) { return v == 0 ? 32 : __builtin_clz(static_cast<unsigned>(v)); }
inline unsigned __umulhi(unsigned a, unsigned b) { return static_cast<unsigned>((static_cast<uint64_t>(a) * b) >> 32); }
inline unsigned __byte_perm(unsigned x, unsigned y, unsigned selector) {
  const uint64_t bytes = static_cast<uint64_t>(y) << 32 | x;
  unsigned out = 0;
  for (int i = 0; i < 4; ++i) out |= static_cast<unsigned>(bytes >> (8 * (selector >> (4 * i) & 7u)) & 0xffu) << (8 * i);
  return out;
}
inline int __dp4a(int a, int b, int c) {
  for (int i = 0; i < 4; ++i) c += static_cast<int8_t>(a >> (8 * i)) * static_cast<int8_t>(b >> (8 * i));
  return c;
}
template <class T>
T __ldg(const T* p) {
  return *p;
}
inline void __threadfence() {}
inline float __expf(float x) { return std::exp(x); }
inline float __logf(float x) { return std::log(x); }
inline float __fdividef(float a, float b) { return a / b; }
inline float __fmaf_rn(float a, float b, float c) { return std::fma(a, b, c); }
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fdiv_rn(float a, float b) { return a / b; }
inline float __frcp_rn(float a) { return 1.0f / a; }
inline float rsqrtf(float x) { return 1.0f / std::sqrt(x); }
inline int min(int a, int b) { return a < b ? a : b; }
inline int max(int a, int b) { return a > b ? a : b; }
inline unsigned min(unsigned a, unsigned b) { return a < b ? a : b; }
inline unsigned max(unsigned a, unsigned b) { return a > b ? a : b; }
inline long min(long a, long b) { return a < b ? a : b; }
inline long max(long a, long b) { return a > b ? a : b; }
inline long long min(long long a, long long b) { return a < b ? a : b; }
inline long long max(long long a, long long b) { return a > b ? a : b; }
inline float min(float a, float b) { return std::fmin(a, b); }
inline float max(float a, float b) { return std::fmax(a, b); }

namespace cuda_host {
template <class T, bool Largest>
void run_extreme(void* const* lanes, uint32_t m) {
  bool first = true;
  T best{};
  for (int i = 0; i < 32; ++i) {
    if (!(m >> i & 1u)) continue;
    const T v = static_cast<Match<T>*>(lanes[i])->value;
    if (first || (Largest ? v > best : v < best)) best = v;
    first = false;
  }
  for (int i = 0; i < 32; ++i) {
    if (m >> i & 1u) static_cast<Match<T>*>(lanes[i])->value = best;
  }
}
template <class T>
void run_add(void* const* lanes, uint32_t m) {
  T sum{};
  for (int i = 0; i < 32; ++i) {
    if (m >> i & 1u) sum += static_cast<Match<T>*>(lanes[i])->value;
  }
  for (int i = 0; i < 32; ++i) {
    if (m >> i & 1u) static_cast<Match<T>*>(lanes[i])->value = sum;
  }
}
template <class T>
T reduce(uint32_t mask, T v, Collective run, int line) {
  Match<T> r{v, 0};
  collective(mask, run, &r, line);
  return r.value;
}
}  // namespace cuda_host

// Integers of 32 bits only, as on sm_80.
#define HEDDLE_HOST_REDUCE(T)                                                                     \
  inline T __reduce_max_sync(uint32_t mask, T v, int line = __builtin_LINE()) {                   \
    return cuda_host::reduce(mask, v, cuda_host::run_extreme<T, true>, line);                     \
  }                                                                                               \
  inline T __reduce_min_sync(uint32_t mask, T v, int line = __builtin_LINE()) {                   \
    return cuda_host::reduce(mask, v, cuda_host::run_extreme<T, false>, line);                    \
  }                                                                                               \
  inline T __reduce_add_sync(uint32_t mask, T v, int line = __builtin_LINE()) {                   \
    return cuda_host::reduce(mask, v, cuda_host::run_add<T>, line);                               \
  }
HEDDLE_HOST_REDUCE(int)
HEDDLE_HOST_REDUCE(unsigned)
#undef HEDDLE_HOST_REDUCE
