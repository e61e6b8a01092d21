// Grouped products with int4 weights: groups of 32, and longer ones.
#include "gemm/device_product.cuh"

namespace heddle {

ProductOps product_ops_int4(bool small) {
  if (small) return make_product_ops<WeightKind<PackType::kInt4, true>>();
  return make_product_ops<WeightKind<PackType::kInt4, false>>();
}

}  // namespace heddle
