// Expert products with int4 weights: groups of 32, and longer ones.
#include "moe/experts_product.cuh"

namespace heddle {

ExpertOps expert_ops_int4(bool small) {
  if (small) return make_expert_ops<ExpertKind<PackType::kInt4, true>>();
  return make_expert_ops<ExpertKind<PackType::kInt4, false>>();
}

}  // namespace heddle
