// Activations of training: y = f(x), and dx = dy f'(.) from what the forward kept (relu, tanh: y; gelu: x).
//
// relu max(0, x), derivative 0 at 0; tanh; gelu as in nn/elementwise.h, in both forms.
// NaN stays NaN. Precision: fp32, relative error of the whole <= 1e-6. Cost: memory, 8 to 12 bytes per element.
#pragma once
#include "simd/dispatch.h"

namespace heddle {

enum class Elementwise : int32_t {
  kRelu = 0, kTanh, kReluBackward, kTanhBackward, kGeluBackward, kGeluTanhBackward,
};

struct ElementwiseArgs {
  Elementwise kind = Elementwise::kRelu;
  int64_t count = 0;
  const float* x = nullptr;  // backward: dy
  const float* y = nullptr;  // backward: what was kept
  float* out = nullptr;
};

HEDDLE_DECLARE_OP(elementwise, ElementwiseArgs)

}  // namespace heddle
