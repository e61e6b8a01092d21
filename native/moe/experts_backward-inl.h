// The vector parts of experts_backward.h.

HEDDLE_INLINE int64_t source_index(const int32_t* row, int64_t i) { return row ? row[i] : i; }

static void pack_panel(PackType type, const MatrixSource& s, const int32_t* row, int64_t column, int64_t columns, int64_t k,
                       char* out) {
  const int64_t left = columns - column;
  const int n = left < kPanel ? static_cast<int>(left) : kPanel;
  float* f = reinterpret_cast<float*>(out);
  uint16_t* h = reinterpret_cast<uint16_t*>(out);
  const bool pairs = type == PackType::kBFloat16;
  const int64_t padded = pairs ? (k + 1) / 2 * 2 : k;
  // 16 values of k at a time: a source whose columns are far apart is then read in whole cache lines.
  float block[16 * kPanel];
  for (int64_t k0 = 0; k0 < padded; k0 += 16) {
    const int64_t steps = padded - k0 < 16 ? padded - k0 : 16;
    float* b = pairs ? block : f + k0 * kPanel;
    const int64_t inside = k - k0 < steps ? k - k0 : steps;
    if (s.n_stride == 1) {
      for (int64_t i = 0; i < inside; ++i) {
        widen_row(s.data, s.type, source_index(row, k0 + i) * s.k_stride + column, n, kPanel, b + i * kPanel);
      }
    } else {
      for (int c = 0; c < kPanel; ++c) {
        const int64_t first = (column + c) * s.n_stride;
        if (c < n && s.k_stride == 1 && !row) {
          float line[16];
          widen_row(s.data, s.type, first + k0, inside, 16, line);
          for (int64_t i = 0; i < inside; ++i) b[i * kPanel + c] = line[i];
          continue;
        }
        for (int64_t i = 0; i < inside; ++i) {
          b[i * kPanel + c] = c < n ? load_element(s.data, s.type, first + source_index(row, k0 + i) * s.k_stride) : 0.0f;
        }
      }
    }
    if (!pairs) continue;
    for (int c = 0; inside < steps && c < kPanel; ++c) b[inside * kPanel + c] = 0.0f;
    for (int64_t i = 0; i < steps; i += 2) {
      uint16_t even[kPanel], odd[kPanel];
      for (int c = 0; c < kPanel; c += W) {
        store_bf16(even + c, load(b + i * kPanel + c));
        store_bf16(odd + c, load(b + (i + 1) * kPanel + c));
      }
      uint16_t* o = h + (k0 + i) * kPanel;
      for (int c = 0; c < kPanel; ++c) o[2 * c] = even[c], o[2 * c + 1] = odd[c];
    }
  }
}

static void pack_tokens(const void* x, DType type, const int32_t* token, int rows, const PackedMatrix& shape, Operand kind,
                        const float* bias, float* bias_dot, float* scratch, char* out) {
  const int64_t padded = shape.steps * pack_unit(shape.type), n = shape.k;
  for (int m = 0; m < rows; ++m) {
    float* r = scratch + m * padded;
    widen_row(x, type, token[m] * n, n, padded, r);
    if (!bias) continue;
    vf sum = set1(0.0f);
    for (int64_t i = 0; i < n; i += W) {
      const int left = n - i < W ? static_cast<int>(n - i) : W;
      sum = left == W ? fma(load(r + i), load(bias + i), sum) : fma(load_n(r + i, left, 0.0f), load_n(bias + i, left, 0.0f), sum);
    }
    bias_dot[m] = reduce_add(sum);
  }
  pack_operand(kind, shape, scratch, padded, rows, out);
}

static void pack_rows(const PackedMatrix& shape, Operand kind, float* x, int64_t stride, int rows, char* out) {
  pack_operand(kind, shape, x, stride, rows, out);
}

struct Slope {
  vf value, gate, up;  // act(g, u) and its derivatives
};

// min and max drop a NaN; here it must come out.
HEDDLE_INLINE vf keep_nan(vf from, vf v) { return select(not_nan(from), v, from); }

HEDDLE_INLINE Slope activation_slope(Activation kind, float alpha, float limit, vf g, vf u) {
  const vf zero = set1(0.0f), one = set1(1.0f), half = set1(0.5f);
  vf act = g, slope = one;  // act(g), act'(g); the layer multiplies by u
  switch (kind) {
    case Activation::kSiLU: {
      const vf s = sigmoid(g);
      act = mul(g, s);
      slope = fma(act, sub(one, s), s);
      break;
    }
    case Activation::kClampedSwiGLU: {
      const vf a = set1(alpha), top = set1(limit), bottom = set1(-limit);
      const vm closed = gt(g, top), outside = mask_or(gt(u, top), lt(u, bottom));
      g = keep_nan(g, min(g, top));
      u = add(keep_nan(u, max(min(u, top), bottom)), one);
      const vf s = sigmoid(mul(g, a));
      act = mul(g, s);
      slope = fma(mul(act, a), sub(one, s), s);
      return {mul(act, u), select(closed, zero, mul(slope, u)), select(outside, zero, act)};
    }
    case Activation::kGeluTanh: {
      // x sigmoid(z), z = 2 sqrt(2 / pi) (x + 0.044715 x^3). Beyond 12 the slope is 0 or 1, but z' would overflow.
      const vf x = keep_nan(g, max(min(g, set1(12.0f)), set1(-12.0f))), square = mul(x, x);
      const vf z = mul(set1(1.5957691216057308f), fma(mul(square, x), set1(0.044715f), x));
      const vf s = sigmoid(z), dz = mul(set1(1.5957691216057308f), fma(square, set1(0.134145f), one));
      act = gelu_tanh(g);
      slope = fma(mul(mul(x, s), sub(one, s)), dz, s);
      break;
    }
    case Activation::kGeluErf: {
      const vf density = mul(set1(0.3989422804014327f), exp(mul(mul(g, g), set1(-0.5f))));
      act = gelu_erf(g);
      slope = fma(g, density, mul(half, add(one, erf(mul(g, set1(0.70710678118654752f))))));
      break;
    }
    case Activation::kReluSquared: {
      const vf r = keep_nan(g, max(g, zero));
      act = mul(r, r);
      slope = add(r, r);
      break;
    }
    case Activation::kRelu:
      act = keep_nan(g, max(g, zero));
      slope = select(gt(g, zero), one, keep_nan(g, zero));
      break;
    case Activation::kIdentity: break;
  }
  return {mul(act, u), mul(slope, u), act};
}

// W values from p, zero beyond `left`.
HEDDLE_INLINE vf load_left(const float* p, int64_t left) {
  return left >= W ? load(p) : left > 0 ? load_n(p, static_cast<int>(left), 0.0f) : set1(0.0f);
}

static void differentiate(const ExpertsBackwardArgs& a, const ExpertSource& e, int64_t column, const float* g, const float* u,
                          const float* dh0, const float* weight, int rows, float* h, float* dg, float* du, int64_t stride,
                          float* part, int64_t part_stride) {
  for (int m = 0; m < rows; ++m) {
    const vf w = set1(weight[m]);
    vf sum = set1(0.0f);
    for (int i = 0; i < kPanel; i += W) {
      const int64_t at = m * stride + column + i, left = a.intermediate - column - i;
      vf up = load(u + m * kPanel + i);
      if (e.up_bias) up = add(up, load_left(e.up_bias + column + i, left));
      const vf grad = load(dh0 + m * kPanel + i), dh = mul(w, grad);
      Slope s;
      if (a.gated) {
        vf gate = load(g + m * kPanel + i);
        if (e.gate_bias) gate = add(gate, load_left(e.gate_bias + column + i, left));
        s = activation_slope(a.activation, a.alpha, a.limit, gate, up);
        store(dg + at, mul(dh, s.gate));
        store(du + at, mul(dh, s.up));
      } else {
        s = activation_slope(a.activation, a.alpha, a.limit, up, set1(1.0f));
        store(du + at, mul(dh, s.gate));
      }
      store(h + at, s.value);
      sum = fma(grad, s.value, sum);
    }
    part[m * part_stride] = reduce_add(sum);
  }
}

static void pack_columns(const void* x, DType type, int64_t stride, const int32_t* row, const float* weight, int64_t column,
                         int count, int64_t k, float* out, float* sum, int64_t sum_stride) {
  float total[kMaxTileRows] = {};
  for (int64_t i = 0; i < k; ++i) {
    float* o = out + i * count;
    widen_row(x, type, source_index(row, i) * stride + column, count, count, o);
    for (int m = 0; m < count; ++m) {
      if (weight) o[m] *= weight[i];
      total[m] += o[m];
    }
  }
  for (int m = 0; sum && m < count; ++m) sum[m * sum_stride] = total[m];
}

static void write_gradient(const float* c, int rows, int64_t columns, float* out, int64_t row_stride, int64_t column_stride) {
  const int n = columns < kPanel ? static_cast<int>(columns) : kPanel;
  if (column_stride == 1) {
    for (int m = 0; m < rows; ++m) {
      for (int i = 0; i < n; i += W) {
        const vf v = load(c + m * kPanel + i);
        if (n - i >= W) store(out + m * row_stride + i, v); else store_n(out + m * row_stride + i, v, n - i);
      }
    }
    return;
  }
  for (int i = 0; i < n; ++i) {
    for (int m = 0; m < rows; ++m) out[m * row_stride + i * column_stride] = c[m * kPanel + i];
  }
}

const BackwardStages& backward_stages() {
  static const BackwardStages s = {pack_panel, pack_tokens, pack_rows, differentiate, pack_columns, write_gradient};
  return s;
}
