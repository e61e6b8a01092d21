#include "privacy/discrete_noise.h"

#include <algorithm>
#include <cmath>

#include "privacy/gaussian_noise.h"

namespace heddle {
namespace {

constexpr uint32_t kDiscreteStream = 3;
constexpr int kAhead = 2;    // blocks of an element that are made together with its neighbours'
constexpr int kBlocks = 256;
constexpr int kWords = 16;

// Key streams of 16 neighbouring elements, and the one that is read.
class Bits {
 public:
  Bits(const NoiseKernels& kernels, const uint32_t* key, int64_t step) : k_(kernels), key_(key) {
    nonce_[1] = static_cast<uint32_t>(step), nonce_[2] = static_cast<uint32_t>(static_cast<uint64_t>(step) >> 32);
  }
  // Elements 16 group .. 16 group + 15: they never straddle a multiple of 2^32.
  void group(int64_t group) {
    first_ = group * kNoiseLanes;
    for (int b = 0; b < kAhead; ++b) make(first_, b, kNoiseLanes, ahead_[b]);
  }
  void element(int lane) { lane_ = lane, block_ = 0, half_ = 0, words_ = ahead_[0] + lane * kWords; }
  bool exhausted() const { return block_ == kBlocks; }

  uint32_t next16() {
    if (half_ == 2 * kWords) {
      half_ = 0;
      if (++block_ >= kBlocks) block_ = kBlocks;
      else if (block_ < kAhead) words_ = ahead_[block_] + lane_ * kWords;
      else make(first_ + lane_, block_, 1, own_), words_ = own_;
    }
    const uint32_t word = words_[half_ / 2];
    return half_++ % 2 ? word >> 16 : word & 0xffff;
  }

 private:
  void make(int64_t element, int block, int64_t count, uint32_t* out) {
    const auto high = static_cast<uint32_t>(static_cast<uint64_t>(element) >> 32);
    nonce_[0] = kDiscreteStream << 24 | high << 8 | static_cast<uint32_t>(block);
    k_.chacha_blocks(key_, static_cast<uint32_t>(element), nonce_, count, out);
  }

  const NoiseKernels& k_;
  const uint32_t* key_;
  uint32_t nonce_[3] = {};
  uint32_t ahead_[kAhead][kNoiseLanes * kWords], own_[kWords];
  const uint32_t* words_ = nullptr;
  int64_t first_ = 0;
  int lane_ = 0, block_ = 0, half_ = 0;
};

// n <= d < 2^48
bool bernoulli(Bits& bits, uint64_t n, uint64_t d) {
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
bool bernoulli_exp(Bits& bits, uint64_t n, uint64_t d) {
  uint64_t k = 1;
  while (bernoulli(bits, n, d) && bernoulli(bits, 1, k)) ++k;
  return k % 2 == 1;
}

bool bernoulli_exp_integer(Bits& bits, uint64_t n) {
  for (; n > 0; --n) {
    if (!bernoulli_exp(bits, 1, 1)) return false;
  }
  return true;
}

// exp(-(u + sigma v - sigma)^2 / (2 sigma^2)), u < sigma
bool accept(Bits& bits, uint64_t u, uint64_t v, uint64_t sigma) {
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

int64_t discrete_gaussian(Bits& bits, uint64_t sigma, uint32_t mask) {
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

}  // namespace

Status discrete_noise(const DiscreteNoiseArgs& a, const Exec& exec) {
  const NoiseKernels& k = noise_kernels(exec.isa);
  const int64_t end = a.offset + a.count;
  const int64_t first = a.offset / kNoiseLanes, groups = (end + kNoiseLanes - 1) / kNoiseLanes - first;
  if (a.count == 0) return kOk;
  uint32_t mask = 0;
  while (mask < static_cast<uint64_t>(a.sigma) - (a.sigma > 0)) mask = 2 * mask + 1;
  const bool done = parallel_for(exec, groups, 64, [&](int64_t from, int64_t to) {
    Bits bits(k, a.key, a.step);
    for (int64_t g = first + from; g < first + to; ++g) {
      const int64_t begin = std::max(a.offset, g * kNoiseLanes), stop = std::min(end, (g + 1) * kNoiseLanes);
      if (a.sigma > 0) bits.group(g);
      for (int64_t e = begin; e < stop; ++e) {
        int64_t z = 0;
        if (a.sigma > 0) {
          bits.element(static_cast<int>(e % kNoiseLanes));
          z = discrete_gaussian(bits, static_cast<uint64_t>(a.sigma), mask);
        }
        float& out = a.out[e - a.offset];
        const double on_grid = a.add ? std::floor(static_cast<double>(out) / a.granularity + 0.5) : 0.0;
        out = static_cast<float>((on_grid + static_cast<double>(z)) * a.granularity);
      }
    }
  });
  return done ? kOk : kCancelled;
}

}  // namespace heddle
