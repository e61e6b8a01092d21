// The vector parts of fused_linear.h.

// One row, its norm and zeros up to `padded`. The arithmetic is that of norm_row (norm-inl.h).
HEDDLE_INLINE void fused_row(const FusedLinearArgs& a, const float* x, const float* ahead, int64_t k, int64_t padded,
                             float* out) {
  RowStatistics s = {0.0f, 0.0f, 1.0f};
  if (a.normed) s = row_statistics<DType::kFloat32, false>(x, nullptr, 0, k, true, a.epsilon);
  const vf m = set1(s.mean), rest = set1(s.rest), r = set1(s.rstd);
  for (int64_t i = 0; i < k; i += W) {
    const int64_t left = k - i;
    HEDDLE_PREFETCH(ahead + i);
    vf v = load_as<DType::kFloat32>(x, i, left);
    if (a.normed) {
      v = mul(mul(sub(sub(v, m), rest), r), norm_weight(a.norm_weight, a.unit_offset, i, left));
      if (a.norm_bias) v = add(v, load_as<DType::kFloat32>(a.norm_bias, i, left));
    }
    store_as<DType::kFloat32>(out, i, v, left);
  }
  for (int64_t i = k; i < padded; ++i) out[i] = 0.0f;
}

static void fused_pack(const FusedLinearArgs& a, int64_t first_row, int rows, const PackedMatrix& w, Operand kind,
                       float* scratch, char* out) {
  const int64_t padded = w.steps * pack_unit(w.type);
  const auto row = [&](int64_t i) { return a.x + (a.index ? a.index[i] : i) * w.k; };
  for (int m = 0; m < rows; ++m) {
    const int64_t i = first_row + m, ahead = i + 2 < a.rows ? i + 2 : i;
    fused_row(a, row(i), row(ahead), w.k, padded, scratch + m * padded);
  }
  pack_operand(kind, w, scratch, padded, rows, out);
}

// Columns [i, i + W) of a tile's row, with bias and activation; `left` columns exist.
HEDDLE_INLINE vf fused_value(const float* c, const float* bias, LinearActivation activation, int64_t column, int64_t left) {
  vf v = load(c);
  if (bias) v = add(v, load_as<DType::kFloat32>(bias, column, left));
  return activation == LinearActivation::kNone ? v : linear_activation(activation, v);
}

// `count` columns of a tile of the hidden product from the panel's first on, activated, zero beyond the matrix. out may
// be c.
HEDDLE_INLINE void hidden_values(const FusedLinearArgs& a, int rows, int64_t panel, int64_t count, const float* c,
                                 float* out, int64_t stride) {
  for (int m = 0; m < rows; ++m) {
    for (int64_t i = 0; i < count; i += W) {
      const int64_t column = panel * kPanel + i, left = a.hidden->columns - column;
      vf v = set1(0.0f);
      if (left > 0) v = fused_value(c + m * kPanel + i, a.hidden_bias, a.hidden_activation, column, left);
      if (left < W) v = select(first_n(left > 0 ? static_cast<int>(left) : 0), v, set1(0.0f));
      store_as<DType::kFloat32>(out, m * stride + i, v, count - i);
    }
  }
}

// How many of a panel's columns the second operand has room for.
HEDDLE_INLINE int64_t hidden_columns(const FusedLinearArgs& a, int64_t panel) {
  const int64_t left = a.weight->steps * pack_unit(a.weight->type) - panel * kPanel;
  return left < kPanel ? left : kPanel;
}

static void fused_store_hidden(const FusedLinearArgs& a, int rows, int64_t panel, const float* c, float* out,
                               int64_t stride) {
  hidden_values(a, rows, panel, hidden_columns(a, panel), c, out + panel * kPanel, stride);
}

static void fused_pack_hidden(const FusedLinearArgs& a, int rows, int64_t panel, float* c, char* out) {
  const int64_t count = hidden_columns(a, panel);
  if (count <= 0) return;
  hidden_values(a, rows, panel, count, c, c, kPanel);
  interleave_rows(c, kPanel, rows, count, reinterpret_cast<float*>(out) + panel * kPanel * rows);
}

static void fused_pack_rows(const PackedMatrix& w, Operand kind, float* x, int64_t stride, int rows, char* out) {
  pack_operand(kind, w, x, stride, rows, out);
}

// A row of a tile's panel: kWhole when all of its columns exist. The lines of the next panel are asked for meanwhile:
// rows lie a page or more apart, where no hardware prefetches.
template <bool kWhole>
HEDDLE_INLINE void finish_row(const FusedLinearArgs& a, const float* c, int64_t column, int64_t columns, const float* add0,
                              const float* add1, vf gate, float* out) {
  HEDDLE_UNROLL(8)
  for (int i = 0; i < kPanel; i += W) {
    const int64_t left = kWhole ? W : columns - i;
    if (left <= 0) break;
    vf v = fused_value(c + i, a.bias, a.activation, column + i, left);
    HEDDLE_PREFETCH_WRITE(out + i + kPanel);
    if (add0) {
      HEDDLE_PREFETCH(add0 + i + kPanel);
      v = fma(v, gate, load_as<DType::kFloat32>(add0, i, left));
    } else {
      v = mul(v, gate);
    }
    if (add1) v = add(v, load_as<DType::kFloat32>(add1, i, left));
    store_as<DType::kFloat32>(out, i, v, left);
  }
}

static void fused_finish(const FusedLinearArgs& a, int64_t first_row, int rows, int64_t panel, const float* c) {
  const int64_t n = a.weight->columns, column = panel * kPanel, columns = n - column;
  const vf gate = set1(a.gate);
  const auto table = [&](int t, int64_t r, int64_t to) {
    return a.add[t] ? a.add[t] + (a.add_index[t] ? a.add_index[t][r] : to) * n + column : nullptr;
  };
  for (int m = 0; m < rows; ++m) {
    const int64_t r = first_row + m, to = a.to ? a.to[r] : r;
    if (to < 0) continue;
    const float *add0 = table(0, r, to), *add1 = table(1, r, to);
    float* out = a.out + to * n + column;
    if (columns >= kPanel) finish_row<true>(a, c + m * kPanel, column, columns, add0, add1, gate, out);
    else finish_row<false>(a, c + m * kPanel, column, columns, add0, add1, gate, out);
  }
}

const FusedLinearStages& fused_linear_stages() {
  static const FusedLinearStages s = {fused_pack, fused_pack_hidden, fused_store_hidden, fused_pack_rows, fused_finish};
  return s;
}
