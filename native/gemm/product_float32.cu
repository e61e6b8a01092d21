// Grouped products with float32 weights; a file a type, because nvcc takes seconds for each.
#include "gemm/device_product.cuh"

namespace heddle {

ProductOps product_ops_float32() { return make_product_ops<WeightKind<PackType::kFloat32>>(); }

}  // namespace heddle
