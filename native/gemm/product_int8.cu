// Grouped products with int8 weights; a file a type, because nvcc takes seconds for each.
#include "gemm/device_product.cuh"

namespace heddle {

ProductOps product_ops_int8() { return make_product_ops<WeightKind<PackType::kInt8>>(); }

}  // namespace heddle
