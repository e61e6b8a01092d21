// See activation.h.

HEDDLE_INLINE vf gelu_derivative(vf x) {
  const vf cdf = mul(set1(0.5f), add(set1(1.0f), erf(mul(x, set1(0.70710678118654752f)))));
  const vf density = mul(set1(0.39894228040143268f), exp(mul(set1(-0.5f), mul(x, x))));
  return fma(x, density, cdf);
}

HEDDLE_INLINE vf gelu_tanh_derivative(vf x) {
  const vf square = mul(x, x);
  const vf s = sigmoid(mul(mul(set1(1.5957691216057308f), x), fma(square, set1(0.044715f), set1(1.0f))));
  const vf slope = mul(set1(1.5957691216057308f), fma(square, set1(0.134145f), set1(1.0f)));
  return fma(mul(mul(x, s), sub(set1(1.0f), s)), slope, s);
}

template <Elementwise K>
HEDDLE_INLINE vf elementwise_value(vf x, vf y) {
  switch (K) {
    case Elementwise::kRelu: return max(set1(0.0f), x);
    case Elementwise::kTanh: return tanh(x);
    case Elementwise::kReluBackward: return select(gt(y, set1(0.0f)), x, set1(0.0f));
    case Elementwise::kTanhBackward: return mul(x, fnma(y, y, set1(1.0f)));
    case Elementwise::kGeluBackward: return mul(x, gelu_derivative(y));
    default: return mul(x, gelu_tanh_derivative(y));
  }
}

template <Elementwise K>
HEDDLE_INLINE Status elementwise_all(const ElementwiseArgs& a, const Exec& exec) {
  constexpr bool two = static_cast<int32_t>(K) >= static_cast<int32_t>(Elementwise::kReluBackward);
  const bool done = parallel_for(exec, a.count, 8192, [&](int64_t from, int64_t to) {
    for (int64_t i = from; i < to; i += W) {
      const int n = to - i < W ? static_cast<int>(to - i) : W;
      const vf x = part_load(a.x + i, n);
      part_store(a.out + i, elementwise_value<K>(x, two ? part_load(a.y + i, n) : x), n);
    }
  });
  return done ? kOk : kCancelled;
}

Status elementwise(const ElementwiseArgs& a, const Exec& exec) {
  switch (a.kind) {
#define HEDDLE_KIND(k) case Elementwise::k: return elementwise_all<Elementwise::k>(a, exec);
    HEDDLE_KIND(kRelu)
    HEDDLE_KIND(kTanh)
    HEDDLE_KIND(kReluBackward)
    HEDDLE_KIND(kTanhBackward)
    HEDDLE_KIND(kGeluBackward)
    HEDDLE_KIND(kGeluTanhBackward)
#undef HEDDLE_KIND
  }
  return kUnsupported;
}
