// Discrete Gaussian noise on a grid, exact: Canonne, Kamath, Steinke 2020, "The Discrete Gaussian for Differential
// Privacy", algorithms 1 to 3 with scale t = sigma, an integer number of grid steps. Integer arithmetic only.
//
//   out = granularity (floor(in / granularity + 1/2) + z),  P(z) ~ exp(-z^2 / (2 sigma^2))
// granularity is a power of two, so the division and the product are exact in double, and what is rounded to float32
// at the end is a function of the exact integer alone (post-processing).
//
// Element e draws 16-bit halves, low half first, from its own key stream: counter = e mod 2^32, nonce =
// (2^24 stream + 2^8 (e / 2^32) + block, step mod 2^32, step / 2^32), block = 0, 1, ... 255. Equal bits on every
// instruction set and backend, for any split into calls, shards and threads. An element that used up its 8160 halves
// would get z = 0; that takes a run of more than 500 rejections of probability below 2/3.
//
//   bernoulli(n / d)      compares 16 bits at a time with the binary digits of n / d: no rounding, any number of digits
//   bernoulli(exp(-n/d))  n <= d: counts successes of bernoulli(n / (d k)), k = 1, 2, ...; odd where the first failed
//   |y| = u + sigma v     discrete Laplace: u uniform, kept with exp(-u / sigma); v geometric, 1/e
//   y is kept with exp(-(|y| - sigma)^2 / (2 sigma^2)), its integer part first
// All numbers stay below 2^63 for sigma <= 2^23.
#pragma once
#include "core/thread_pool.h"

namespace heddle {

constexpr int64_t kMaxDiscreteSigma = int64_t{1} << 23;

struct DiscreteNoiseArgs {
  const uint32_t* key = nullptr;  // [8]
  int64_t step = 0, offset = 0, count = 0;
  int64_t sigma = 0;  // in grid steps, at most kMaxDiscreteSigma
  double granularity = 1;
  bool add = false;  // to what `out` holds
  float* out = nullptr;
};
Status discrete_noise(const DiscreteNoiseArgs& args, const Exec& exec);

}  // namespace heddle
