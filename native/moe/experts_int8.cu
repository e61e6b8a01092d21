// Expert products with int8 weights; a file a type, because nvcc takes seconds for each.
#include "moe/experts_product.cuh"

namespace heddle {

ExpertOps expert_ops_int8() { return make_expert_ops<ExpertKind<PackType::kInt8>>(); }

}  // namespace heddle
