// Grouped products with mxfp4 weights; a file a type, because nvcc takes seconds for each.
#include "gemm/device_product.cuh"

namespace heddle {

ProductOps product_ops_mxfp4() { return make_product_ops<WeightKind<PackType::kMxfp4, true>>(); }

}  // namespace heddle
