// Sums over the frames of what the class token has in each: its outputs forward, its gradients backward.
#pragma once
#include "cuda/job.h"

namespace heddle {

constexpr int kMeanThreads = 256;

// out[batch][head][i] = factor times the sum over the frames of from[batch][frame][head][i], in their order; a thread an
// element.
template <DType T>
__global__ void __launch_bounds__(kMeanThreads) frame_mean_kernel(const float* from, int64_t count, int64_t frames,
                                                                  int64_t heads, int64_t dim, float factor,
                                                                  int64_t batch_stride, int64_t head_stride, void* out) {
  const int64_t at = int64_t{blockIdx.x} * kMeanThreads + threadIdx.x;
  if (at >= count) return;
  const int64_t i = at % dim, h = at / dim % heads, b = at / (dim * heads);
  float sum = 0.0f;
  for (int64_t t = 0; t < frames; ++t) sum += from[((b * frames + t) * heads + h) * dim + i];
  store_float<T>(out, b * batch_stride + h * head_stride + i, sum * factor);
}

inline int64_t launch_frame_mean(const float* from, int64_t batch, int64_t frames, int64_t heads, int64_t dim, float factor,
                                 const int64_t* stride, DType type, void* out, heddle_cuda_job& job) {
  const int64_t count = batch * heads * dim;
  if (count == 0) return kOk;
  return with_float_type(type, [&](auto tag) {
    constexpr DType kType = decltype(tag)::value;
    HEDDLE_LAUNCH((frame_mean_kernel<kType>), dim3(static_cast<unsigned>(ceil_div(count, kMeanThreads))),
                  dim3(kMeanThreads), 0, job.stream, from, count, frames, heads, dim, factor, stride[0], stride[1], out);
    return job.launched();
  });
}

}  // namespace heddle
