// gelu and addResidual on the device; definitions in elementwise.h. A thread takes two quads of elements, read before either
// is computed. Bound by memory.
#include "nn/elementwise.h"

#include "cuda/job.h"
#include "cuda/vector.cuh"
#include "gemm/device_activation.cuh"

namespace heddle {
namespace {

constexpr int kThreads = 256, kQuads = 2;

__device__ __forceinline__ int64_t quad_at(int q) {
  return ((int64_t{blockIdx.x} * kQuads + q) * kThreads + threadIdx.x) * 4;
}

template <DType T>
__global__ void __launch_bounds__(kThreads) gelu_kernel(GeluArgs a, bool words) {
  float v[kQuads][4];
#pragma unroll
  for (int q = 0; q < kQuads; ++q) load_quad<T>(a.x, quad_at(q), a.count - quad_at(q), words, v[q]);
#pragma unroll
  for (int q = 0; q < kQuads; ++q) {
#pragma unroll
    for (int j = 0; j < 4; ++j) v[q][j] = a.tanh ? gelu_tanh(v[q][j]) : gelu_erf(v[q][j]);
    store_quad<T>(a.out, quad_at(q), a.count - quad_at(q), words, v[q]);
  }
}

template <DType T>
__global__ void __launch_bounds__(kThreads) add_residual_kernel(AddResidualArgs a, bool words) {
  const int64_t count = a.rows * a.width;
  float x[kQuads][4], y[kQuads][4];
#pragma unroll
  for (int q = 0; q < kQuads; ++q) {
    load_quad<T>(a.x, quad_at(q), count - quad_at(q), words, x[q]);
    load_quad<T>(a.y, quad_at(q), count - quad_at(q), words, y[q]);
  }
#pragma unroll
  for (int q = 0; q < kQuads; ++q) {
    const int64_t i = quad_at(q);
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      if (a.gates == 0) x[q][j] += y[q][j];
      else if (i + j < count) x[q][j] = fmaf(a.gate[a.gates == 1 ? 0 : (i + j) % a.width], y[q][j], x[q][j]);
    }
    store_quad<T>(a.out, i, count - i, words, x[q]);
  }
}

template <class Args>
int64_t launch(void (*kernel)(Args, bool), const Args& a, int64_t count, bool words, heddle_cuda_job& job) {
  const int64_t blocks = ceil_div(count, int64_t{kThreads} * kQuads * 4);
  if (blocks >= int64_t{1} << 31) return kUnsupported;
  HEDDLE_LAUNCH(kernel, dim3(static_cast<unsigned>(blocks)), dim3(kThreads), 0, job.stream, a, words);
  return job.launched();
}

}  // namespace

HEDDLE_CUDA_OP(gelu, GeluArgs) {
  if (a.count == 0) return kOk;
  return with_float_type(a.type, [&](auto type) -> int64_t {
    return launch(gelu_kernel<decltype(type)::value>, a, a.count, quads_are_words(a.count, a.x, a.out), job);
  });
}

HEDDLE_CUDA_OP(add_residual, AddResidualArgs) {
  const int64_t count = a.rows * a.width;
  if (count == 0) return kOk;
  return with_float_type(a.type, [&](auto type) -> int64_t {
    return launch(add_residual_kernel<decltype(type)::value>, a, count, quads_are_words(count, a.x, a.y, a.out), job);
  });
}

}  // namespace heddle
