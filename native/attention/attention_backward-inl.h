// See attention_backward.h for the definition and what the design rests on.

#include "attention/backward_tiles-inl.h"

#include "attention/backward_rows-inl.h"

static_assert(kBlockRows <= 112 && kSub == 32 && kColumns <= 32 && kMaxPanel == 512, "as attention_backward.h has them");

struct BackwardScratch {  // of one panel
  float *key_sums, *value_sums;     // [key][column]
  float *keys, *key_rows, *values;  // K^T, K and V^T
  float *query, *upstream;          // rows of one block
  float *weights, *slopes;          // P of one cell, dS of the cells of one chunk
  int64_t floats;
};

HEDDLE_INLINE BackwardScratch backward_scratch(const AttentionProblem& p, int panel, float* base) {
  const int qk = whole_columns(p.head_dim), vo = whole_columns(p.value_dim);
  BackwardScratch m;
  int64_t at = 0;
  auto take = [&](int64_t n) {
    float* x = base + at;
    at += (n + 15) / 16 * 16;
    return x;
  };
  m.key_sums = take(int64_t{panel} * qk);
  m.value_sums = take(int64_t{panel} * vo);
  m.keys = take(int64_t{panel} * p.head_dim);
  m.key_rows = take(int64_t{panel} * qk);
  m.values = take(int64_t{panel} * p.value_dim);
  m.query = take(int64_t{kBlockRows} * qk);
  m.upstream = take(int64_t{kBlockRows} * vo);
  m.weights = take(kCell);
  m.slopes = take(kCells * kCell);
  m.floats = at;
  return m;
}

struct BackwardUnit {
  const AttentionBackwardArgs& a;
  Sequence s;
  int64_t key_head;
  int panel;                                // keys
  float *query_sums, *delta, *shift;        // of all rows
  float* packed;                            // all row blocks, when kept
  BackwardScratch m;
  uint32_t started = 0, finished = 0;       // sub-panels of the panel
  bool finite = true;                       // every key of them

  int64_t block_floats() const {
    return int64_t{kBlockRows} * (whole_columns(a.problem.head_dim) + whole_columns(a.problem.value_dim));
  }

  int64_t row_count() const { return s.queries * a.problem.group(); }
  RowView view(int64_t row) const {
    const int64_t group = a.problem.group(), i = row / group;
    return {i, static_cast<int32_t>(key_head * group + row % group), key_range(a.problem, s, i)};
  }
  int64_t row_at(const RowView& r, int64_t dim) const { return a.row_at(s, r.position, r.head, dim); }
  int64_t upstream_at(const RowView& r) const { return a.upstream_at(s, r.position, r.head); }
};

// Before the first panel.
HEDDLE_INLINE void start_rows(const BackwardUnit& u, const RowView* rows, int64_t first, int count) {
  const AttentionProblem& p = u.a.problem;
  const Vectors g{u.a.upstream, p.type, 1, p.value_dim}, o{u.a.output, p.type, 1, p.value_dim};
  const Vectors prefix_output{u.a.prefix_output, DType::kFloat32, 1, p.value_dim};
  const int columns = whole_columns(p.head_dim);
  for (int r = 0; r < count; ++r) {
    const RowView& row = rows[r];
    const bool prefix = p.is_prefix(row.position);
    const int64_t at = prefix ? u.row_at(row, p.value_dim) : p.output_at(u.s, row.position, row.head);
    const int64_t g_at = u.upstream_at(row);
    vf sum = set1(0.0f);
    for (int c = 0; c < p.value_dim; c += W) {
      sum = fma(load_lanes(g, g_at, c), load_lanes(prefix ? prefix_output : o, at, c), sum);
    }
    u.delta[first + r] = reduce_add(sum);
    u.shift[first + r] = prefix ? u.a.prefix_lse[p.prefix_at(u.s, p.query_heads, row.head)]
                                : u.a.log_sum_exp[p.lse_at(u.s, row.position, row.head)];
  }
  for (int64_t i = first * columns; i < (first + count) * columns; ++i) u.query_sums[i] = 0.0f;
}

HEDDLE_INLINE void store_scaled(void* out, DType type, int64_t at, const float* from, int dim, float scale) {
  for (int c = 0; c < dim; c += W) store_float(out, type, at + c, mul(load(from + c), set1(scale)), dim - c);
}

// After the last panel.
HEDDLE_INLINE void finish_rows(const BackwardUnit& u, const RowView* rows, int64_t first, int count) {
  const AttentionProblem& p = u.a.problem;
  for (int r = 0; r < count; ++r) {
    const bool prefix = p.is_prefix(rows[r].position);
    store_scaled(prefix ? u.a.prefix_query_grad : u.a.query_grad, prefix ? DType::kFloat32 : p.type,
                 u.row_at(rows[r], p.head_dim), u.query_sums + (first + r) * whole_columns(p.head_dim), p.head_dim,
                 p.scale);
  }
}

HEDDLE_INLINE void clear_sums(const BackwardUnit& u, int sub) {
  const int64_t qk = kSub * whole_columns(u.a.problem.head_dim), vo = kSub * whole_columns(u.a.problem.value_dim);
  for (int64_t i = sub * qk; i < (sub + 1) * qk; ++i) u.m.key_sums[i] = 0.0f;
  for (int64_t i = sub * vo; i < (sub + 1) * vo; ++i) u.m.value_sums[i] = 0.0f;
}

// Before the first block that sees a sub-panel: packs its keys and values, clears its sums.
static void start_sub(BackwardUnit* u, int64_t panel_key, int sub) {
  const AttentionProblem& p = u->a.problem;
  const Vectors keys{p.key, p.type, p.key_stride[3], p.head_dim};
  const Vectors values{p.value, p.type, p.value_stride[3], p.value_dim};
  int64_t k_at[kSub], v_at[kSub];
  for (int j = 0; j < kSub; ++j) {
    const int64_t key = panel_key + sub * kSub + j;
    k_at[j] = key < u->s.keys ? p.key_at(u->s, key, u->key_head) : kNoVector;
    v_at[j] = key < u->s.keys ? p.value_at(u->s, key, u->key_head) : kNoVector;
  }
  for (int j = 0; j < kSub; j += kColumns) {
    pack_transposed(keys, k_at + j, kColumns, u->m.keys + (sub * kSub + j) * int64_t{p.head_dim}, kColumns);
    pack_transposed(values, v_at + j, kColumns, u->m.values + (sub * kSub + j) * int64_t{p.value_dim}, kColumns);
  }
  u->finite &= pack_values(keys, k_at, sub, u->panel, u->m.key_rows);
  clear_sums(*u, sub);
  u->started |= 1u << sub;
}

// After the last block that sees it.
static void finish_sub(BackwardUnit* u, int64_t panel_key, int sub) {
  const AttentionBackwardArgs& a = u->a;
  const AttentionProblem& p = a.problem;
  for (int64_t j = sub * kSub; j < (sub + 1) * kSub && panel_key + j < u->s.keys; ++j) {
    const int64_t key = panel_key + j;
    const bool prefix = p.is_prefix(key);
    const DType type = prefix ? DType::kFloat32 : p.type;
    store_scaled(prefix ? a.prefix_key_grad : a.key_grad, type, a.key_row_at(u->s, key, u->key_head, p.head_dim),
                 u->m.key_sums + j * whole_columns(p.head_dim), p.head_dim, p.scale);
    store_scaled(prefix ? a.prefix_value_grad : a.value_grad, type, a.key_row_at(u->s, key, u->key_head, p.value_dim),
                 u->m.value_sums + j * whole_columns(p.value_dim), p.value_dim, 1.0f);
  }
  u->finished |= 1u << sub;
}

// Rows of a block that share micro-kernels.
struct RowGroup {
  int first, count;
  uint32_t seen;   // sub-panels of which one row at least may see a key
  int limit;       // keys of the panel that any of them may see
  bool plain;      // every row's logits are scaled products
  int64_t end;     // of the keys of the sequence that any of them may see
};

HEDDLE_INLINE RowGroup row_group(const BackwardUnit& u, const RowView* rows, const float* shift, int first, int count,
                                 int64_t panel_key, bool transform) {
  const AttentionProblem& p = u.a.problem;
  RowGroup g{first, count, 0, 0, !transform && !u.a.bias_grad, 0};
  bool every = false;
  for (int r = first; r < first + count; ++r) {
    const bool empty = shift[r] == kNegInf;
    every |= empty && p.uniform_empty;
    g.plain &= !empty && !p.is_prefix(rows[r].position);
    if (rows[r].range.hi > g.end) g.end = rows[r].range.hi;
  }
  if (every || p.query_ids) g.end = u.s.keys;
  if (g.end <= panel_key) return g;
  g.limit = g.end - panel_key < u.panel ? static_cast<int>(g.end - panel_key) : u.panel;
  for (int sub = 0; sub * kSub < g.limit; ++sub) {
    if (every || sub_is_seen(p, u.s, rows + first, count, panel_key + sub * kSub)) g.seen |= 1u << sub;
  }
  return g;
}

HEDDLE_INLINE void pack_rows(const BackwardUnit& u, const RowView* rows, int count) {
  const AttentionProblem& p = u.a.problem;
  const Vectors q{p.query, p.type, p.query_stride[3], p.head_dim}, g{u.a.upstream, p.type, 1, p.value_dim};
  for (int i = 0; i < count; ++i) {
    pack_row(q, p.query_at(u.s, rows[i].position, rows[i].head), u.m.query + i * W);
    pack_row(g, u.upstream_at(rows[i]), u.m.upstream + i * W);
  }
}

// Weights and slopes of a block in the cell of one sub-panel, and what they add to the gradients of its keys.
HEDDLE_INLINE void backward_cell(const BackwardUnit& u, const RowView* rows, const RowGroup* groups, int group_count,
                                 int64_t first, int64_t panel_key, int sub, bool transform) {
  const AttentionProblem& p = u.a.problem;
  const BackwardScratch& m = u.m;
  const int64_t key = panel_key + sub * kSub;
  int lo = 0, hi = group_count;
  while (!(groups[lo].seen >> sub & 1)) ++lo;
  while (!(groups[hi - 1].seen >> sub & 1)) --hi;
  float *weights = m.weights, *slopes = m.slopes + sub % kCells * kCell;
  for (int n = lo; n < hi; ++n) {
    const RowGroup& g = groups[n];
    if (!(g.seen >> sub & 1)) {  // zeros between groups that see the cell
      for (int i = g.first * kSub; i < (g.first + g.count) * kSub; ++i) weights[i] = slopes[i] = 0.0f;
      continue;
    }
    const int limit = g.limit - sub * kSub < kSub ? g.limit - sub * kSub : kSub;
    with_rows<kRows>(g.count, ProductCall{m.query + g.first * W, m.keys + int64_t{sub} * kSub * p.head_dim, p.head_dim,
                                          limit, weights + g.first * kSub});
  }
  const float factor = p.scale * kLog2e;
  for (int n = lo; n < hi; ++n) {
    const RowGroup& g = groups[n];
    if (!(g.seen >> sub & 1)) continue;
    const int limit = g.limit - sub * kSub < kSub ? g.limit - sub * kSub : kSub;
    with_rows<kRows>(g.count, ProductCall{m.upstream + g.first * W, m.values + int64_t{sub} * kSub * p.value_dim,
                                          p.value_dim, limit, slopes + g.first * kSub});
    const auto plain = [&](int r) { return rows[r].range.lo <= key && rows[r].range.hi >= key + kSub; };
    for (int r = g.first, end = r + g.count, next; r < end; r = next) {
      const float *shift = u.shift + first + r, *delta = u.delta + first + r;
      float *w = weights + r * kSub, *d = slopes + r * kSub;
      next = r + 1;
      if (!g.plain || !plain(r)) {
        backward_row(u.a, u.s, rows[r], transform, key, *shift, *delta, w, d);
        continue;
      }
      while (next < end && plain(next)) ++next;
      backward_plain_rows(factor, shift, delta, next - r, w, d);
    }
  }
  const int begin = groups[lo].first, count = groups[hi - 1].first + groups[hi - 1].count - begin;
  const int keys = u.s.keys - key < kSub ? static_cast<int>(u.s.keys - key) : kSub;
  add_keys(weights + begin * kSub, m.upstream + begin * W, count, keys, p.value_dim,
           m.value_sums + int64_t{sub} * kSub * whole_columns(p.value_dim));
  add_keys(slopes + begin * kSub, m.query + begin * W, count, keys, p.head_dim,
           m.key_sums + int64_t{sub} * kSub * whole_columns(p.head_dim));
}

// What the rows of a block get from the keys of a chunk, whose first sub-panel is `sub`.
HEDDLE_INLINE void add_queries(const BackwardUnit& u, const RowGroup* groups, int group_count, int64_t first, int sub,
                               bool finite) {
  const int dim = u.a.problem.head_dim, columns = whole_columns(dim);
  for (int c = 0; c < dim; c += kColumns) {
    for (int n = 0; n < group_count; ++n) {
      const RowGroup& g = groups[n];
      const uint32_t seen = g.seen >> sub & ((1u << kCells) - 1);
      if (!seen) continue;
      const QueryCall call{u.m.slopes + g.first * kSub, u.m.key_rows + int64_t{c} * u.panel + sub * kSub * kColumns, seen,
                           g.limit - sub * kSub, u.query_sums + (first + g.first) * columns + c, columns, dim - c > W};
      if (finite) {
        with_rows<kRows>(g.count, call);
      } else {
        call.run_carefully(g.count);
      }
    }
  }
}

// One block of rows, from `first`, over one panel.
HEDDLE_INLINE void backward_block(BackwardUnit* unit, int64_t first, int64_t panel_key, bool transform) {
  BackwardUnit& u = *unit;
  RowView rows[kBlockRows];
  RowGroup groups[kBlockRows / kRows];
  const int64_t row_count = u.row_count(), after = first + kBlockRows < row_count ? first + kBlockRows : row_count;
  const int count = static_cast<int>(after - first);
  for (int i = 0; i < count; ++i) rows[i] = u.view(first + i);
  if (panel_key == 0) start_rows(u, rows, first, count);
  const int group_count = (count + kRows - 1) / kRows;  // of equal height: 64 rows as 5 x 13, not 4 x 14 + 8
  uint32_t seen = 0;
  int64_t end = 1;
  for (int n = 0; n < group_count; ++n) {
    const int begin = count * n / group_count, next = count * (n + 1) / group_count;
    groups[n] = row_group(u, rows, u.shift + first, begin, next - begin, panel_key, transform);
    seen |= groups[n].seen;
    if (groups[n].end > end) end = groups[n].end;
  }
  if (u.packed) {
    u.m.query = u.packed + first / kBlockRows * u.block_floats();
    u.m.upstream = u.m.query + int64_t{kBlockRows} * whole_columns(u.a.problem.head_dim);
  }
  if (u.packed ? panel_key == 0 : seen != 0) pack_rows(u, rows, count);
  const bool last = after == row_count, completes = end > panel_key && end <= panel_key + u.panel;
  for (int chunk = 0; chunk < u.panel / kSub && seen >> chunk; chunk += kCells) {
    for (int sub = chunk; sub < chunk + kCells; ++sub) {
      if (!(seen >> sub & 1)) continue;
      if (!(u.started >> sub & 1)) start_sub(&u, panel_key, sub);
      backward_cell(u, rows, groups, group_count, first, panel_key, sub, transform);
      if (last) finish_sub(&u, panel_key, sub);
    }
    add_queries(u, groups, group_count, first, chunk, u.finite);
  }
  if (completes) finish_rows(u, rows, first, count);
}

// One panel of a unit, block after block: behind the panel before it, which may run on another thread. False when
// cancelled.
HEDDLE_INLINE bool backward_panel(BackwardUnit* u, int64_t index, PanelProgress* progress, int64_t tile,
                                  const Exec& exec) {
  const int64_t key = index * u->panel;
  const bool transform = has_transform(u->a.problem);
  u->started = u->finished = 0;
  u->finite = true;
  int64_t done = 0;
  for (int64_t r = 0; r < u->row_count(); r += kBlockRows) {
    if (progress && index && !progress->wait(tile - 1, done + 1, exec)) return false;
    backward_block(u, r, key, transform);
    ++done;
    if (progress) progress->set(tile, done);
  }
  for (int sub = 0; sub < u->panel / kSub; ++sub) {
    if (u->finished >> sub & 1) continue;
    if (!(u->started >> sub & 1)) clear_sums(*u, sub);
    finish_sub(u, key, sub);
  }
  return true;
}

HEDDLE_INLINE BackwardUnit backward_unit(const AttentionBackwardArgs& a, int64_t sequence, int64_t key_head) {
  const AttentionProblem& p = a.problem;
  BackwardUnit u{a, sequence_of(p, sequence), key_head, backward_panel_keys(p.head_dim, p.value_dim), nullptr, nullptr,
                 nullptr, nullptr, {}};
  if (u.s.keys < u.panel) u.panel = static_cast<int>((u.s.keys + kSub - 1) / kSub * kSub);
  if (u.panel == 0) u.panel = kSub;  // no keys: one panel, in which q gets its zeros
  return u;
}

HEDDLE_INLINE void set_rows(BackwardUnit* u, float* rows) {
  const int64_t whole = (u->row_count() + 15) / 16 * 16;
  u->shift = rows;
  u->delta = rows + whole;
  u->query_sums = rows + 2 * whole;
  if (keeps_rows(u->a.problem, u->row_count(), u->s.keys)) {
    u->packed = u->query_sums + u->row_count() * whole_columns(u->a.problem.head_dim);
  }
}

// A whole unit on one thread.
static bool backward_whole(const AttentionBackwardArgs& a, int64_t sequence, int64_t key_head, const Exec& exec) {
  const AttentionProblem& p = a.problem;
  BackwardUnit u = backward_unit(a, sequence, key_head);
  const int64_t scratch = backward_scratch(p, u.panel, nullptr).floats;
  float* base = static_cast<float*>(attention_scratch((scratch + backward_row_floats(p, u.row_count(), u.s.keys)) * 4));
  if (!base) return false;
  u.m = backward_scratch(p, u.panel, base);
  set_rows(&u, base + scratch);
  int64_t panel = 0;
  do {
    backward_panel(&u, panel++, nullptr, 0, exec);
  } while (panel * u.panel < u.s.keys);
  return true;
}

// One panel of a unit whose panels run side by side.
static bool backward_part(const AttentionBackwardArgs& a, int64_t tile, const Exec& exec) {
  const AttentionProblem& p = a.problem;
  BackwardPlan& plan = *a.plan;
  const int64_t unit = tile / plan.panels, panel = tile % plan.panels;
  BackwardUnit u = backward_unit(a, unit / p.key_heads, unit % p.key_heads);
  if (panel && panel * u.panel >= u.s.keys) return true;
  float* base = static_cast<float*>(attention_scratch(backward_scratch(p, u.panel, nullptr).floats * 4));
  if (base) {
    u.m = backward_scratch(p, u.panel, base);
    set_rows(&u, plan.rows.data() + unit * plan.unit_floats);
    if (backward_panel(&u, panel, &plan.progress, tile, exec)) return true;
  }
  plan.progress.set(tile, INT64_MAX);  // nobody waits for what will not come
  return false;
}

Status attention_backward_units(const AttentionBackwardArgs& a, const Exec& exec) {
  const AttentionProblem& p = a.problem;
  const BackwardPlan& plan = *a.plan;
  const int64_t sequences = p.sequences(), outer = plan.join_batch ? 1 : sequences;
  const int64_t heads = plan.join_heads ? 1 : p.key_heads, each = plan.panels ? plan.panels : 1;
  Failure failure;
  const bool done = parallel_for(exec, outer * heads * each, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      if (plan.panels) {
        if (!backward_part(a, i, exec)) failure.set();
        continue;
      }
      for (int64_t s = plan.join_batch ? 0 : i / heads; s < (plan.join_batch ? sequences : i / heads + 1); ++s) {
        for (int64_t h = plan.join_heads ? 0 : i % heads; h < (plan.join_heads ? p.key_heads : i % heads + 1); ++h) {
          if (!backward_whole(a, s, h, exec)) failure.set();
        }
      }
    }
  });
  if (!done || (failure.get() && exec.cancelled())) return kCancelled;
  return failure.get() ? kNoMemory : kOk;
}
