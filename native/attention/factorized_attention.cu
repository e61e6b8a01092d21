// factorized_attention() on the device: each axis is a problem of attention() by strides, order and prefix
// (axis_problem.h), so nothing is transposed. The class token's outputs, one a frame in fp32, are averaged in the order of
// the frames, as on the CPU.
#include "attention/attention_launch.h"
#include "attention/axis_problem.h"
#include "attention/frame_mean.cuh"

namespace heddle {

HEDDLE_CUDA_OP(factorized_attention, FactorizedAttentionArgs) {
  const FactorizedProblem& f = a.problem;
  const int64_t count = f.class_query ? f.batch * f.query_heads * f.value_dim : 0;
  float* class_output = nullptr;
  if (count * f.frames > 0) {
    class_output = job.scratch<float>(count * f.frames);
    if (!class_output) return kNoMemory;
  }
  AxisPass passes[2];
  const int count_of_passes = axis_passes(f, passes);
  for (int i = 0; i < count_of_passes; ++i) {
    const int64_t status = launch_attention_on(pass_args(a, passes[i], class_output), job);
    if (status != kOk) return status;
  }
  if (count == 0) return kOk;
  return launch_frame_mean(class_output, f.batch, f.frames, f.query_heads, f.value_dim, frame_weight(f),
                           f.class_output_stride, f.type, a.class_output, job);
}

}  // namespace heddle
