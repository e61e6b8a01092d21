// Quantisers, column by column. The formulas are the reference's (lib/reference/gemm/quantize.ts), in float32 with
// the same order of operations, so that both arrive at the same integers.
//
//   int8:  scale = max|w| / 127 per output;             q = round(w / scale)
//   int4:  scale = max|w| / 7 per group of k;           q = clamp(round(w / scale), -8, 7), stored as q + 8
//   MXFP4: exponent = floor(log2(max|w|)) - 2 per 32 k (OCP MX 1.0); q = nearest E2M1 value of w / 2^exponent
// round = to nearest, ties to even. A group of zeros has scale 0 (exponent 0) and q = 0.
#pragma once
#include <cmath>

#include "gemm/packed.h"

namespace heddle {

inline int round_even(float x) { return static_cast<int>(std::nearbyint(x)); }

// Index of the E2M1 code {0, .5, 1, 1.5, 2, 3, 4, 6} nearest to |x|, ties to the even code; sign in bit 3.
inline int to_e2m1(float x) {
  const float a = std::fabs(x);
  int code;
  if (a <= 0.25f) code = 0;
  else if (a < 0.75f) code = 1;
  else if (a <= 1.25f) code = 2;
  else if (a < 1.75f) code = 3;
  else if (a <= 2.5f) code = 4;
  else if (a < 3.5f) code = 5;
  else if (a <= 5.0f) code = 6;
  else code = 7;
  return code | (std::signbit(x) ? 8 : 0);
}

template <class At>
void quantize_column(PackedMatrix& m, int64_t p, int c, const At& at) {
  const int64_t padded = m.steps * pack_unit(m.type);
  unsigned char* data = m.data.as<unsigned char>() + p * m.steps * kStepBytes;
  const int64_t group = m.group ? m.group : padded;
  for (int64_t g = 0; g * group < padded; ++g) {
    const int64_t begin = g * group, end = begin + group < padded ? begin + group : padded;
    float amax = 0.0f;
    for (int64_t i = begin; i < end; ++i) amax = std::fmax(amax, std::fabs(at(i)));
    const int64_t slot = (p * m.groups() + g) * kPanel + c;
    if (m.type == PackType::kMxfp4) {
      int e = 0;
      if (amax > 0.0f) e = std::ilogb(amax) - 2 + 127;  // exact, unlike floor(log2)
      e = e < 0 ? 0 : e > 254 ? 254 : e;
      m.exponent.as<uint8_t>()[slot] = static_cast<uint8_t>(amax > 0.0f ? e : 127);
      const float inverse = std::ldexp(1.0f, 127 - (amax > 0.0f ? e : 127));
      for (int64_t i = begin; i < end; ++i) {
        const int q = to_e2m1(at(i) * inverse);
        data[(i / 8 * kPanel + c) * 4 + i % 4] |= static_cast<unsigned char>(q << (i % 8 < 4 ? 0 : 4));
      }
      continue;
    }
    const float scale = m.type == PackType::kInt8 ? amax / 127.0f : amax / 7.0f;
    m.scale.as<float>()[slot] = scale;
    int32_t sum = 0;
    for (int64_t i = begin; i < end; ++i) {
      const int q = scale > 0.0f ? round_even(at(i) / scale) : 0;
      if (m.type == PackType::kInt8) {
        const int8_t v = static_cast<int8_t>(q < -127 ? -127 : q > 127 ? 127 : q);
        data[(i / 4 * kPanel + c) * 4 + i % 4] = static_cast<unsigned char>(v);
        sum += v;
      } else {
        const int u = (q < -8 ? -8 : q > 7 ? 7 : q) + 8;
        data[(i / 8 * kPanel + c) * 4 + i % 4] |= static_cast<unsigned char>(u << (i % 8 < 4 ? 0 : 4));
      }
    }
    if (m.type == PackType::kInt8) m.zero.as<int32_t>()[slot] = 128 * sum;
  }
}

}  // namespace heddle
