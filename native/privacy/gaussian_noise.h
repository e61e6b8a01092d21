// Gaussian noise keyed by (key, step, global element index): ChaCha20 (RFC 8439) blocks and Box-Muller.
//
// Element e lies in group q = e / 128, at v = e mod 128 / 16, l = e mod 16. Its words are those of block b = 16 q + l
// of the step's key stream: counter = b mod 2^32, nonce = (b / 2^32 + 2^24 * stream, step mod 2^32, step / 2^32).
// Pair m = v / 2 reads words 4m .. 4m + 3: u1 and u2 of 64 bits each, (high 2^32 + low + 1/2) / 2^64;
// noise = stddev sqrt(-2 ln u1) times cos 2 pi u2 (even v) or sin 2 pi u2 (odd v). 16 blocks side by side are what one
// avx512 register holds, so that every instruction set stores whole vectors.
//
// The random words are equal on every instruction set; the noise is computed from them in fp32: relative error
// <= 1e-6 of the radius. 64 bits for u1 reach 9.4 standard deviations. Any split into calls, shards or threads gives
// the same bits (on one instruction set).
//
// Cost: about 1000 integer operations per 16 blocks (128 elements) per lane set, and 80 operations per pair.
#pragma once
#include "core/thread_pool.h"

namespace heddle {

constexpr int kNoiseLanes = 16;   // blocks of a group
constexpr int kNoiseGroup = 128;  // elements of a group

struct NoiseKernels {
  void (*chacha_blocks)(const uint32_t* key, uint32_t counter, const uint32_t* nonce, int64_t count, uint32_t* out);
  void (*noise_group)(const uint32_t* key, int64_t group, int64_t step, float stddev, float* out);
};
const NoiseKernels& noise_kernels(Isa isa);

struct GaussianNoiseArgs {
  const uint32_t* key = nullptr;  // [8]
  int64_t step = 0, offset = 0, count = 0;
  float stddev = 1.0f;
  bool add = false;  // to what `out` holds
  float* out = nullptr;
};
Status gaussian_noise(const GaussianNoiseArgs& args, const Exec& exec);

struct ChaChaArgs {
  const uint32_t* key = nullptr;    // [8]
  const uint32_t* nonce = nullptr;  // [3]
  uint32_t counter = 0;
  int64_t count = 0;
  uint32_t* out = nullptr;  // [count, 16]
};
Status chacha20_blocks(const ChaChaArgs& args, const Exec& exec);

}  // namespace heddle
