// Layer and RMS norm on the device; definition and precision in norm.h.
//
// A warp takes a row of up to 1024 elements, a block a longer one. A row of up to 1024 (8192) elements stays in registers
// between the passes over it; a longer one is read again, from L2. Bound by memory: one read and one write of each element,
// 16384 rows of 768 in bf16 50 MB, 15 us on an H100 at 3.35 TB/s.
#include "nn/norm.h"

#include "cuda/group.cuh"
#include "cuda/job.h"
#include "cuda/vector.cuh"

namespace heddle {
namespace {

constexpr int kThreads = 256, kQuads = 8;
constexpr int64_t kWarpWidth = kWarp * kQuads * 4;

template <DType T, int Threads>
__global__ void __launch_bounds__(kThreads) norm_kernel(NormArgs a, bool words) {
  __shared__ uint32_t shared[kThreads / kWarp];
  const Group<Threads> group(shared);
  const int64_t row = int64_t{blockIdx.x} * (kThreads / Threads) + threadIdx.x / Threads;
  if (row >= a.rows) return;
  constexpr int64_t kSlab = Threads * kQuads * 4;
  const int64_t base = row * a.width, slabs = ceil_div(a.width, kSlab);
  int64_t held = -1;
  float v[kQuads][4];
  auto column = [&](int64_t slab, int q) { return slab * kSlab + (q * Threads + group.rank) * 4; };
  auto hold = [&](int64_t slab) {
    if (slab == held) return;
    held = slab;
#pragma unroll
    for (int q = 0; q < kQuads; ++q) {
      const int64_t i = column(slab, q);
      load_quad<T>(a.x, base + i, a.width - i, words, v[q]);
    }
    if (!a.residual) return;
#pragma unroll
    for (int q = 0; q < kQuads; ++q) {
      const int64_t i = column(slab, q);
      float r[4];
      load_quad<T>(a.residual, base + i, a.width - i, words, r);
#pragma unroll
      for (int j = 0; j < 4; ++j) v[q][j] += r[j];
    }
  };

  const float each = 1.0f / static_cast<float>(a.width);
  float mean = 0.0f, rest = 0.0f;
  if (a.centred) {
    float sum = 0.0f;
    for (int64_t slab = 0; slab < slabs; ++slab) {
      hold(slab);
#pragma unroll
      for (int q = 0; q < kQuads; ++q) sum += (v[q][0] + v[q][1]) + (v[q][2] + v[q][3]);
    }
    mean = group.sum(sum) * each;
  }
  // Deviations from the rounded mean; their own mean repairs the rounding.
  float firsts = 0.0f, seconds = 0.0f;
  for (int64_t slab = 0; slab < slabs; ++slab) {
    hold(slab);
#pragma unroll
    for (int q = 0; q < kQuads; ++q) {
      const int64_t left = a.width - column(slab, q);
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const float d = j < left ? v[q][j] - mean : 0.0f;
        firsts += d;
        seconds = fmaf(d, d, seconds);
      }
    }
  }
  if (a.centred) rest = group.sum(firsts) * each;
  const float variance = group.sum(seconds) * each - rest * rest;
  const float rstd = 1.0f / sqrtf((variance < 0.0f ? 0.0f : variance) + static_cast<float>(a.epsilon));

  const float unit = a.unit_offset ? 1.0f : 0.0f;
  for (int64_t slab = 0; slab < slabs; ++slab) {
    hold(slab);
#pragma unroll
    for (int q = 0; q < kQuads; ++q) {
      const int64_t i = column(slab, q), left = a.width - i;
      if (left <= 0) continue;
      if (a.sum) store_quad<T>(a.sum, base + i, left, words, v[q]);
      float y[4];
#pragma unroll
      for (int j = 0; j < 4; ++j) y[j] = ((v[q][j] - mean) - rest) * rstd;
      if (a.weight) {
        float w[4];
        load_quad<DType::kFloat32>(a.weight, i, left, words, w);
#pragma unroll
        for (int j = 0; j < 4; ++j) y[j] *= w[j] + unit;
      }
      if (a.bias) {
        float b[4];
        load_quad<DType::kFloat32>(a.bias, i, left, words, b);
#pragma unroll
        for (int j = 0; j < 4; ++j) y[j] += b[j];
      }
      if (a.out_type == DType::kFloat32) store_quad<DType::kFloat32>(a.out, base + i, left, words, y);
      else if (a.out_type == DType::kBFloat16) store_quad<DType::kBFloat16>(a.out, base + i, left, words, y);
      else store_quad<DType::kFloat16>(a.out, base + i, left, words, y);
    }
  }
  if (group.rank == 0) {
    if (a.mean) a.mean[row] = mean + rest;
    if (a.rstd) a.rstd[row] = rstd;
  }
}

template <DType T, int Threads>
int64_t launch(const NormArgs& a, heddle_cuda_job& job) {
  const int64_t blocks = ceil_div(a.rows, kThreads / Threads);
  if (blocks >= int64_t{1} << 31) return kUnsupported;
  const bool words = quads_are_words(a.width, a.x, a.residual, a.weight, a.bias, a.out, a.sum);
  HEDDLE_LAUNCH((norm_kernel<T, Threads>), dim3(static_cast<unsigned>(blocks)), dim3(kThreads), 0, job.stream, a, words);
  return job.launched();
}

}  // namespace

HEDDLE_CUDA_OP(norm, NormArgs) {
  if (a.rows == 0) return kOk;
  return with_float_type(a.type, [&](auto type) -> int64_t {
    constexpr DType T = decltype(type)::value;
    return a.width <= kWarpWidth ? launch<T, kWarp>(a, job) : launch<T, kThreads>(a, job);
  });
}

}  // namespace heddle
