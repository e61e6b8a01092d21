// discreteNoise on the device, the CPU's bits: definition in discrete_noise.h. A thread an element; its block of the key
// stream lies in shared memory. Bound by the integer divisions of the samplers, about 20 of them in an element's first
// two blocks.
#include "privacy/chacha20.cuh"
#include "privacy/discrete_gaussian.h"

#include "cuda/job.h"

namespace heddle {
namespace {

constexpr int kDiscreteThreads = 128, kWords = 16;

// One element's key stream.
class DeviceBits {
 public:
  __device__ DeviceBits(const DiscreteNoiseArgs& a, int64_t element, uint32_t* words) : key_(a.key), words_(words) {
    counter_ = static_cast<uint32_t>(element);
    nonce_[0] = kDiscreteStream << 24 | static_cast<uint32_t>(static_cast<uint64_t>(element) >> 32) << 8;
    nonce_[1] = static_cast<uint32_t>(a.step);
    nonce_[2] = static_cast<uint32_t>(static_cast<uint64_t>(a.step) >> 32);
    fill();
  }
  __device__ bool exhausted() const { return block_ == kDiscreteBlocks; }
  __device__ uint32_t next16() {
    if (half_ == 2 * kWords) {
      half_ = 0;
      if (++block_ >= kDiscreteBlocks) block_ = kDiscreteBlocks;
      else fill();
    }
    const uint32_t word = words_[half_ / 2 * kDiscreteThreads];
    return half_++ % 2 ? word >> 16 : word & 0xffffu;
  }

 private:
  // Not inlined: it is reached from every draw.
  __attribute__((noinline)) __device__ void fill() {
    const uint32_t nonce[3] = {nonce_[0] | static_cast<uint32_t>(block_), nonce_[1], nonce_[2]};
    uint32_t w[kWords];
    chacha20_block(key_, counter_, nonce, w);
#pragma unroll
    for (int i = 0; i < kWords; ++i) words_[i * kDiscreteThreads] = w[i];
  }

  const uint32_t* key_;
  uint32_t* words_;
  uint32_t counter_, nonce_[3];
  int block_ = 0, half_ = 0;
};

__global__ void __launch_bounds__(kDiscreteThreads) discrete_noise_kernel(DiscreteNoiseArgs a, uint32_t mask) {
  __shared__ uint32_t words[kWords * kDiscreteThreads];
  const int64_t i = int64_t{blockIdx.x} * kDiscreteThreads + threadIdx.x;
  if (i >= a.count) return;
  int64_t z = 0;
  if (a.sigma > 0) {
    DeviceBits bits(a, a.offset + i, words + threadIdx.x);
    z = discrete_gaussian(bits, static_cast<uint64_t>(a.sigma), mask);
  }
  a.out[i] = on_grid(a, a.out[i], z);
}

}  // namespace

HEDDLE_CUDA_OP(discrete_noise, DiscreteNoiseArgs) {
  if (a.count == 0) return kOk;
  if (ceil_div(a.count, kDiscreteThreads) > INT32_MAX) return kUnsupported;
  HEDDLE_LAUNCH(discrete_noise_kernel, dim3(static_cast<unsigned>(ceil_div(a.count, kDiscreteThreads))),
                dim3(kDiscreteThreads), 0, job.stream, a, uniform_mask(a.sigma));
  return job.launched();
}

}  // namespace heddle
