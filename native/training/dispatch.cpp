// The one place where a training op meets the instruction set chosen at run time.
#include <cmath>

#include "core/workspace.h"
#include "training/activation.h"
#include "training/cross_entropy.h"
#include "training/group_norm.h"
#include "training/optimizer_update.h"

namespace heddle {

HEDDLE_DEFINE_OP(optimizer_pass, OptimizerUpdateArgs)
HEDDLE_DEFINE_OP(lamb_finish, OptimizerUpdateArgs)
HEDDLE_DEFINE_OP(elementwise, ElementwiseArgs)
HEDDLE_DEFINE_OP(group_norm, GroupNormArgs)
HEDDLE_DEFINE_OP(group_norm_backward, GroupNormArgs)
HEDDLE_DEFINE_OP(cross_entropy, CrossEntropyArgs)

Status optimizer_update(const OptimizerUpdateArgs& args, const Exec& exec) {
  if (args.rule != UpdateRule::kLamb) return optimizer_pass(args, exec);
  const int64_t blocks = (args.count + kUpdateBlock - 1) / kUpdateBlock;
  AlignedBuffer<double> norms(static_cast<size_t>(2 * blocks));
  if (!norms) return kNoMemory;
  OptimizerUpdateArgs a = args;
  a.norms = norms.data();
  const Status status = optimizer_pass(a, exec);
  if (status != kOk) return status;
  double p = 0, r = 0;
  for (int64_t b = 0; b < blocks; ++b) p += a.norms[2 * b], r += a.norms[2 * b + 1];
  a.ratio = p > 0 && r > 0 ? static_cast<float>(std::sqrt(p) / std::sqrt(r)) : 1.0f;
  return lamb_finish(a, exec);
}

}  // namespace heddle
