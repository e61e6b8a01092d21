// factorized_attention_backward() on the device: each axis is a problem of attention_backward() (axis_problem.h). The
// class token's outputs in the frames were not kept: they are computed again, and its gradients in them are added up in
// the order of the frames.
#include "attention/attention_backward_launch.h"
#include "attention/attention_launch.h"
#include "attention/axis_problem.h"
#include "attention/frame_mean.cuh"

namespace heddle {

HEDDLE_CUDA_OP(factorized_attention_backward, FactorizedAttentionBackwardArgs) {
  const FactorizedProblem& f = a.problem;
  const int64_t rows = f.class_query ? f.batch * f.frames : 0, value_dim = f.value_dim;
  ClassFrames frames;
  if (rows > 0) {
    const auto scratch = [&](int64_t each) { return job.scratch<float>(each > 0 ? rows * each : 1); };
    frames.output = scratch(f.query_heads * value_dim);
    frames.lse = scratch(f.query_heads);
    frames.query = scratch(int64_t{f.query_heads} * f.head_dim);
    frames.key = scratch(int64_t{f.key_heads} * f.head_dim);
    frames.value = scratch(f.key_heads * value_dim);
    if (!frames.output || !frames.lse || !frames.query || !frames.key || !frames.value) return kNoMemory;
    const int64_t status = launch_attention_on(class_args(f, frames), job);
    if (status != kOk) return status;
  }
  AxisPass passes[2];
  const int count = axis_passes(f, passes);
  for (int i = 0; i < count; ++i) {
    const int64_t status = launch_attention_backward_on(pass_args(a, passes[i], frames), job);
    if (status != kOk) return status;
  }
  if (!f.class_query) return kOk;
  const auto reduce = [&](const float* from, int64_t heads, int64_t dim, void* to) {
    const int64_t stride[2] = {heads * dim, dim};
    return launch_frame_mean(from, f.batch, f.frames, heads, dim, 1.0f, stride, f.type, to, job);
  };
  int64_t status = reduce(frames.query, f.query_heads, f.head_dim, a.class_query_grad);
  if (status == kOk) status = reduce(frames.key, f.key_heads, f.head_dim, a.class_key_grad);
  if (status == kOk) status = reduce(frames.value, f.key_heads, value_dim, a.class_value_grad);
  return status;
}

}  // namespace heddle
