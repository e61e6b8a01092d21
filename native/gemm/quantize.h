// Quantisers, one column at a time. The formulas are the reference's (lib/reference/gemm/quantize.ts), in float32
// with the same order of operations, so that both arrive at the same integers.
//
//   int8:   scale = max|w| / 127 per output;             q = round(w / scale)
//   int4:   scale = max|w| / 7 per group of k;           q = clamp(round(w / scale), -8, 7), stored as q + 8
//     with zero points: lo = min(w, 0), hi = max(w, 0); scale = hi/15 - lo/15, zero = round(-lo / scale),
//                                                        q = clamp(round(w / scale) + zero, 0, 15)
//     with search: max|w| (or lo and hi) times 40/40, 39/40 .. 20/40; the first with the least
//                                                        sum of mean_square[k] * (w - dequantised)^2, in float64,
//                                                        in 4 partial sums (k mod 4), (s0 + s1) + (s2 + s3)
//   MXFP4:  exponent = floor(log2(max|w|)) - 2 per 32 k (OCP MX 1.0); q = nearest E2M1 value of w / 2^exponent
//   float8: scale = max|w| / 448 per block of 128 x 128; q = nearest E4M3 value of w / scale
// round = to nearest, ties to even. A group of zeros has scale 0 (exponent 0) and q = 0.
#pragma once
#include <cmath>

#include "gemm/packed.h"

namespace heddle {

// |x| < 2^22: adding 1.5 * 2^23 leaves the rounded integer in the low mantissa bits. nearbyint is a library call.
inline int round_even(float x) { return static_cast<int>(float_to_bits(x + 12582912.0f)) - 0x4b400000; }

inline int clamp(int q, int low, int high) { return q < low ? low : q > high ? high : q; }

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

// One int4 group: w = scale * (q - zero), q in 0..15.
struct Int4Group {
  float scale;
  int zero;
  int quantize(float w) const { return scale > 0.0f ? clamp(round_even(w / scale) + zero, 0, 15) : zero; }
};

constexpr int kSearchSteps = 40, kSearchLast = 20, kMaxInt4Group = 128;

inline Int4Group int4_group(const float* w, int64_t n, const PackOptions& o, const float* mean_square) {
  float low = 0.0f, high = 0.0f;
  for (int64_t i = 0; i < n; ++i) {
    low = w[i] < low ? w[i] : low;
    high = w[i] > high ? w[i] : high;
  }
  const float amax = high > -low ? high : -low;
  auto candidate = [&](int step) {
    const float shrink = static_cast<float>(step) / kSearchSteps;
    if (o.symmetric) return Int4Group{amax * shrink / 7.0f, 8};
    const float lo = low * shrink, hi = high * shrink;
    const float scale = hi / 15.0f - lo / 15.0f;
    return Int4Group{scale, scale > 0.0f ? clamp(round_even(-lo / scale), 0, 15) : 0};
  };
  Int4Group best = candidate(kSearchSteps);
  if (!o.search || !(best.scale > 0.0f)) return best;
  double least = INFINITY;
  for (int step = kSearchSteps; step >= kSearchLast; --step) {
    const Int4Group g = candidate(step);
    if (!(g.scale > 0.0f)) break;
    int q[kMaxInt4Group];  // a loop of its own, which compilers vectorise
    for (int64_t i = 0; i < n; ++i) q[i] = clamp(round_even(w[i] / g.scale) + g.zero, 0, 15) - g.zero;
    double sum[4] = {0.0, 0.0, 0.0, 0.0};
    for (int64_t i = 0; i < n; i += 4) {
      for (int64_t j = 0; j < 4; ++j) {
        const double d = static_cast<double>(w[i + j]) - static_cast<double>(g.scale) * q[i + j];
        sum[j] += (mean_square ? static_cast<double>(mean_square[i + j]) : 1.0) * (d * d);
      }
    }
    const double error = (sum[0] + sum[1]) + (sum[2] + sum[3]);
    if (error < least) least = error, best = g;
  }
  return best;
}

// Column c of panel p from `w`: its k values and zeros up to the padded k. block_scale(g): the float8 scale of group g.
template <class BlockScale>
void quantize_column(PackedMatrix& m, int64_t p, int c, const float* w, const PackOptions& o, const BlockScale& block_scale) {
  const int64_t padded = m.steps * pack_unit(m.type);
  unsigned char* data = m.data.as<unsigned char>() + p * m.steps * kStepBytes;
  auto put_byte = [&](int64_t i, int byte) { data[(i / 4 * kPanel + c) * 4 + i % 4] = static_cast<unsigned char>(byte); };
  auto put_nibble = [&](int64_t i, int code) {
    data[(i / 8 * kPanel + c) * 4 + i % 4] |= static_cast<unsigned char>(code << (i % 8 < 4 ? 0 : 4));
  };
  const int64_t group = m.group ? m.group : padded;
  for (int64_t g = 0; g * group < padded; ++g) {
    const int64_t begin = g * group, end = begin + group < padded ? begin + group : padded;
    const int64_t slot = (p * m.groups() + g) * kPanel + c;
    if (m.type == PackType::kInt4) {
      // Padding never occurs: a group divides k.
      const Int4Group q = int4_group(w + begin, end - begin, o, o.mean_square ? o.mean_square + begin : nullptr);
      m.scale.as<float>()[slot] = q.scale;
      if (m.point) m.point.as<uint8_t>()[slot] = static_cast<uint8_t>(q.zero);
      for (int64_t i = begin; i < end; ++i) put_nibble(i, q.quantize(w[i]));
      continue;
    }
    if (m.type == PackType::kFloat8) {
      const float scale = block_scale(g);
      m.scale.as<float>()[slot] = scale;
      for (int64_t i = begin; i < end; ++i) put_byte(i, scale > 0.0f ? float_to_e4m3(w[i] / scale) : 0);
      continue;
    }
    float amax = 0.0f;
    for (int64_t i = begin; i < end; ++i) amax = std::fmax(amax, std::fabs(w[i]));
    if (m.type == PackType::kMxfp4) {
      int e = 0;
      if (amax > 0.0f) e = std::ilogb(amax) - 2 + 127;  // exact, unlike floor(log2)
      e = e < 0 ? 0 : e > 254 ? 254 : e;
      m.exponent.as<uint8_t>()[slot] = static_cast<uint8_t>(amax > 0.0f ? e : 127);
      const float inverse = std::ldexp(1.0f, 127 - (amax > 0.0f ? e : 127));
      for (int64_t i = begin; i < end; ++i) put_nibble(i, to_e2m1(w[i] * inverse));
      continue;
    }
    const float scale = amax / 127.0f;
    m.scale.as<float>()[slot] = scale;
    int32_t sum = 0;
    for (int64_t i = begin; i < end; ++i) {
      const int q = scale > 0.0f ? clamp(round_even(w[i] / scale), -127, 127) : 0;
      put_byte(i, q);
      sum += q;
    }
    m.zero.as<int32_t>()[slot] = 128 * sum;
  }
}

}  // namespace heddle
