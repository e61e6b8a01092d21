// Expert products with int4 weights and zero points: groups of 32, and longer ones.
#include "moe/experts_product.cuh"

namespace heddle {

ExpertOps expert_ops_int4_points(bool small) {
  if (small) return make_expert_ops<ExpertKind<PackType::kInt4, true, true>>();
  return make_expert_ops<ExpertKind<PackType::kInt4, false, true>>();
}

}  // namespace heddle
