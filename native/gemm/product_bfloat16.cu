// Grouped products with bfloat16 weights; a file a type, because nvcc takes seconds for each.
#include "gemm/device_product.cuh"

namespace heddle {

ProductOps product_ops_bfloat16() { return make_product_ops<WeightKind<PackType::kBFloat16>>(); }

}  // namespace heddle
