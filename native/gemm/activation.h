// Activations behind products.
#pragma once
#include <cstdint>

namespace heddle {

// Of one value.
enum class LinearActivation : int32_t { kNone = 0, kSiLU, kGeluTanh, kGeluErf, kRelu, kReluSquared, kSigmoid, kTanh };

// Of a gate g and a value u.
enum class Activation : int32_t {
  kSiLU = 0,        // SwiGLU: g sigmoid(g) * u
  kClampedSwiGLU,   // gpt-oss: g = min(g, limit), u = clamp(u, -limit, limit): g sigmoid(alpha g) * (u + 1)
  kGeluTanh,        // GeGLU with the tanh approximation
  kGeluErf,         // GeGLU, exact
  kReluSquared,     // relu(g)^2 * u
  kRelu,            // relu(g) * u
  kIdentity,        // g * u
};

}  // namespace heddle
