// See attention_backward.h for the definition and what the design rests on.

constexpr int kBlockRows = 4 * kRows;                                  // rows between two updates of dk and dv
constexpr int kBlockPanel = (kBlockRows + kSub - 1) / kSub * kSub;     // as packed

struct BackwardScratch {
  float *query_sums, *delta, *shift;                        // of all rows of the unit
  float *key_sums, *value_sums;                             // of one panel: [key][column]
  float *keys, *key_rows, *values;                          // K^T, K and V^T of one panel
  float *query, *query_rows, *upstream, *upstream_rows;     // q^T, q, g^T, g of one row block
  float *weights, *slopes;                                  // P and dS of one row block
  int64_t floats;
};

HEDDLE_INLINE BackwardScratch backward_scratch(const AttentionProblem& p, int64_t rows, float* base) {
  const int panel = panel_keys(p.head_dim, p.value_dim), qk = whole_columns(p.head_dim), vo = whole_columns(p.value_dim);
  BackwardScratch m;
  int64_t at = 0;
  auto take = [&](int64_t n) {
    float* x = base + at;
    at += (n + 15) / 16 * 16;
    return x;
  };
  m.query_sums = take((rows + kRows) * qk);
  m.delta = take(rows);
  m.shift = take(rows);
  m.key_sums = take(int64_t{panel} * qk);
  m.value_sums = take(int64_t{panel} * vo);
  m.keys = take(int64_t{panel} * p.head_dim);
  m.key_rows = take(int64_t{panel} * qk);
  m.values = take(int64_t{panel} * p.value_dim);
  m.query = take(int64_t{4} * p.head_dim * kRowStride);
  m.query_rows = take(int64_t{kBlockPanel} * qk);
  m.upstream = take(int64_t{4} * p.value_dim * kRowStride);
  m.upstream_rows = take(int64_t{kBlockPanel} * vo);
  m.weights = take(int64_t{kBlockRows} * kScoreStride);
  m.slopes = take(int64_t{kBlockRows} * kScoreStride);
  m.floats = at;
  return m;
}

// c[r] += sum over i < n of a[i][r] b[i] for R rows of kColumns columns.
template <int R>
static void outer_tile(const float* a, const float* b, int n, float* c, int64_t c_stride) {
  vf t[R][2];
  HEDDLE_UNROLL(16)
  for (int r = 0; r < R; ++r) t[r][0] = t[r][1] = set1(0.0f);
  for (int i = 0; i < n; ++i) {
    const vf b0 = load(b), b1 = load(b + W);
    HEDDLE_UNROLL(16)
    for (int r = 0; r < R; ++r) {
      const vf x = set1(a[r]);
      t[r][0] = fma(x, b0, t[r][0]);
      t[r][1] = fma(x, b1, t[r][1]);
    }
    a += kScoreStride;
    b += kColumns;
  }
  for (int r = 0; r < R; ++r) {
    float* to = c + r * c_stride;
    store(to, add(load(to), t[r][0]));
    store(to + W, add(load(to + W), t[r][1]));
  }
}

struct OuterCall {
  const float *a, *b;
  int count, panel, columns;
  float* sums;
  template <int R>
  inline void run() const {
    for (int c = 0; c < columns; c += kColumns) {
      outer_tile<R>(a, b + int64_t{c} * panel, count, sums + c, columns);
    }
  }
};

// sums[key] += sum over rows of a[row][key] b[row], for the keys of the runs.
HEDDLE_INLINE void add_outer(const float* a, const float* b, int count, int columns, const Run* runs, int run_count,
                             float* sums) {
  for (int n = 0; n < run_count; ++n) {
    const int end = runs[n].end * kSub;
    for (int k = runs[n].begin * kSub; k < end; k += kRows) {
      const int rows = end - k < kRows ? end - k : kRows;
      with_rows<kRows>(rows, OuterCall{a + k, b, count, kBlockPanel, columns, sums + int64_t{k} * columns});
    }
  }
}

// Turns a row's products q.k into weights and its products g.v into ds / scale, in place.
HEDDLE_INLINE void backward_row(const AttentionBackwardArgs& a, const Sequence& s, const RowView& row, bool transform,
                                int64_t panel_key, const Run* runs, int run_count, float shift, float delta, float* w,
                                float* g) {
  const vf weight = set1(a.problem.is_prefix(row.position) ? a.prefix_weight : 1.0f);
  const AttentionProblem& p = a.problem;
  const bool uniform = shift == kNegInf && p.uniform_empty;
  const vf factor = set1(transform ? kLog2e : p.scale * kLog2e), minus = set1(-shift * kLog2e), zero = set1(0.0f);
  float* bias = nullptr;
  if (a.bias_grad) {
    bias = a.bias_grad + p.bias_at(s, row.position, row.head, panel_key);
  }
  for (int n = 0; n < run_count; ++n) {
    for (int j = runs[n].begin * kSub; j < runs[n].end * kSub; j += W) {
      const int64_t key = panel_key + j, left = s.keys - key;
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
}

struct BackwardUnit {
  const AttentionBackwardArgs& a;
  Sequence s;
  int64_t key_head;
  BackwardScratch m;

  int64_t row_count() const { return s.queries * a.problem.group(); }
  RowView view(int64_t row) const {
    const int64_t group = a.problem.group(), i = row / group;
    return {i, static_cast<int32_t>(key_head * group + row % group), key_range(a.problem, s, i)};
  }
  int64_t row_at(const RowView& r, int64_t dim) const { return a.row_at(s, r.position, r.head, dim); }
  int64_t upstream_at(const RowView& r) const { return a.upstream_at(s, r.position, r.head); }
};

HEDDLE_INLINE void start_rows(const BackwardUnit& u) {
  const AttentionProblem& p = u.a.problem;
  const Vectors g{u.a.upstream, p.type, 1, p.value_dim}, o{u.a.output, p.type, 1, p.value_dim};
  const Vectors prefix{u.a.prefix_output, DType::kFloat32, 1, p.value_dim};
  for (int64_t r = 0; r < u.row_count(); ++r) {
    const RowView row = u.view(r);
    const bool first = p.is_prefix(row.position);
    const int64_t at = first ? u.row_at(row, p.value_dim) : p.output_at(u.s, row.position, row.head);
    const int64_t g_at = u.upstream_at(row);
    vf sum = set1(0.0f);
    for (int c = 0; c < p.value_dim; c += W) {
      sum = fma(load_lanes(g, g_at, c), load_lanes(first ? prefix : o, at, c), sum);
    }
    u.m.delta[r] = reduce_add(sum);
    u.m.shift[r] = first ? u.a.prefix_lse[p.prefix_at(u.s, p.query_heads, row.head)]
                         : u.a.log_sum_exp[p.lse_at(u.s, row.position, row.head)];
  }
  for (int64_t i = 0; i < (u.row_count() + kRows) * whole_columns(p.head_dim); ++i) u.m.query_sums[i] = 0.0f;
}

// Packs one panel; returns whether every key is finite.
HEDDLE_INLINE bool pack_backward_panel(const BackwardUnit& u, int64_t panel_key, int panel) {
  const AttentionProblem& p = u.a.problem;
  const Vectors keys{p.key, p.type, p.key_stride[3], p.head_dim};
  const Vectors values{p.value, p.type, p.value_stride[3], p.value_dim};
  bool finite = true;
  for (int sub = 0; sub < panel / kSub && panel_key + sub * kSub < u.s.keys; ++sub) {
    int64_t k_at[kSub], v_at[kSub];
    for (int j = 0; j < kSub; ++j) {
      const int64_t key = panel_key + sub * kSub + j;
      k_at[j] = key < u.s.keys ? p.key_at(u.s, key, u.key_head) : kNoVector;
      v_at[j] = key < u.s.keys ? p.value_at(u.s, key, u.key_head) : kNoVector;
    }
    for (int j = 0; j < kSub; j += kColumns) {
      pack_transposed(keys, k_at + j, kColumns, u.m.keys + (sub * kSub + j) * int64_t{p.head_dim}, kColumns);
      pack_transposed(values, v_at + j, kColumns, u.m.values + (sub * kSub + j) * int64_t{p.value_dim}, kColumns);
    }
    finite &= pack_values(keys, k_at, sub, panel, u.m.key_rows);
  }
  return finite;
}

// Packs the q and upstream rows of one block, transposed by kRows and as rows.
HEDDLE_INLINE void pack_rows(const BackwardUnit& u, const RowView* rows, int count) {
  const AttentionProblem& p = u.a.problem;
  const Vectors q{p.query, p.type, p.query_stride[3], p.head_dim}, g{u.a.upstream, p.type, 1, p.value_dim};
  int64_t q_at[kBlockPanel + kRowStride], g_at[kBlockPanel + kRowStride];
  for (int i = 0; i < kBlockPanel + kRowStride; ++i) {
    q_at[i] = i < count ? p.query_at(u.s, rows[i].position, rows[i].head) : kNoVector;
    g_at[i] = i < count ? u.upstream_at(rows[i]) : kNoVector;
  }
  for (int r = 0; r < count; r += kRows) {
    pack_transposed(q, q_at + r, kRowStride, u.m.query + int64_t{r / kRows} * p.head_dim * kRowStride, kRowStride);
    pack_transposed(g, g_at + r, kRowStride, u.m.upstream + int64_t{r / kRows} * p.value_dim * kRowStride, kRowStride);
  }
  for (int sub = 0; sub * kSub < count; ++sub) {
    pack_values(q, q_at + sub * kSub, sub, kBlockPanel, u.m.query_rows);
    pack_values(g, g_at + sub * kSub, sub, kBlockPanel, u.m.upstream_rows);
  }
}

HEDDLE_INLINE void backward_block(const BackwardUnit& u, int64_t first, int64_t panel_key, int panel, bool finite,
                                  bool transform) {
  const AttentionProblem& p = u.a.problem;
  const BackwardScratch& m = u.m;
  RowView rows[kBlockRows];
  const int count = u.row_count() - first < kBlockRows ? static_cast<int>(u.row_count() - first) : kBlockRows;
  bool every = false;
  for (int i = 0; i < count; ++i) {
    rows[i] = u.view(first + i);
    every |= p.uniform_empty && m.shift[first + i] == kNegInf;
  }
  Run runs[kMaxPanel / kSub];
  int run_count = 0;
  for (int sub = 0; sub < panel / kSub; ++sub) {
    const int64_t key = panel_key + sub * kSub;
    if (key >= u.s.keys || !(every || sub_is_seen(p, u.s, rows, count, key))) continue;
    if (run_count && runs[run_count - 1].end == sub) {
      ++runs[run_count - 1].end;
    } else {
      runs[run_count++] = {sub, sub + 1};
    }
  }
  if (!run_count) return;
  pack_rows(u, rows, count);
  const int64_t left = u.s.keys - panel_key;
  const int limit = left < panel ? static_cast<int>(left) : panel;
  alignas(64) float ones[kRowStride];
  for (float& x : ones) x = 1.0f;
  const int columns = whole_columns(p.head_dim);
  for (int r = 0; r < count; r += kRows) {
    const int n = count - r < kRows ? count - r : kRows;
    float *w = m.weights + r * kScoreStride, *g = m.slopes + r * kScoreStride;
    const float* q = m.query + int64_t{r / kRows} * p.head_dim * kRowStride;
    const float* up = m.upstream + int64_t{r / kRows} * p.value_dim * kRowStride;
    with_rows<kRows>(n, ScoresCall{q, m.keys, p.head_dim, runs, run_count, limit, w, {}});
    with_rows<kRows>(n, ScoresCall{up, m.values, p.value_dim, runs, run_count, limit, g, {}});
    for (int i = 0; i < n; ++i) {
      backward_row(u.a, u.s, rows[r + i], transform, panel_key, runs, run_count, m.shift[first + r + i],
                   m.delta[first + r + i], w + i * kScoreStride, g + i * kScoreStride);
    }
    float* sums = m.query_sums + (first + r) * columns;
    if (finite) {
      with_rows<kRows>(n, ValuesCall{g, m.key_rows, panel, p.head_dim, runs, run_count, limit, ones, sums, columns});
      continue;
    }
    for (int c = 0; c < p.head_dim; c += kColumns) {
      careful_value_tile(n, g, m.key_rows + int64_t{c} * panel, runs, run_count, ones, sums + c, columns);
    }
  }
  add_outer(m.weights, m.upstream_rows, count, whole_columns(p.value_dim), runs, run_count, m.value_sums);
  add_outer(m.slopes, m.query_rows, count, columns, runs, run_count, m.key_sums);
}

HEDDLE_INLINE void store_scaled(void* out, DType type, int64_t at, const float* from, int dim, float scale) {
  for (int c = 0; c < dim; c += W) store_float(out, type, at + c, mul(load(from + c), set1(scale)), dim - c);
}

static bool backward_unit(const AttentionBackwardArgs& a, int64_t sequence, int64_t key_head) {
  const AttentionProblem& p = a.problem;
  BackwardUnit u{a, sequence_of(p, sequence), key_head, {}};
  float* base = static_cast<float*>(attention_scratch(backward_scratch(p, u.row_count(), nullptr).floats * 4));
  if (!base) return false;
  u.m = backward_scratch(p, u.row_count(), base);
  start_rows(u);
  const bool transform = has_transform(p);
  const int panel = panel_keys(p.head_dim, p.value_dim);
  const int qk = whole_columns(p.head_dim), vo = whole_columns(p.value_dim);
  for (int64_t key = 0; key < u.s.keys; key += panel) {
    const bool finite = pack_backward_panel(u, key, panel);
    for (int64_t i = 0; i < int64_t{panel} * qk; ++i) u.m.key_sums[i] = 0.0f;
    for (int64_t i = 0; i < int64_t{panel} * vo; ++i) u.m.value_sums[i] = 0.0f;
    for (int64_t r = 0; r < u.row_count(); r += kBlockRows) backward_block(u, r, key, panel, finite, transform);
    for (int64_t j = 0; j < panel && key + j < u.s.keys; ++j) {
      const bool first = p.is_prefix(key + j);
      const DType type = first ? DType::kFloat32 : p.type;
      store_scaled(first ? a.prefix_key_grad : a.key_grad, type, a.key_row_at(u.s, key + j, key_head, p.head_dim),
                   u.m.key_sums + j * qk, p.head_dim, p.scale);
      store_scaled(first ? a.prefix_value_grad : a.value_grad, type, a.key_row_at(u.s, key + j, key_head, p.value_dim),
                   u.m.value_sums + j * vo, p.value_dim, 1.0f);
    }
  }
  for (int64_t r = 0; r < u.row_count(); ++r) {
    const RowView row = u.view(r);
    const bool first = p.is_prefix(row.position);
    store_scaled(first ? a.prefix_query_grad : a.query_grad, first ? DType::kFloat32 : p.type, u.row_at(row, p.head_dim),
                 u.m.query_sums + r * qk, p.head_dim, p.scale);
  }
  return true;
}

Status attention_backward(const AttentionBackwardArgs& a, const Exec& exec) {
  const AttentionProblem& p = a.problem;
  // Units that add to the same bias gradient stay on one thread, in order.
  const bool join_batch = a.bias_grad && ((p.batch > 1 && p.bias_stride[0] == 0) ||
                                          (p.inner > 1 && p.inner_stride.bias == 0));
  const bool join_heads = a.bias_grad && p.key_heads > 1 && p.bias_stride[1] == 0;
  const int64_t sequences = p.sequences(), outer = join_batch ? 1 : sequences, heads = join_heads ? 1 : p.key_heads;
  Failure failure;
  const bool done = parallel_for(exec, outer * heads, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      for (int64_t s = join_batch ? 0 : i / heads; s < (join_batch ? sequences : i / heads + 1); ++s) {
        for (int64_t h = join_heads ? 0 : i % heads; h < (join_heads ? p.key_heads : i % heads + 1); ++h) {
          if (!backward_unit(a, s, h)) failure.set();
        }
      }
    }
  });
  if (failure.get()) return kNoMemory;
  return done ? kOk : kCancelled;
}
