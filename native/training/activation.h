// Activations of training: y = f(x), and dx = dy f'(.) from what the forward kept (relu, tanh: y; gelu: x); add: a + b.
//
// relu max(0, x), derivative 0 at 0; tanh; gelu x Phi(x); gelu-tanh 0.5 x (1 + tanh(sqrt(2/pi) (x + 0.044715 x^3))).
// NaN stays NaN. Precision: fp32, relative error of the whole <= 1e-6. Cost: memory, 8 to 12 bytes per element.
#pragma once
#include "simd/dispatch.h"

namespace heddle {

enum class Elementwise : int32_t {
  kRelu = 0, kTanh, kGelu, kGeluTanh,
  kReluBackward, kTanhBackward, kGeluBackward, kGeluTanhBackward,
  kAdd,
};

struct ElementwiseArgs {
  Elementwise kind = Elementwise::kRelu;
  int64_t count = 0;
  const float* x = nullptr;  // forward: x; backward: dy; add: a
  const float* y = nullptr;  // backward: what was kept; add: b
  float* out = nullptr;
};

HEDDLE_DECLARE_OP(elementwise, ElementwiseArgs)

}  // namespace heddle
