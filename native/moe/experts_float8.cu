// Expert products with float8 weights; a file a type, because nvcc takes seconds for each.
#include "moe/experts_product.cuh"

namespace heddle {

ExpertOps expert_ops_float8() { return make_expert_ops<ExpertKind<PackType::kFloat8>>(); }

}  // namespace heddle
