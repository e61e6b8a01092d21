// Scalar conversions of half types: every pattern, and every rounding boundary, against a plain definition and
// against the hardware's conversion.
#include "core/dtype.h"

#include <cmath>

#include "check.h"
#if defined(__x86_64__)
#include <immintrin.h>

#include "core/cpu_features.h"
#endif

using namespace heddle;

namespace {

// Definition of a binary format with `exponent` and `mantissa` bits, by arithmetic in double.
double decode(uint32_t h, int exponent, int mantissa) {
  const int bias = (1 << (exponent - 1)) - 1;
  const uint32_t e = h >> mantissa & ((1u << exponent) - 1u), m = h & ((1u << mantissa) - 1u);
  const double sign = h >> (exponent + mantissa) & 1u ? -1.0 : 1.0;
  if (e == (1u << exponent) - 1u) return m ? std::nan("") : sign * HUGE_VAL;
  const double value = e ? std::ldexp(1.0 + std::ldexp(m, -mantissa), static_cast<int>(e) - bias)
                         : std::ldexp(m, 1 - bias - mantissa);
  return sign * value;
}

// Nearest value of the format, ties to even, by search among the (ordered) positive patterns.
uint16_t encode(float f, int exponent, int mantissa) {
  const double x = std::fabs(static_cast<double>(f));
  const uint32_t infinity = ((1u << exponent) - 1u) << mantissa;
  uint32_t low = 0, high = infinity;  // decode(low) <= x < decode(high), infinity standing for the next power
  auto value = [&](uint32_t h) {
    return h == infinity ? std::ldexp(1.0, (1 << (exponent - 1))) : decode(h, exponent, mantissa);
  };
  if (x >= value(infinity)) {
    low = infinity;
  } else {
    while (high - low > 1) {
      const uint32_t middle = (low + high) / 2;
      (value(middle) <= x ? low : high) = middle;
    }
    const double below = x - value(low), above = value(high) - x;
    if (above < below || (above == below && (low & 1u))) low = high;
  }
  return static_cast<uint16_t>(low | (std::signbit(f) ? 0x8000u : 0u));
}

void check_encode(float f) {
  const uint16_t b = float_to_bf16(f), h = float_to_f16(f);
  if (std::isnan(f)) {
    CHECK(std::isnan(bf16_to_float(b)), "NaN %08x became bf16 %04x", float_to_bits(f), b);
    CHECK(std::isnan(f16_to_float(h)), "NaN %08x became f16 %04x", float_to_bits(f), h);
    return;
  }
  CHECK(b == encode(f, 8, 7), "%a: bf16 %04x, expected %04x", f, b, encode(f, 8, 7));
  CHECK(h == encode(f, 5, 10), "%a: f16 %04x, expected %04x", f, h, encode(f, 5, 10));
}

// f and its neighbours.
void check_around(float f) {
  const uint32_t u = float_to_bits(f);
  for (int d = -1; d <= 1; ++d) check_encode(bits_to_float(u + static_cast<uint32_t>(d)));
}

}  // namespace

TEST(decode_all_patterns) {
  for (uint32_t h = 0; h < 65536; ++h) {
    const double b = decode(h, 8, 7), f = decode(h, 5, 10);
    const float gb = bf16_to_float(static_cast<uint16_t>(h)), gf = f16_to_float(static_cast<uint16_t>(h));
    CHECK(std::isnan(b) ? std::isnan(gb) : gb == b && std::signbit(gb) == std::signbit(b), "bf16 %04x: %a", h, gb);
    CHECK(std::isnan(f) ? std::isnan(gf) : gf == f && std::signbit(gf) == std::signbit(f), "f16 %04x: %a", h, gf);
  }
}

TEST(round_trip_all_patterns) {
  for (uint32_t h = 0; h < 65536; ++h) {
    const float b = bf16_to_float(static_cast<uint16_t>(h)), f = f16_to_float(static_cast<uint16_t>(h));
    if (!std::isnan(b)) CHECK(float_to_bf16(b) == h, "bf16 %04x came back as %04x", h, float_to_bf16(b));
    if (!std::isnan(f)) CHECK(float_to_f16(f) == h, "f16 %04x came back as %04x", h, float_to_f16(f));
  }
}

TEST(rounding_at_every_boundary) {
  for (uint32_t h = 0; h < 0x7f80; ++h) {  // halfway between neighbours, which is where rounding is decided
    const float b = bf16_to_float(static_cast<uint16_t>(h));
    check_around(bits_to_float(float_to_bits(b) + 0x8000u));
    check_around(-b);
  }
  for (uint32_t h = 0; h < 0x7c00; ++h) {
    const double next = h == 0x7bff ? 65536.0 : decode(h + 1, 5, 10);
    const float middle = static_cast<float>((decode(h, 5, 10) + next) / 2);
    check_around(middle);
    check_around(-middle);
  }
  for (uint32_t u : {0u, 1u, 0x007fffffu, 0x00800000u, 0x7f7fffffu, 0x7f800000u, 0x7f800001u, 0x7fffffffu, 0xff800001u}) {
    check_encode(bits_to_float(u));
    check_encode(bits_to_float(u ^ 0x80000000u));
  }
}

TEST(rounding_of_random_floats) {
  check::Random random(1);
  for (int i = 0; i < (kSlow ? 100000 : 1000000); ++i) check_encode(bits_to_float(static_cast<uint32_t>(random.bits())));
}

#if defined(__x86_64__)
__attribute__((target("f16c,avx"))) static uint16_t hardware_f16(float f) {
  return static_cast<uint16_t>(_mm_cvtsi128_si32(_mm_cvtps_ph(_mm_set_ss(f), _MM_FROUND_TO_NEAREST_INT)));
}
TEST(f16_as_hardware) {
  if (!cpu_features().avx2) {
    std::printf("skipped: no F16C on this machine\n");
    return;
  }
  for (uint64_t u = 0; u < (uint64_t{1} << 32); u += kSlow ? 4099 : 257) {
    const float f = bits_to_float(static_cast<uint32_t>(u));
    const uint16_t h = float_to_f16(f);
    CHECK(std::isnan(f) ? std::isnan(f16_to_float(h)) : h == hardware_f16(f), "%a: %04x, hardware %04x", f, h, hardware_f16(f));
  }
}
#elif defined(__aarch64__)
TEST(f16_as_hardware) {
  for (uint64_t u = 0; u < (uint64_t{1} << 32); u += 4099) {
    const float f = bits_to_float(static_cast<uint32_t>(u));
    const __fp16 hardware = static_cast<__fp16>(f);
    uint16_t expected;
    std::memcpy(&expected, &hardware, 2);
    CHECK(std::isnan(f) || float_to_f16(f) == expected, "%a: %04x, hardware %04x", f, float_to_f16(f), expected);
  }
}
#endif

TEST(sizes) {
  const int64_t size[] = {4, 8, 2, 2, 1, 1, 4, 8, 1, 1};
  for (int i = 0; i < 10; ++i) CHECK(dtype_size(static_cast<DType>(i)) == size[i], "dtype %d", i);
}
