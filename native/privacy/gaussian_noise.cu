// gaussianNoise on the device; definition in gaussian_noise.h. A thread computes one ChaCha20 block, so 8 elements that
// lie 16 apart; 16 neighbouring threads write whole lines. The random words are the CPU's bit for bit; the noise made of
// them has its precision, not always its last bit.
#include "privacy/chacha20.cuh"
#include "privacy/gaussian_noise.h"

#include "cuda/job.h"

namespace heddle {
namespace {

constexpr int kNoiseThreads = 256;

// -ln u for u = (high 2^32 + low + 1/2) / 2^64. Above 1/2 the distance to 1 is what is converted, so nothing is lost
// where u rounds to 1.
__device__ __forceinline__ float minus_log_uniform(uint32_t low, uint32_t high) {
  const bool flip = high >> 31 != 0;
  const uint32_t h = flip ? ~high : high, l = flip ? ~low : low;
  const float f = fmaf(static_cast<float>(l >> 1), 0x1p-63f, fmaf(static_cast<float>(h), 0x1p-32f, 0x1p-64f));
  return flip ? -log1pf(-f) : -logf(f);
}

// cos and sin of 2 pi (high 2^32 + low) / 2^64.
__device__ __forceinline__ void unit_circle(uint32_t low, uint32_t high, float* cosine, float* sine) {
  const uint32_t k = (high + (1u << 29)) >> 30;  // nearest quarter turn
  const auto rest = static_cast<int32_t>(high - (k << 30));
  const float x = fmaf(static_cast<float>(rest), 1.4629180792671596e-9f,
                       static_cast<float>(low >> 1) * 6.812243160173109e-19f);
  const float z = x * x;
  float s = -1.9515295891e-4f;  // Cephes sinf, cosf
  s = fmaf(s, z, 8.3321608736e-3f);
  s = fmaf(s, z, -1.6666654611e-1f);
  s = fmaf(s * z, x, x);
  float c = 2.443315711809948e-5f;
  c = fmaf(c, z, -1.388731625493765e-3f);
  c = fmaf(c, z, 4.166664568298827e-2f);
  c = fmaf(c * z, z, -0.5f * z) + 1.0f;
  const float across = k & 1u ? s : c, along = k & 1u ? c : s;
  *cosine = (k + 1u) & 2u ? -across : across;
  *sine = k & 2u ? -along : along;
}

__global__ void __launch_bounds__(kNoiseThreads) noise_kernel(GaussianNoiseArgs a, int64_t first, int64_t blocks) {
  const int64_t at = int64_t{blockIdx.x} * kNoiseThreads + threadIdx.x;
  if (at >= blocks) return;
  const int64_t group = first + at / kNoiseLanes, lane = at % kNoiseLanes;
  const auto block = static_cast<uint64_t>(group * kNoiseLanes + lane);
  const uint32_t nonce[3] = {static_cast<uint32_t>(block >> 32), static_cast<uint32_t>(a.step),
                             static_cast<uint32_t>(static_cast<uint64_t>(a.step) >> 32)};
  uint32_t w[16];
  chacha20_block(a.key, static_cast<uint32_t>(block), nonce, w);
  auto put = [&](int v, float noise) {
    const int64_t i = group * kNoiseGroup + v * kNoiseLanes + lane - a.offset;
    if (i >= 0 && i < a.count) a.out[i] = a.add ? a.out[i] + noise : noise;
  };
#pragma unroll
  for (int m = 0; m < 4; ++m) {
    const float minus_log = minus_log_uniform(w[4 * m], w[4 * m + 1]);
    const float radius = a.stddev * sqrtf(minus_log + minus_log);
    float cosine, sine;
    unit_circle(w[4 * m + 2], w[4 * m + 3], &cosine, &sine);
    put(2 * m, radius * cosine);
    put(2 * m + 1, radius * sine);
  }
}

__global__ void __launch_bounds__(kNoiseThreads) chacha_kernel(ChaChaArgs a) {
  const int64_t b = int64_t{blockIdx.x} * kNoiseThreads + threadIdx.x;
  if (b >= a.count) return;
  uint32_t w[16];
  chacha20_block(a.key, a.counter + static_cast<uint32_t>(b), a.nonce, w);
#pragma unroll
  for (int i = 0; i < 16; ++i) a.out[b * 16 + i] = w[i];
}

}  // namespace

HEDDLE_CUDA_OP(gaussian_noise, GaussianNoiseArgs) {
  if (a.count == 0) return kOk;
  const int64_t first = a.offset / kNoiseGroup, groups = ceil_div(a.offset + a.count, kNoiseGroup) - first;
  const int64_t blocks = groups * kNoiseLanes;
  HEDDLE_LAUNCH(noise_kernel, dim3(static_cast<unsigned>(ceil_div(blocks, kNoiseThreads))), dim3(kNoiseThreads), 0,
                job.stream, a, first, blocks);
  return job.launched();
}

HEDDLE_CUDA_OP(chacha20_blocks, ChaChaArgs) {
  if (a.count == 0) return kOk;
  HEDDLE_LAUNCH(chacha_kernel, dim3(static_cast<unsigned>(ceil_div(a.count, kNoiseThreads))), dim3(kNoiseThreads), 0,
                job.stream, a);
  return job.launched();
}

}  // namespace heddle
