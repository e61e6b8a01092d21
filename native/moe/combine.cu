// combine on the device: a thread sums four neighbouring columns of one token (one column where rows are not whole
// words), over the slots in ascending order with fused multiply-adds, as the CPU does. Bound by reading the kept rows.
#include "moe/combine.h"

#include "cuda/job.h"
#include "cuda/vector.cuh"

namespace heddle {
namespace {

constexpr int kThreads = 128;

template <DType Y, DType O, int V>
__global__ void __launch_bounds__(kThreads) combine_kernel(CombineArgs a, unsigned long long* bad) {
  const int64_t token = blockIdx.x;
  const int64_t column = (int64_t{blockIdx.y} * kThreads + threadIdx.x) * V;
  const int32_t* at = a.inverse + token * a.k;
  if (column == 0) {
    for (int32_t j = 0; j < a.k; ++j) {
      if (at[j] < -1 || at[j] >= a.routes) report_bad_value(bad, token * a.k + j);
    }
  }
  if (column >= a.width) return;
  float sum[V] = {};
  for (int32_t j = 0; j < a.k; ++j) {
    const int32_t row = at[j];
    if (row < 0 || row >= a.routes) continue;
    const float weight = a.weights ? a.weights[token * a.k + j] : 1.0f;
    float y[V];
    load_values<Y, V>(a.y, row * a.width + column, y);
#pragma unroll
    for (int v = 0; v < V; ++v) sum[v] = fmaf(y[v], weight, sum[v]);
  }
  store_values<O, V>(a.out, token * a.width + column, sum);
}

template <DType Y, DType O, int V>
int64_t launch(const CombineArgs& a, heddle_cuda_job& job, unsigned long long* bad) {
  // At least one block a token, which checks its plan even where rows are empty.
  const int64_t blocks = a.width > 0 ? ceil_div(a.width, int64_t{kThreads} * V) : 1;
  if (blocks > 65535) return kUnsupported;
  const dim3 grid(static_cast<unsigned>(a.tokens), static_cast<unsigned>(blocks));
  HEDDLE_LAUNCH((combine_kernel<Y, O, V>), grid, dim3(kThreads), 0, job.stream, a, bad);
  return job.launched();
}

}  // namespace

HEDDLE_CUDA_OP(combine, CombineArgs) {
  if (a.tokens == 0) return kOk;
  unsigned long long* bad = job.status();
  if (!bad) return kNoMemory;
  return with_float_type(a.type, [&](auto y) -> int64_t {
    constexpr DType Y = decltype(y)::value;
    constexpr DType F = DType::kFloat32;
    const bool vectors = is_aligned(16, {a.y, a.out}, a.width * 4);
    if (a.out_type == F) return vectors ? launch<Y, F, 4>(a, job, bad) : launch<Y, F, 1>(a, job, bad);
    return vectors ? launch<Y, Y, 4>(a, job, bad) : launch<Y, Y, 1>(a, job, bad);
  });
}

}  // namespace heddle
