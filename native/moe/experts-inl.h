// The vector parts of experts.h.

HEDDLE_INLINE vf apply_activation(const ExpertBank& b, vf g, vf u) {
  switch (b.activation) {
    case Activation::kSiLU: return mul(mul(g, sigmoid(g)), u);
    case Activation::kClampedSwiGLU: {
      // The limit first: min and max return their second operand where one is NaN, which must stay a NaN.
      g = min(set1(b.limit), g);
      u = max(set1(-b.limit), min(set1(b.limit), u));
      return mul(mul(g, sigmoid(mul(g, set1(b.alpha)))), add(u, set1(1.0f)));
    }
    case Activation::kGeluTanh: return mul(gelu_tanh(g), u);
    case Activation::kGeluErf: return mul(gelu_erf(g), u);
    case Activation::kReluSquared: {
      const vf r = max(set1(0.0f), g);
      return mul(mul(r, r), u);
    }
    case Activation::kRelu: return mul(max(set1(0.0f), g), u);
    case Activation::kIdentity: return mul(g, u);
  }
  return g;
}

static void pack_x(const ExpertsForwardArgs& a, const PackedMatrix& w, Operand kind, const int32_t* token, int rows,
                   float* scratch, char* out) {
  const int64_t padded = w.steps * pack_unit(w.type);
  if (a.type == DType::kFloat32 && w.k == padded && packs_values(kind)) {
    const float* row[kMaxTileRows];
    for (int m = 0; m < rows; ++m) row[m] = static_cast<const float*>(a.x) + token[m] * w.k;
    interleave([&](int m) { return row[m]; }, rows, padded, reinterpret_cast<float*>(out));
    return;
  }
  const int64_t row_bytes = w.k * (a.type == DType::kFloat32 ? 4 : 2);
  for (int m = 0; m < rows; ++m) {
    if (m + 1 < rows) {  // tokens lie anywhere: the hardware does not foresee the next row
      const char* next = static_cast<const char*>(a.x) + token[m + 1] * row_bytes;
      for (int64_t i = 0; i < row_bytes; i += 64) HEDDLE_PREFETCH_L2(next + i);
    }
    widen_row(a.x, a.type, token[m] * w.k, w.k, padded, scratch + m * padded);
  }
  pack_operand(kind, w, scratch, padded, rows, out);
}

static void pack_h(const PackedMatrix& w, Operand kind, float* h, int64_t stride, int rows, char* out) {
  pack_operand(kind, w, h, stride, rows, out);
}

// Bias of columns [column, column + W), zero beyond the end.
HEDDLE_INLINE vf bias_at(const std::vector<float>& bias, int64_t column) {
  const int64_t left = static_cast<int64_t>(bias.size()) - column;
  if (left >= W) return load(bias.data() + column);
  return left > 0 ? load_n(bias.data() + column, static_cast<int>(left), 0.0f) : set1(0.0f);
}

// c [rows][32] -> the panel's columns of h at `h`, which may be c.
HEDDLE_INLINE void activated(const ExpertBank& b, const PackedExpert& e, int64_t panel, const float* c, int rows, float* h,
                             int64_t stride) {
  const bool biased = !e.up_bias.empty();
  const int width = b.gated ? kHalfPanel : kPanel;
  for (int m = 0; m < rows; ++m) {
    for (int i = 0; i < width; i += W) {
      const int64_t column = panel * width + i;
      vf first = load(c + m * kPanel + i);
      vf second = set1(1.0f);
      if (b.gated) {
        second = load(c + m * kPanel + kHalfPanel + i);
        if (biased) {
          first = add(first, bias_at(e.gate_bias, column));
          second = add(second, bias_at(e.up_bias, column));
        }
      } else if (biased) {
        first = add(first, bias_at(e.up_bias, column));
      }
      store(h + m * stride + i, apply_activation(b, first, second));
    }
  }
}

static void activate(const ExpertBank& b, const PackedExpert& e, int64_t panel, const float* c, int rows, float* h,
                     int64_t stride) {
  activated(b, e, panel, c, rows, h + panel * (b.gated ? kHalfPanel : kPanel), stride);
}

static void activate_operand(const ExpertBank& b, const PackedExpert& e, int64_t panel, float* c, int rows, char* out) {
  const int64_t width = b.gated ? kHalfPanel : kPanel, first = panel * width;
  const int64_t left = b.down_shape.steps * pack_unit(b.type) - first;
  if (left <= 0) return;
  activated(b, e, panel, c, rows, c, kPanel);
  interleave_rows(c, kPanel, rows, left < width ? left : width, reinterpret_cast<float*>(out) + first * rows);
}

static void write_down(const PackedExpert& e, int64_t d, int64_t panel, const float* c, int rows, float* y) {
  for (int m = 0; m < rows; ++m) {
    // The same rows' part of the next panel: by the time it is written, the stores find it in the cache.
    HEDDLE_PREFETCH_L2(y + m * d + (panel + 1) * kPanel);
    HEDDLE_PREFETCH_L2(y + m * d + (panel + 1) * kPanel + 16);
    for (int i = 0; i < kPanel; i += W) {
      const int64_t column = panel * kPanel + i;
      const int64_t left = d - column;
      if (left <= 0) break;
      vf v = load(c + m * kPanel + i);
      if (!e.down_bias.empty()) v = add(v, bias_at(e.down_bias, column));
      if (left >= W) {
        store(y + m * d + column, v);
      } else {
        store_n(y + m * d + column, v, static_cast<int>(left));
      }
    }
  }
}

static void combine_rows(const float* const* y, const float* weight, int64_t count, int64_t d, void* out, DType type,
                         int64_t offset) {
  for (int64_t i = 0; i < d; i += W) {
    const int n = d - i < W ? static_cast<int>(d - i) : W;
    vf sum = set1(0.0f);
    for (int64_t j = 0; j < count; ++j) {
      const vf v = n == W ? load(y[j] + i) : load_n(y[j] + i, n, 0.0f);
      sum = fma(set1(weight[j]), v, sum);
    }
    store_to(out, type, offset + i, sum, n);
  }
}

const ExpertStages& expert_stages() {
  static const ExpertStages s = {pack_x, pack_h, activate, activate_operand, write_down, combine_rows};
  return s;
}
