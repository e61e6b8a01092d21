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
  // Of the class token in each frame: output, log-sum-exp, and the gradients of q, k and v.
  float *output = nullptr, *lse = nullptr, *query = nullptr, *key = nullptr, *value = nullptr;
  if (rows > 0) {
    const auto scratch = [&](int64_t each) { return job.scratch<float>(each > 0 ? rows * each : 1); };
    output = scratch(f.query_heads * value_dim);
    lse = scratch(f.query_heads);
    query = scratch(int64_t{f.query_heads} * f.head_dim);
    key = scratch(int64_t{f.key_heads} * f.head_dim);
    value = scratch(f.key_heads * value_dim);
    if (!output || !lse || !query || !key || !value) return kNoMemory;
    AttentionArgs forward;  // the class token alone as query
    forward.problem = axis_problem(f, Axis::kSpace, 0, f.query_heads);
    forward.problem.queries = 1;
    forward.prefix_output = output;
    forward.prefix_lse = lse;
    const int64_t status = launch_attention_on(forward, job);
    if (status != kOk) return status;
  }
  AxisPass passes[2];
  const int count = axis_passes(f, passes);
  for (int i = 0; i < count; ++i) {
    const AxisPass& pass = passes[i];
    AttentionBackwardArgs args;
    args.problem = axis_problem(f, pass.axis, pass.first, pass.heads);
    args.first_head = pass.first;
    args.heads = f.query_heads;
    args.upstream = a.upstream;
    args.output = moved(a.output, f.type, pass.first * f.output_stride[3]);
    args.log_sum_exp = a.log_sum_exp + pass.first * lse_head_stride(f);
    args.query_grad = a.query_grad;
    args.key_grad = a.key_grad;
    args.value_grad = a.value_grad;
    args.bias_grad = a.bias_grad;
    args.prefix_upstream = a.class_upstream;
    args.prefix_weight = frame_weight(f);
    args.prefix_output = output;
    args.prefix_lse = lse;
    args.prefix_query_grad = query;
    args.prefix_key_grad = key;
    args.prefix_value_grad = value;
    const int64_t status = launch_attention_backward_on(args, job);
    if (status != kOk) return status;
  }
  if (!f.class_query) return kOk;
  const auto reduce = [&](const float* from, int64_t heads, int64_t dim, void* to) {
    const int64_t stride[2] = {heads * dim, dim};
    return launch_frame_mean(from, f.batch, f.frames, heads, dim, 1.0f, stride, f.type, to, job);
  };
  int64_t status = reduce(query, f.query_heads, f.head_dim, a.class_query_grad);
  if (status == kOk) status = reduce(key, f.key_heads, f.head_dim, a.class_key_grad);
  if (status == kOk) status = reduce(value, f.key_heads, value_dim, a.class_value_grad);
  return status;
}

}  // namespace heddle
