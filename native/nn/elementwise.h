// Element by element, and means over tokens: what a transformer block needs beside products, norms and attention.
// Arithmetic in fp32, results rounded once to their type. All are bound by memory: every element is read and written
// once.
#pragma once
#include "core/dtype.h"
#include "simd/dispatch.h"

namespace heddle {

// out = x Phi(x) (Hendrycks and Gimpel 2016), or its tanh form 0.5 x (1 + tanh(sqrt(2 / pi) (x + 0.044715 x^3))).
// -Inf gives NaN in the erf form, as 0 times infinity does; 5e-7 of |x|.
struct GeluArgs {
  const void* x = nullptr;  // [count]
  DType type = DType::kFloat32;
  int64_t count = 0;
  bool tanh = false;
  void* out = nullptr;  // of x's type; may be x itself
};
HEDDLE_DECLARE_OP(gelu, GeluArgs)

// out = x + gate * y.
struct AddResidualArgs {
  const void *x = nullptr, *y = nullptr;  // [rows, width]
  DType type = DType::kFloat32;
  int64_t rows = 0, width = 0;
  const float* gate = nullptr;  // [gates]
  int64_t gates = 0;            // 0: no gate; 1; or width
  void* out = nullptr;          // of x's type; may be x or y itself
};
HEDDLE_DECLARE_OP(add_residual, AddResidualArgs)

// out[b] = mean over tokens of x[b]. Sums of kMeanRun tokens in fp32, then sums of those in order.
struct MeanTokensArgs {
  const void* x = nullptr;  // [batch, tokens, width]
  DType type = DType::kFloat32;
  int64_t batch = 0, tokens = 0, width = 0;
  void* out = nullptr;  // [batch, width] of x's type
};
constexpr int64_t kMeanRun = 64;
HEDDLE_DECLARE_OP(mean_tokens, MeanTokensArgs)

}  // namespace heddle
