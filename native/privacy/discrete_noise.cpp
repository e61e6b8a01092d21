#include "privacy/discrete_noise.h"

#include <algorithm>

#include "privacy/discrete_gaussian.h"
#include "privacy/gaussian_noise.h"

namespace heddle {
namespace {

constexpr int kAhead = 2;    // blocks of an element that are made together with its neighbours'
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
  bool exhausted() const { return block_ == kDiscreteBlocks; }

  uint32_t next16() {
    if (half_ == 2 * kWords) {
      half_ = 0;
      if (++block_ >= kDiscreteBlocks) block_ = kDiscreteBlocks;
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

}  // namespace

Status discrete_noise(const DiscreteNoiseArgs& a, const Exec& exec) {
  const NoiseKernels& k = noise_kernels(exec.isa);
  const int64_t end = a.offset + a.count;
  const int64_t first = a.offset / kNoiseLanes, groups = (end + kNoiseLanes - 1) / kNoiseLanes - first;
  if (a.count == 0) return kOk;
  const uint32_t mask = uniform_mask(a.sigma);
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
        out = on_grid(a, out, z);
      }
    }
  });
  return done ? kOk : kCancelled;
}

}  // namespace heddle
