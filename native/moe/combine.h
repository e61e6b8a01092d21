// Weighted sum of each token's expert outputs: out[t] = sum over j = 0 .. k-1 of weights[t, j] * y[inverse[t, j]].
// A route with inverse -1 (masked or dropped) contributes nothing; without weights every weight is 1.
//
// Precision: products and sums in fp32, in the order of j whatever the threads; a bf16 or fp16 result is rounded
// once. Relative error against float64: <= 1e-6 in fp32. Cost: reads the kept rows once, writes T d elements; the
// sum stays in registers, four vectors at a time, so that the k rows are read in streams.
#pragma once
#include "core/dtype.h"
#include "simd/dispatch.h"

namespace heddle {

struct CombineArgs {
  const void* y = nullptr;  // [routes, width], fp32 | bf16 | fp16
  DType type = DType::kFloat32;
  int64_t routes = 0, tokens = 0, width = 0;
  int32_t k = 0;
  const int32_t* inverse = nullptr;  // [tokens, k], each in [-1, routes)
  const float* weights = nullptr;    // [tokens, k] or none
  void* out = nullptr;               // [tokens, width]
  DType out_type = DType::kFloat32;  // the type of y, or fp32
};

// kOk, kCancelled, or bad_value(i) for an inverse[i] out of range.
HEDDLE_DECLARE_OP(combine, CombineArgs)

}  // namespace heddle
