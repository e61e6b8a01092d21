// Expert products with bfloat16 weights; a file a type, because nvcc takes seconds for each.
#include "moe/experts_product.cuh"

namespace heddle {

ExpertOps expert_ops_bfloat16() { return make_expert_ops<ExpertKind<PackType::kBFloat16>>(); }

}  // namespace heddle
