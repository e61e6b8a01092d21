// Expert products with float32 weights; a file a type, because nvcc takes seconds for each.
#include "moe/experts_product.cuh"

namespace heddle {

ExpertOps expert_ops_float32() { return make_expert_ops<ExpertKind<PackType::kFloat32>>(); }

}  // namespace heddle
