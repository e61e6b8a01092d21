#include "core/workspace.h"
#include "nn/norm.h"

namespace heddle {

Status norm_backward(const NormBackwardArgs& args, const Exec& exec) {
  NormBackwardArgs a = args;
  const int64_t runs = (a.rows + kNormRun - 1) / kNormRun;
  const bool sums = a.grad_weight || a.grad_bias;
  AlignedBuffer<float> partial;
  if (sums) {
    if (!partial.reset(static_cast<size_t>(runs * 2 * a.width))) return kNoMemory;
    a.partial = partial.data();
  }
  const Status status = norm_backward_rows(a, exec);
  if (status != kOk || !sums) return status;
  // Runs in order; a block of columns of all runs per task.
  const bool done = parallel_for(exec, a.width, 64, [&](int64_t begin, int64_t end) {
    float* const out[] = {a.grad_weight, a.grad_bias};
    for (int which = 0; which < 2; ++which) {
      if (!out[which]) continue;
      double sum[64] = {};
      for (int64_t run = 0; run < runs; ++run) {
        const float* from = a.partial + (run * 2 + which) * a.width;
        for (int64_t i = begin; i < end; ++i) sum[i - begin] += from[i];
      }
      for (int64_t i = begin; i < end; ++i) out[which][i] = static_cast<float>(sum[i - begin]);
    }
  });
  return done ? kOk : kCancelled;
}

}  // namespace heddle
