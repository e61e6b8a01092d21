// Element types and their scalar conversions. The numbers are shared with lib/dtype.ts.
#pragma once
#include <cstdint>
#include <cstring>

// Small functions that kernels on the device call as well.
#if defined(__CUDACC__)
#define HEDDLE_BOTH __host__ __device__
#else
#define HEDDLE_BOTH
#endif

namespace heddle {

enum class DType : int32_t {
  kFloat32 = 0,
  kFloat64 = 1,
  kFloat16 = 2,
  kBFloat16 = 3,
  kInt8 = 4,
  kUint8 = 5,
  kInt32 = 6,
  kInt64 = 7,
  kFloat8E4M3 = 8,
  kFloat8E5M2 = 9,
};

inline int64_t dtype_size(DType t) {
  constexpr int64_t size[] = {4, 8, 2, 2, 1, 1, 4, 8, 1, 1};
  return size[static_cast<int32_t>(t)];
}

inline float bits_to_float(uint32_t u) {
  float f;
  std::memcpy(&f, &u, 4);
  return f;
}

inline uint32_t float_to_bits(float f) {
  uint32_t u;
  std::memcpy(&u, &f, 4);
  return u;
}

inline float bf16_to_float(uint16_t h) { return bits_to_float(static_cast<uint32_t>(h) << 16); }

// Round to nearest, ties to even; a NaN stays a (quiet) NaN.
inline uint16_t float_to_bf16(float f) {
  uint32_t u = float_to_bits(f);
  if ((u & 0x7fffffffu) > 0x7f800000u) return static_cast<uint16_t>((u >> 16) | 0x40u);
  return static_cast<uint16_t>((u + 0x7fffu + ((u >> 16) & 1u)) >> 16);
}

inline float f16_to_float(uint16_t h) {
  const uint32_t sign = static_cast<uint32_t>(h & 0x8000u) << 16;
  const uint32_t magnitude = h & 0x7fffu;
  if (magnitude >= 0x7c00u) return bits_to_float(sign | 0x7f800000u | (magnitude & 0x3ffu) << 13);
  // Shifting the 5-bit exponent into the 8-bit field and scaling by 2^112 handles subnormals exactly.
  return bits_to_float(sign | float_to_bits(bits_to_float(magnitude << 13) * 0x1p112f));
}

// Round to nearest, ties to even; overflow goes to infinity; a NaN stays a NaN.
inline uint16_t float_to_f16(float f) {
  const uint32_t u = float_to_bits(f);
  const uint16_t sign = static_cast<uint16_t>((u >> 16) & 0x8000u);
  uint32_t a = u & 0x7fffffffu;
  if (a > 0x7f800000u) return static_cast<uint16_t>(sign | 0x7e00u);
  if (a >= 0x477ff000u) return static_cast<uint16_t>(sign | 0x7c00u);
  if (a < 0x38800000u) {  // subnormal half: let the FPU round by adding a power of two
    const float magic = bits_to_float(0x3f000000u);  // 0.5 = 2^-1: its ulp is 2^-24
    const uint32_t r = float_to_bits(bits_to_float(a) + magic) - 0x3f000000u;
    return static_cast<uint16_t>(sign | r);
  }
  a += 0xc8000fffu + ((a >> 13) & 1u);  // rebias by -112, round half to even
  return static_cast<uint16_t>(sign | (a >> 13));
}

// E4M3 (OCP 8-bit floating point): 4 exponent bits with bias 7, no infinities, largest 448, NaN 0x7f and 0xff.
inline float e4m3_to_float(uint8_t c) {
  const uint32_t sign = static_cast<uint32_t>(c & 0x80u) << 24;
  if ((c & 0x7fu) == 0x7fu) return bits_to_float(sign | 0x7fc00000u);
  // The 4-bit exponent in the 8-bit field, scaled by 2^(127 - 7): exact, subnormals included.
  return bits_to_float(sign | float_to_bits(bits_to_float(static_cast<uint32_t>(c & 0x7fu) << 20) * 0x1p120f));
}

// Round to nearest, ties to even; beyond 448 saturates; a NaN stays a NaN.
inline uint8_t float_to_e4m3(float f) {
  const uint32_t u = float_to_bits(f);
  const uint8_t sign = static_cast<uint8_t>(u >> 24 & 0x80u);
  uint32_t a = u & 0x7fffffffu;
  if (a > 0x7f800000u) return static_cast<uint8_t>(sign | 0x7fu);
  if (a >= 0x43e00000u) return static_cast<uint8_t>(sign | 0x7eu);
  if (a < 0x3c800000u) {  // below 2^-6, steps of 2^-9: the ulp of 2^14 is 2^-9
    return static_cast<uint8_t>(sign | (float_to_bits(bits_to_float(a) + 0x1p14f) - 0x46800000u));
  }
  a += 0x7ffffu + (a >> 20 & 1u);
  return static_cast<uint8_t>(sign | ((a >> 20) - (120u << 3)));
}

}  // namespace heddle
