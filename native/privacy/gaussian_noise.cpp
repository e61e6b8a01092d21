#include "privacy/gaussian_noise.h"

#include <algorithm>

namespace heddle {

Status gaussian_noise(const GaussianNoiseArgs& a, const Exec& exec) {
  const NoiseKernels& k = noise_kernels(exec.isa);
  const int64_t end = a.offset + a.count;
  const int64_t first = a.offset / kNoiseGroup, groups = (end + kNoiseGroup - 1) / kNoiseGroup - first;
  if (a.count == 0) return kOk;
  const bool done = parallel_for(exec, groups, 64, [&](int64_t from, int64_t to) {
    alignas(64) float noise[kNoiseGroup];
    for (int64_t g = first + from; g < first + to; ++g) {
      const int64_t begin = std::max(a.offset, g * kNoiseGroup), stop = std::min(end, (g + 1) * kNoiseGroup);
      float* out = a.out + (begin - a.offset);
      if (!a.add && stop - begin == kNoiseGroup) {
        k.noise_group(a.key, g, a.step, a.stddev, out);
        continue;
      }
      k.noise_group(a.key, g, a.step, a.stddev, noise);
      const float* in = noise + (begin - g * kNoiseGroup);
      for (int64_t i = 0; i < stop - begin; ++i) out[i] = a.add ? out[i] + in[i] : in[i];
    }
  });
  return done ? kOk : kCancelled;
}

Status chacha20_blocks(const ChaChaArgs& a, const Exec& exec) {
  const NoiseKernels& k = noise_kernels(exec.isa);
  const bool done = parallel_for(exec, a.count, 256, [&](int64_t from, int64_t to) {
    k.chacha_blocks(a.key, a.counter + static_cast<uint32_t>(from), a.nonce, to - from, a.out + from * 16);
  });
  return done ? kOk : kCancelled;
}

}  // namespace heddle
