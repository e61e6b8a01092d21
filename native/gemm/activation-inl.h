// The activations of linear.h on vectors.

HEDDLE_INLINE vf linear_activation(LinearActivation a, vf v) {
  switch (a) {
    case LinearActivation::kSiLU: return mul(v, sigmoid(v));
    case LinearActivation::kGeluTanh: return gelu_tanh(v);
    case LinearActivation::kGeluErf: return gelu_erf(v);
    case LinearActivation::kSigmoid: return sigmoid(v);
    case LinearActivation::kRelu: return max(set1(0.0f), v);
    case LinearActivation::kReluSquared: {
      const vf r = max(set1(0.0f), v);
      return mul(r, r);
    }
    case LinearActivation::kTanh: return tanh(v);
    default: return v;
  }
}
