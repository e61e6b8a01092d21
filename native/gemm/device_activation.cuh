// The activations of gemm/activation.h on one value. A NaN stays one.
#pragma once
#include "cuda/device.cuh"
#include "gemm/activation.h"

namespace heddle {

__device__ __forceinline__ float sigmoid(float v) { return 1.0f / (1.0f + expf(-v)); }
__device__ __forceinline__ float gelu_tanh(float v) {
  return v * sigmoid(1.5957691216057308f * fmaf(v * v * v, 0.044715f, v));
}
__device__ __forceinline__ float gelu_erf(float v) { return 0.5f * v * (1.0f + erff(v * 0.70710678118654752f)); }

__device__ __forceinline__ float linear_activation(LinearActivation a, float v) {
  const float positive = v < 0.0f ? 0.0f : v;
  switch (a) {
    case LinearActivation::kSiLU: return v * sigmoid(v);
    case LinearActivation::kGeluTanh: return gelu_tanh(v);
    case LinearActivation::kGeluErf: return gelu_erf(v);
    case LinearActivation::kRelu: return positive;
    case LinearActivation::kReluSquared: return positive * positive;
    case LinearActivation::kSigmoid: return sigmoid(v);
    case LinearActivation::kTanh: return tanhf(v);
    default: return v;
  }
}

}  // namespace heddle
