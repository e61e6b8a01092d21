// Expert products with mxfp4 weights; a file a type, because nvcc takes seconds for each.
#include "moe/experts_product.cuh"

namespace heddle {

ExpertOps expert_ops_mxfp4() { return make_expert_ops<ExpertKind<PackType::kMxfp4, true>>(); }

}  // namespace heddle
