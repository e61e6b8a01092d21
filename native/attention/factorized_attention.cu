// factorized_attention() on the device: each axis is a problem of attention() by strides, order and prefix
// (axis_problem.h), so nothing is transposed. The class token's outputs, one a frame in fp32, are averaged in the order of
// the frames, as on the CPU.
#include "attention/attention_launch.h"
#include "attention/axis_problem.h"

namespace heddle {
namespace {

constexpr int kMeanThreads = 256;

// out[batch][head][i] = factor times the sum over the frames of from[batch][frame][head][i]; a thread an element.
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

}  // namespace

HEDDLE_CUDA_OP(factorized_attention, FactorizedAttentionArgs) {
  const FactorizedProblem& f = a.problem;
  const int64_t count = f.class_query ? f.batch * f.query_heads * f.value_dim : 0;
  float* class_output = nullptr;
  if (count * f.frames > 0) {
    class_output = job.scratch<float>(count * f.frames);
    if (!class_output) return kNoMemory;
  }
  AxisPass passes[2];
  const int passes_count = axis_passes(f, passes);
  for (int i = 0; i < passes_count; ++i) {
    const AxisPass& pass = passes[i];
    AttentionArgs args;
    args.problem = axis_problem(f, pass.axis, pass.first, pass.heads);
    args.output = moved(a.output, f.type, pass.first * f.output_stride[3]);
    args.log_sum_exp = a.log_sum_exp ? a.log_sum_exp + pass.first * lse_head_stride(f) : nullptr;
    args.prefix_output = class_output;
    const int64_t status = launch_attention_on(args, job);
    if (status != kOk) return status;
  }
  if (count == 0) return kOk;
  return with_float_type(f.type, [&](auto type) {
    constexpr DType kType = decltype(type)::value;
    HEDDLE_LAUNCH((frame_mean_kernel<kType>), dim3(static_cast<unsigned>(ceil_div(count, kMeanThreads))),
                  dim3(kMeanThreads), 0, job.stream, class_output, count, f.frames, int64_t{f.query_heads},
                  int64_t{f.value_dim}, frame_weight(f), f.class_output_stride[0], f.class_output_stride[1],
                  a.class_output);
    return job.launched();
  });
}

}  // namespace heddle
