// The samplers of discrete_noise.h, on the CPU and on the device. Bits: next16() draws 16 bits, exhausted() once an element's
// are used up.
#pragma once
#include <cmath>

#include "privacy/discrete_noise.h"

#if defined(__CUDACC__)
#define HEDDLE_SAMPLER __device__ inline
#else
#define HEDDLE_SAMPLER inline
#endif

namespace heddle {

constexpr uint32_t kDiscreteStream = 3;
constexpr int kDiscreteBlocks = 256;  // of an element's key stream

// n <= d < 2^48
template <class Bits>
HEDDLE_SAMPLER bool bernoulli(Bits& bits, uint64_t n, uint64_t d) {
  if (n == 0 || n == d) return n == d;
  while (!bits.exhausted()) {
    n <<= 16;
    const uint64_t digit = n / d, drawn = bits.next16();
    if (drawn != digit) return drawn < digit;
    n -= digit * d;
    if (n == 0) return false;
  }
  return false;
}

// exp(-n / d), n <= d
template <class Bits>
HEDDLE_SAMPLER bool bernoulli_exp(Bits& bits, uint64_t n, uint64_t d) {
  uint64_t k = 1;
  while (bernoulli(bits, n, d) && bernoulli(bits, 1, k)) ++k;
  return k % 2 == 1;
}

template <class Bits>
HEDDLE_SAMPLER bool bernoulli_exp_integer(Bits& bits, uint64_t n) {
  for (; n > 0; --n) {
    if (!bernoulli_exp(bits, 1, 1)) return false;
  }
  return true;
}

// exp(-(u + sigma v - sigma)^2 / (2 sigma^2)), u < sigma
template <class Bits>
HEDDLE_SAMPLER bool accept(Bits& bits, uint64_t u, uint64_t v, uint64_t sigma) {
  const uint64_t d = 2 * sigma * sigma;
  if (v == 0) return bernoulli_exp(bits, (sigma - u) * (sigma - u), d);
  const uint64_t w = v - 1;  // (u + sigma w)^2 / (2 sigma^2) = u^2 / (2 sigma^2) + u w / sigma + w^2 / 2
  if (!bernoulli_exp_integer(bits, w * w / 2 + u * w / sigma)) return false;
  uint64_t n = u * u + 2 * sigma * (u * w % sigma) + w % 2 * sigma * sigma;
  for (; n >= d; n -= d) {
    if (!bernoulli_exp(bits, 1, 1)) return false;
  }
  return bernoulli_exp(bits, n, d);
}

template <class Bits>
HEDDLE_SAMPLER int64_t discrete_gaussian(Bits& bits, uint64_t sigma, uint32_t mask) {
  while (sigma > 0 && !bits.exhausted()) {
    uint32_t u = bits.next16();
    if (mask > 0xffff) u |= bits.next16() << 16;
    u &= mask;
    if (u >= sigma || !bernoulli_exp(bits, u, sigma)) continue;
    uint64_t v = 0;
    while (bernoulli_exp(bits, 1, 1) && !bits.exhausted()) ++v;
    const bool negative = bits.next16() & 1;
    if (negative && u == 0 && v == 0) continue;  // one zero, not two
    if (!accept(bits, u, v, sigma) || bits.exhausted()) continue;
    const auto y = static_cast<int64_t>(u + sigma * v);
    return negative ? -y : y;
  }
  return 0;
}

// The least 2^n - 1 from sigma - 1 on: what u is drawn with.
inline uint32_t uniform_mask(int64_t sigma) {
  uint32_t mask = 0;
  while (mask < static_cast<uint64_t>(sigma) - (sigma > 0)) mask = 2 * mask + 1;
  return mask;
}

// `out` (rounded to the grid, or nothing) plus z steps.
HEDDLE_SAMPLER float on_grid(const DiscreteNoiseArgs& a, float out, int64_t z) {
  const double before = a.add ? floor(static_cast<double>(out) / a.granularity + 0.5) : 0.0;
  return static_cast<float>((before + static_cast<double>(z)) * a.granularity);
}

}  // namespace heddle
