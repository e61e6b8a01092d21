// From the products of a row with the keys of a cell to its weights and slopes.

// Turns a row's products q.k with the keys of a cell into weights and its products g.v into ds / scale, in place.
HEDDLE_INLINE void backward_row(const AttentionBackwardArgs& a, const Sequence& s, const RowView& row, bool transform,
                                int64_t cell_key, float shift, float delta, float* w, float* g) {
  const vf weight = set1(a.problem.is_prefix(row.position) ? a.prefix_weight : 1.0f);
  const AttentionProblem& p = a.problem;
  const bool uniform = shift == kNegInf && p.uniform_empty;
  const vf factor = set1(transform ? kLog2e : p.scale * kLog2e), minus = set1(-shift * kLog2e), zero = set1(0.0f);
  float* bias = a.bias_grad ? a.bias_grad + p.bias_at(s, row.position, row.head, cell_key) : nullptr;
  for (int j = 0; j < kSub; j += W) {
    const int64_t key = cell_key + j, left = s.keys - key;
    const int some = left > W ? W : static_cast<int>(left);
    if (some <= 0) {
      store(w + j, zero);
      store(g + j, zero);
      continue;
    }
    if (uniform) {
      store(w + j, select(first_n(some), mul(weight, set1(1.0f / static_cast<float>(s.keys))), zero));
      store(g + j, zero);
      continue;
    }
    vf z = load(w + j), slope = set1(1.0f);
    if (transform) z = logit_lanes(p, s, row, key, some, z, &slope);
    vf e = exp2_lanes(fma(z, factor, minus));
    if (shift == kNegInf) e = zero;
    e = select(visible_lanes(p, s, row, key, some), mul(e, weight), zero);
    // Weight 0 first: what is masked may have a NaN product.
    const vf d = select(eq(e, zero), zero, mul(e, sub(load(g + j), set1(delta))));
    store(w + j, e);
    store(g + j, select(eq(d, zero), zero, mul(d, slope)));
    if (bias && some == W) {
      store(bias + j, add(load(bias + j), d));
    } else if (bias) {
      store_n(bias + j, add(load_n(bias + j, some, 0.0f), d), some);
    }
  }
}

// The same for consecutive rows that see every key of the cell and whose logits are scaled products.
static void backward_plain_rows(float factor, const float* shift, const float* delta, int rows, float* w, float* g) {
  const vf f = set1(factor), zero = set1(0.0f);
  for (int r = 0; r < rows; ++r) {
    const vf minus = set1(-shift[r] * kLog2e), less = set1(delta[r]);
    HEDDLE_UNROLL(4)
    for (int j = 0; j < kSub; j += W) {
      const vf e = exp2_lanes(fma(load(w + j), f, minus));
      const vf d = select(eq(e, zero), zero, mul(e, sub(load(g + j), less)));
      store(w + j, e);
      store(g + j, d);
    }
    w += kSub;
    g += kSub;
  }
}
