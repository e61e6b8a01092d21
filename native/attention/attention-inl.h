// See attention.h for the definition and what the design rests on.

// Scratch of one unit, all in floats.
struct UnitScratch {
  float *query, *sums, *shift, *total, *scores, *keys, *values, *mean;
  int64_t floats;
};

HEDDLE_INLINE UnitScratch unit_scratch(const AttentionProblem& p, int64_t block, float* base) {
  const int64_t rows = (block * p.group() + kRows - 1) / kRows;  // in micro-kernels
  const int panel = panel_keys(p.head_dim, p.value_dim), columns = whole_columns(p.value_dim);
  UnitScratch u;
  int64_t at = 0;
  auto take = [&](int64_t n) {
    float* x = base + at;
    at += (n + 15) / 16 * 16;
    return x;
  };
  u.query = take(rows * p.head_dim * kRowStride);
  u.sums = take(rows * kRows * columns);
  u.shift = take(rows * kRows + W);
  u.total = take(rows * kRows);
  u.scores = take(int64_t{kRows} * kScoreStride);
  u.keys = take(int64_t{p.head_dim} * panel);
  u.values = take(int64_t{columns} * panel);
  u.mean = take(columns);
  u.floats = at;
  return u;
}

struct Panel {
  int64_t key;     // first key, inside the sequence
  int size;        // keys that its packing has room for
  bool finite;     // no packed value is infinite or NaN
  uint16_t packed; // sub-panels that are packed
};

HEDDLE_INLINE void pack_panel(const AttentionProblem& p, const AttentionUnit& u, Panel* panel, const UnitScratch& m) {
  const Vectors keys{p.key, p.type, p.key_stride[3], p.head_dim};
  const Vectors values{p.value, p.type, p.value_stride[3], p.value_dim};
  const Sequence& s = u.sequence;
  panel->finite = true;
  for (int sub = 0; sub < panel->size / kSub; ++sub) {
    if (!(panel->packed >> sub & 1)) continue;
    int64_t k_at[kSub], v_at[kSub];
    for (int j = 0; j < kSub; ++j) {
      const int64_t key = panel->key + sub * kSub + j;
      k_at[j] = key < s.keys ? p.key_at(s, key, u.key_head) : kNoVector;
      v_at[j] = key < s.keys ? p.value_at(s, key, u.key_head) : kNoVector;
    }
    for (int j = 0; j < kSub; j += kColumns) {
      pack_transposed(keys, k_at + j, kColumns, m.keys + (sub * kSub + j) * int64_t{p.head_dim}, kColumns);
    }
    panel->finite &= pack_values(values, v_at, sub, panel->size, m.values);
  }
}

// Calls k.template run<R>() for R == rows.
template <int R, class F>
HEDDLE_INLINE void with_rows(int rows, const F& f) {
  if constexpr (R > 1) {
    if (rows < R) return with_rows<R - 1>(rows, f);
  }
  f.template run<R>();
}

// Products of rows with the keys of the runs below `limit`; beyond it scores are left as they are.
struct ScoresCall {
  const float *q, *keys;
  int dim;
  const Run* runs;
  int run_count, limit;
  float* scores;
  template <int R>
  inline void run() const {
    for (int n = 0; n < run_count; ++n) {
      const int begin = runs[n].begin * kSub, end = runs[n].end * kSub < limit ? runs[n].end * kSub : limit;
      for (int j = begin; j < end; j += kColumns) {
        if (end - j > W) {
          score_tile<R, 2>(q, keys + int64_t{j} * dim, dim, scores + j);
        } else {
          score_tile<R, 1>(q, keys + int64_t{j} * dim, dim, scores + j);
        }
      }
    }
  }
};

struct ValuesCall {
  const float *weights, *values;
  int panel, value_dim;
  const Run* runs;
  int run_count, limit;
  const float* alpha;
  float* sums;
  int64_t stride;
  template <int R>
  inline void run() const {
    for (int c = 0; c < value_dim; c += kColumns) {
      const float* v = values + int64_t{c} * panel;
      if (value_dim - c > W) {
        value_tile<R, 2>(weights, v, runs, run_count, limit, alpha, sums + c, stride);
      } else {
        value_tile<R, 1>(weights, v, runs, run_count, limit, alpha, sums + c, stride);
      }
    }
  }
};

HEDDLE_INLINE float row_max(const float* s, const Run* runs, int run_count) {
  vf a = set1(kNegInf), b = a;
  for (int n = 0; n < run_count; ++n) {
    for (int j = runs[n].begin * kSub; j < runs[n].end * kSub; j += 2 * W) {
      a = max(load(s + j), a);  // a NaN score leaves the maximum alone and shows in its weight
      b = max(load(s + j + W), b);
    }
  }
  return reduce_max(max(a, b));
}

#include "attention/panel_rows-inl.h"

// Mean of all values of a sequence, for emptyRows 'uniform'.
HEDDLE_INLINE void mean_value(const AttentionProblem& p, const AttentionUnit& u, float* mean) {
  const Vectors values{p.value, p.type, p.value_stride[3], p.value_dim};
  const Sequence& s = u.sequence;
  for (int c = 0; c < p.value_dim; c += W) {
    vf total = set1(0.0f);
    for (int64_t j = 0; j < s.keys; j += kMaxPanel) {  // in blocks: a million keys in one chain would drift
      const int64_t end = j + kMaxPanel < s.keys ? j + kMaxPanel : s.keys;
      vf sum = set1(0.0f);
      for (int64_t i = j; i < end; ++i) sum = add(sum, load_lanes(values, p.value_at(s, i, u.key_head), c));
      total = add(total, sum);
    }
    store(mean + c, s.keys ? div(total, set1(static_cast<float>(s.keys))) : set1(0.0f));
  }
}

// Divides a row by its total, adds the sink, writes output and log-sum-exp.
HEDDLE_INLINE void finish_row(const AttentionArgs& a, const AttentionUnit& u, const RowView& row, const float* sums,
                              float shift, float total, const float* mean) {
  const AttentionProblem& p = a.problem;
  const Sequence& s = u.sequence;
  float factor = 1.0f;
  if (p.sinks) {
    const float sink = p.sinks[row.head] * kLog2e, top = sink > shift ? sink : shift;
    if (top > kNegInf) {
      factor = reduce_max(exp2_lanes(set1(shift - top)));
      total = total * factor + reduce_max(exp2_lanes(set1(sink - top)));
      shift = top;
    }
  }
  const bool empty = shift == kNegInf && total == 0.0f;  // a row of only NaN logits has total NaN
  factor /= total;
  const bool prefix = p.is_prefix(row.position);
  const int64_t at = prefix ? p.prefix_at(s, p.query_heads, row.head) : p.lse_at(s, row.position, row.head);
  const int64_t out = prefix ? at * p.value_dim : p.output_at(s, row.position, row.head);
  for (int c = 0; c < p.value_dim; c += W) {
    vf o = set1(0.0f);
    if (!empty) o = mul(load(sums + c), set1(factor));
    if (empty && mean) o = load(mean + c);
    store_float(prefix ? a.prefix_output : a.output, prefix ? DType::kFloat32 : p.type, out + c, o, p.value_dim - c);
  }
  float* lse = prefix ? a.prefix_lse : a.log_sum_exp;
  if (lse) {
    const float tail = total == total ? reduce_max(log_normal(set1(total))) : total;
    lse[at] = empty ? kNegInf : shift * kLn2 + tail;
  }
}

// Keys that any row of a unit may see.
HEDDLE_INLINE KeyRange unit_range(const AttentionProblem& p, const AttentionUnit& u) {
  if (p.query_ids) return {0, u.sequence.keys};
  return {key_range(p, u.sequence, u.begin).lo, key_range(p, u.sequence, u.end - 1).hi};
}

HEDDLE_INLINE RowView view_row(const AttentionProblem& p, const AttentionUnit& u, int64_t row) {
  const int64_t group = p.group(), i = u.begin + (group == 1 ? row : row / group);
  if (group == 1) return {i, static_cast<int32_t>(u.key_head), key_range(p, u.sequence, i)};
  return {i, static_cast<int32_t>(u.key_head * group + row % group), key_range(p, u.sequence, i)};
}

// Rows [begin, end) of a unit that one micro-kernel takes: groups of equal height, 64 rows as 5 x 13 and not 4 x 14 + 8.
struct RowGroups {
  int64_t count, groups;
  explicit RowGroups(int64_t rows) : count(rows), groups((rows + kRows - 1) / kRows) {}
  int64_t begin(int64_t g) const { return count * g / groups; }
};

// Packs q; the sums begin with a group's first panel.
HEDDLE_INLINE void start_unit(const AttentionProblem& p, const AttentionUnit& u, const UnitScratch& m) {
  const RowGroups x((u.end - u.begin) * p.group());
  const Vectors queries{p.query, p.type, p.query_stride[3], p.head_dim};
  for (int64_t g = 0; g < x.groups; ++g) {
    int64_t at[kRowStride];
    for (int64_t i = 0; i < kRowStride; ++i) {
      const int64_t r = x.begin(g) + i;
      const RowView row = view_row(p, u, r < x.begin(g + 1) ? r : 0);
      at[i] = r < x.begin(g + 1) ? p.query_at(u.sequence, row.position, row.head) : kNoVector;
    }
    pack_transposed(queries, at, kRowStride, m.query + g * p.head_dim * kRowStride, kRowStride);
  }
  for (int64_t r = 0; r < x.count; ++r) {
    m.shift[r] = kNegInf;
    m.total[r] = 0.0f;
  }
}

// All rows of a unit over one packed panel.
HEDDLE_INLINE void attend_panel(const AttentionProblem& p, const AttentionUnit& u, const Panel& panel, const UnitScratch& m,
                                bool transform) {
  const RowGroups x((u.end - u.begin) * p.group());
  const float factor = transform ? kLog2e : p.scale * kLog2e;
  for (int64_t g = 0; g < x.groups; ++g) {
    RowView rows[kRows];
    const int64_t first = x.begin(g);
    const int count = static_cast<int>(x.begin(g + 1) - first);
    // Ranges grow with the position; block ids see beyond them.
    const KeyRange last = view_row(p, u, first + count - 1).range, all{last.lo, view_row(p, u, first).range.hi};
    const bool whole = !transform && all.lo <= panel.key && all.hi >= panel.key + panel.size;
    for (int i = 0; i < count && !whole; ++i) rows[i] = view_row(p, u, first + i);
    PanelRows group{p, u.sequence, panel, m, rows, m.query + g * p.head_dim * kRowStride,
                    m.sums + first * whole_columns(p.value_dim), count, first, factor, all,
                    transform ? u.sequence.keys : last.hi, {}};
    if (whole) {
      group.runs[group.run_count++] = {0, panel.size / kSub};
    } else {
      list_runs(&group);
    }
    if (group.run_count) attend_rows(&group, transform);
  }
}

#include "attention/short-inl.h"

static bool attend_unit(const AttentionArgs& a, const AttentionUnit& u, const UnitRun& run) {
  const AttentionProblem& p = a.problem;
  if (is_short(p, u.sequence)) return attend_short(a, u, run);
  const int64_t bytes = unit_scratch(p, u.end - u.begin, nullptr).floats * 4;
  float* base = static_cast<float*>(attention_scratch(bytes));
  if (!base) return false;
  const UnitScratch m = unit_scratch(p, u.end - u.begin, base);
  start_unit(p, u, m);
  const bool transform = has_transform(p);
  const KeyRange all = unit_range(p, u);
  Panel panel{};
  panel.size = panel_keys(p.head_dim, p.value_dim);
  for (panel.key = all.lo / panel.size * panel.size; panel.key < all.hi; panel.key += panel.size) {
    panel.packed = 0;
    for (int sub = 0; sub < panel.size / kSub; ++sub) {
      const int64_t key = panel.key + sub * kSub;
      if (key < all.hi && key + kSub > all.lo) panel.packed = static_cast<uint16_t>(panel.packed | 1u << sub);
    }
    pack_panel(p, u, &panel, m);
    attend_panel(p, u, panel, m, transform);
  }

  const float* mean = nullptr;
  const int64_t columns = whole_columns(p.value_dim);
  for (int64_t r = 0; r < (u.end - u.begin) * p.group(); ++r) {
    if (p.uniform_empty && !mean && m.shift[r] == kNegInf) {
      mean_value(p, u, m.mean);
      mean = m.mean;
    }
    finish_row(a, u, view_row(p, u, r), m.sums + r * columns, m.shift[r], m.total[r], mean);
  }
  return true;
}

Status attention_units(const AttentionArgs& a, const Exec& exec) {
  Failure failure;
  const bool done = parallel_for(exec, a.plan->units, a.plan->grain, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      if (!attend_unit(a, unit_of(a.problem, *a.plan, i), {begin, end, i})) failure.set();
    }
  });
  if (failure.get()) return kNoMemory;
  return done ? kOk : kCancelled;
}
