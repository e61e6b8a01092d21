// Grouped products with float8 weights; a file a type, because nvcc takes seconds for each.
#include "gemm/device_product.cuh"

namespace heddle {

ProductOps product_ops_float8() { return make_product_ops<WeightKind<PackType::kFloat8>>(); }

}  // namespace heddle
