// Sequences whose keys fit one panel: a row's softmax is complete after one pass over its scores, so sums are neither
// cleared, scaled nor read back, and q is copied as rows instead of transposed. The shift is the row's
// largest logit.

HEDDLE_INLINE bool is_short(const AttentionProblem& p, const Sequence& s) {
  return s.keys > 0 && s.keys <= panel_keys(p.head_dim, p.value_dim) && !has_transform(p);
}

struct ShortScratch {
  float *query, *sums, *scores, *keys, *values, *mean;
  const char** lines;
  int64_t floats;
};

HEDDLE_INLINE ShortScratch short_scratch(const AttentionProblem& p, int keys, int64_t lines, float* base) {
  ShortScratch m;
  int64_t at = 0;
  auto take = [&](int64_t n) {
    float* x = base + at;
    at += (n + 15) / 16 * 16;
    return x;
  };
  m.keys = take(int64_t{p.head_dim} * keys);
  m.values = take(int64_t{whole_columns(p.value_dim)} * keys);
  m.query = take(int64_t{kRows} * kQueryStride);
  m.scores = take(int64_t{kRows} * kScoreStride);
  m.sums = take(int64_t{kRows} * whole_columns(p.value_dim));
  m.mean = take(whole_columns(p.value_dim));
  m.lines = reinterpret_cast<const char**>(take(2 * lines));
  m.floats = at;
  return m;
}

template <DType T>
HEDDLE_INLINE void copy_row(const Vectors& x, int64_t at, float* to) {
  int d = 0;
  for (; d + W <= x.dim; d += W) store(to + d, load_float(x.data, T, at + d, W));
  if (d < x.dim) store(to + d, load_float(x.data, T, at + d, x.dim - d));
}

HEDDLE_INLINE void copy_rows(const Vectors& x, const int64_t* at, int count, float* to) {
  for (int r = 0; r < count; ++r, to += kQueryStride) {
    if (x.element_stride != 1) {
      for (int d = 0; d < x.dim; d += W) store(to + d, load_lanes(x, at[r], d));
    } else if (x.type == DType::kFloat32) {
      copy_row<DType::kFloat32>(x, at[r], to);
    } else if (x.type == DType::kBFloat16) {
      copy_row<DType::kBFloat16>(x, at[r], to);
    } else {
      copy_row<DType::kFloat16>(x, at[r], to);
    }
  }
}

// The memory that the next unit reads and writes. Its rows lie far apart, where no hardware prefetches, and there is
// too little arithmetic to wait for them; a burst of prefetches stalls as loads do, so tiles take a few each.
struct LineList {
  const char** lines;
  int64_t count;
};

// Positions [0, count) of one head.
template <class At>
HEDDLE_INLINE void add_lines(LineList* list, const void* data, int64_t size, int64_t count, const At& at) {
  for (int64_t i = 0; i < count; ++i) list->lines[list->count++] = static_cast<const char*>(data) + at(i) * size;
}

HEDDLE_INLINE void list_unit(const AttentionArgs& a, const AttentionUnit& u, LineList* list) {
  const AttentionProblem& p = a.problem;
  const int64_t size = dtype_bytes(p.type), group = p.group(), head = u.key_head * group;
  const Sequence& s = u.sequence;
  add_lines(list, p.key, size, s.keys, [&](int64_t i) { return p.key_at(s, i, u.key_head); });
  add_lines(list, p.value, size, s.keys, [&](int64_t i) { return p.value_at(s, i, u.key_head); });
  for (int64_t h = head; h < head + group; ++h) {
    add_lines(list, p.query, size, u.end - u.begin, [&](int64_t i) { return p.query_at(s, u.begin + i, h); });
    add_lines(list, a.output, size, u.end - u.begin, [&](int64_t i) {
      return p.output_at(s, p.is_prefix(u.begin + i) ? 1 : u.begin + i, h);
    });
  }
}

// Packs all keys and values of a unit; returns whether the values are finite.
HEDDLE_INLINE bool pack_short(const AttentionProblem& p, const AttentionUnit& u, int size, const ShortScratch& m) {
  const Vectors keys{p.key, p.type, p.key_stride[3], p.head_dim};
  const Vectors values{p.value, p.type, p.value_stride[3], p.value_dim};
  bool finite = true;
  for (int sub = 0; sub < size / kSub; ++sub) {
    int64_t k_at[kSub], v_at[kSub];
    for (int j = 0; j < kSub; ++j) {
      const int64_t key = sub * kSub + j;
      k_at[j] = key < u.sequence.keys ? p.key_at(u.sequence, key, u.key_head) : kNoVector;
      v_at[j] = key < u.sequence.keys ? p.value_at(u.sequence, key, u.key_head) : kNoVector;
    }
    for (int j = 0; j < kSub && sub * kSub + j < u.sequence.keys; j += kColumns) {
      const int count = u.sequence.keys - sub * kSub - j > W ? kColumns : W;
      pack_transposed(keys, k_at + j, count, m.keys + (sub * kSub + j) * int64_t{p.head_dim}, kColumns);
    }
    // Keys that do not exist have weight 0 and no product.
    const int64_t left = u.sequence.keys - sub * kSub;
    finite &= pack_values(values, v_at, sub, size, m.values, left < kSub ? static_cast<int>(left) : kSub);
  }
  return finite;
}

// At most kRows rows of a unit, from the first key that one of them sees to the last.
HEDDLE_INLINE void attend_short_rows(const AttentionArgs& a, const AttentionUnit& u, const ShortScratch& m, int size,
                                     bool finite, const RowView* rows, int count, Lines lines, const float** mean) {
  const AttentionProblem& p = a.problem;
  const Sequence& s = u.sequence;
  int64_t lo = s.keys, hi = 0, q_at[kRows];
  for (int r = 0; r < count; ++r) {
    const KeyRange x = rows[r].range;
    if (x.lo < x.hi && x.lo < lo) lo = x.lo;
    if (x.lo < x.hi && x.hi > hi) hi = x.hi;
    q_at[r] = p.query_at(s, rows[r].position, rows[r].head);
  }
  const int columns = whole_columns(p.value_dim), limit = static_cast<int>(hi);
  const Run run{static_cast<int>(lo / kSub), static_cast<int>((hi + kSub - 1) / kSub)};
  const int run_count = lo < hi ? 1 : 0;
  alignas(64) float shift[kRows], sum[kRows] = {};
  for (float& x : shift) x = kNegInf;
  if (run_count) {
    copy_rows(Vectors{p.query, p.type, p.query_stride[3], p.head_dim}, q_at, count, m.query);
    with_rows<kRows>(count, RowScoresCall{m.query, m.keys, p.head_dim, &run, 1, limit, m.scores, lines});
    const float factor = p.scale * kLog2e;
    for (int r = 0; r < count; ++r) {
      float* row = m.scores + r * kScoreStride;
      for (int sub = run.begin; sub < run.end; ++sub) mask_sub(p, s, rows[r], false, 0, sub, row);
      shift[r] = row_max(row, &run, 1) * factor;
    }
    for (int r = 0; r < count; ++r) {
      float* row = m.scores + r * kScoreStride;
      sum[r] = exp_row(row, &run, 1, factor, shift[r] == kNegInf ? 0.0f : shift[r]);
      if (s.keys == 1) set_only_weight(row, &sum[r]);
    }
  }
  if (finite) {
    with_rows<kRows>(count, ValuesCall{m.scores, m.values, size, p.value_dim, &run, run_count, limit, nullptr, m.sums,
                                       columns});
  } else {
    const float zeros[kRows] = {};
    for (int i = 0; i < count * columns; ++i) m.sums[i] = 0.0f;
    for (int c = 0; c < p.value_dim; c += kColumns) {
      careful_value_tile(count, m.scores, m.values + int64_t{c} * size, &run, run_count, zeros, m.sums + c, columns);
    }
  }
  for (int r = 0; r < count; ++r) {
    if (p.uniform_empty && !*mean && shift[r] == kNegInf) {
      mean_value(p, u, m.mean);
      *mean = m.mean;
    }
    finish_row(a, u, rows[r], m.sums + r * columns, shift[r], sum[r], *mean);
  }
}

HEDDLE_INLINE bool attend_short(const AttentionArgs& a, const AttentionUnit& u, const AttentionUnit* next) {
  const AttentionProblem& p = a.problem;
  const int size = static_cast<int>((u.sequence.keys + kSub - 1) / kSub * kSub);
  int64_t lines = 0;
  if (next && is_short(p, next->sequence)) {
    lines = 2 * (next->sequence.keys + (next->end - next->begin) * p.group());
  }
  float* base = static_cast<float*>(attention_scratch(short_scratch(p, size, lines, nullptr).floats * 4));
  if (!base) return false;
  const ShortScratch m = short_scratch(p, size, lines, base);
  const bool finite = pack_short(p, u, size, m);
  LineList list{m.lines, 0};
  if (lines) list_unit(a, *next, &list);
  // Groups of equal height: 64 rows as 5 x 13, not 4 x 14 + 8.
  const int64_t count = (u.end - u.begin) * p.group(), groups = (count + kRows - 1) / kRows;
  const float* mean = nullptr;
  for (int64_t g = 0; g < groups; ++g) {
    RowView rows[kRows];
    const int64_t begin = count * g / groups, end = count * (g + 1) / groups;
    for (int64_t r = begin; r < end; ++r) rows[r - begin] = view_row(p, u, r);
    const Lines some{m.lines + list.count * g / groups, m.lines + list.count * (g + 1) / groups,
                     p.head_dim * dtype_bytes(p.type)};
    attend_short_rows(a, u, m, size, finite, rows, static_cast<int>(end - begin), some, &mean);
  }
  return true;
}
