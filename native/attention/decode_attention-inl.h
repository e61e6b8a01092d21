// See decode_attention.h for the definition and what the design rests on.

// Packs keys [panel->key, end) of a paged sequence.
HEDDLE_INLINE void pack_pages(const DecodeAttentionArgs& a, const AttentionUnit& u, int64_t end, Panel* panel,
                              const UnitScratch& m) {
  const AttentionProblem& p = a.problem;
  const Vectors keys{a.keys, a.cache_type, 1, p.head_dim}, values{a.values, a.cache_type, 1, p.value_dim};
  const int32_t* table = a.table + u.sequence.batch * a.table_stride;
  panel->finite = true;
  panel->packed = 0;
  for (int sub = 0; sub < panel->size / kSub && panel->key + sub * kSub < end; ++sub) {
    panel->packed = static_cast<uint16_t>(panel->packed | 1u << sub);
    int64_t k_at[kSub], v_at[kSub];
    float k_scale[kSub], v_scale[kSub];
    for (int j = 0; j < kSub; ++j) {
      const int64_t key = panel->key + sub * kSub + j;
      k_at[j] = v_at[j] = kNoVector;
      k_scale[j] = v_scale[j] = 0.0f;
      if (key >= end) continue;
      const int64_t vector = (table[key / a.page_size] * int64_t{p.key_heads} + u.key_head) * a.page_size + key % a.page_size;
      k_at[j] = vector * p.head_dim;
      v_at[j] = vector * p.value_dim;
      if (a.key_scales) {
        k_scale[j] = a.key_scales[vector];
        v_scale[j] = a.value_scales[vector];
      }
    }
    for (int j = 0; j < kSub; j += kColumns) {
      float* out = m.keys + (sub * kSub + j) * int64_t{p.head_dim};
      pack_transposed(keys, k_at + j, kColumns, out, kColumns);
      for (int d = 0; a.key_scales && d < p.head_dim; ++d) {
        float* row = out + d * kColumns;
        store(row, mul(load(row), load(k_scale + j)));
        store(row + W, mul(load(row + W), load(k_scale + j + W)));
      }
    }
    panel->finite &= pack_values(values, v_at, sub, panel->size, m.values);
    for (int j = 0; a.value_scales && j < kSub; ++j) {
      const bool finite = v_scale[j] - v_scale[j] == 0.0f;
      panel->finite &= finite;
      for (int c = 0; c < whole_columns(p.value_dim); c += W) {
        float* to = m.values + (int64_t{c / kColumns} * panel->size + sub * kSub + j) * kColumns + c % kColumns;
        store(to, mul(load(to), set1(v_scale[j])));
      }
    }
  }
}

// One part of one sequence for one key head: partial shifts, totals and sums of its rows.
static bool decode_part(const DecodeAttentionArgs& a, const AttentionUnit& u, int64_t begin, int64_t end, float* partial) {
  const AttentionProblem& p = a.problem;
  const int64_t rows = p.queries * p.group(), columns = whole_columns(p.value_dim), stride = decode_row_floats(p);
  float* base = static_cast<float*>(attention_scratch(unit_scratch(p, p.queries, nullptr).floats * 4));
  if (!base) return false;
  const UnitScratch m = unit_scratch(p, p.queries, base);
  start_unit(p, u, m);
  const bool transform = has_transform(p);
  const KeyRange all = unit_range(p, u);
  Panel panel{};
  panel.size = panel_keys(p.head_dim, p.value_dim);
  for (panel.key = begin; panel.key < end; panel.key += panel.size) {
    if (panel.key + panel.size <= all.lo || panel.key >= all.hi) continue;
    pack_pages(a, u, panel.key + panel.size < end ? panel.key + panel.size : end, &panel, m);
    attend_panel(p, u, panel, m, transform);
  }
  for (int64_t r = 0; r < rows; ++r) {
    float* to = partial + r * stride;
    to[0] = m.shift[r];
    to[1] = m.total[r];
    for (int64_t c = 0; c < columns; c += W) store(to + 2 + c, load(m.sums + r * columns + c));
  }
  return true;
}

// Adds the parts of one row in key order.
HEDDLE_INLINE void merge_row(const DecodeAttentionArgs& a, const AttentionUnit& u, int64_t row, float* sums) {
  const AttentionProblem& p = a.problem;
  const int64_t columns = whole_columns(p.value_dim), stride = decode_row_floats(p);
  const int64_t first = a.first_part[u.sequence.batch], parts = a.first_part[u.sequence.batch + 1] - first;
  auto part = [&](int64_t i) {
    return a.partial + ((first + i) * p.key_heads + u.key_head) * a.partial_floats + row * stride;
  };
  float top = kNegInf, total = 0.0f;
  for (int64_t i = 0; i < parts; ++i) top = part(i)[0] > top ? part(i)[0] : top;
  for (int64_t c = 0; c < columns; c += W) store(sums + c, set1(0.0f));
  for (int64_t i = 0; i < parts; ++i) {
    const float* x = part(i);
    const bool none = x[0] == kNegInf && x[1] == 0.0f;
    if (none) continue;
    const vf factor = exp2_lanes(set1(x[0] == kNegInf ? 0.0f : x[0] - top));
    total += x[1] * reduce_max(factor);
    for (int64_t c = 0; c < columns; c += W) store(sums + c, fma(load(x + 2 + c), factor, load(sums + c)));
  }
  AttentionArgs out;
  out.problem = p;
  out.output = a.output;
  out.log_sum_exp = a.log_sum_exp;
  finish_row(out, u, view_row(p, u, row), sums, top, total, nullptr);
}

Status decode_parts(const DecodeAttentionArgs& a, const Exec& exec) {
  const AttentionProblem& p = a.problem;
  const int64_t parts = a.first_part[p.batch];
  auto unit = [&](int64_t batch, int64_t key_head) {
    return AttentionUnit{{batch, 0, p.queries, 0, a.lengths[batch]}, key_head, 0, p.queries};
  };
  Failure failure;
  bool done = parallel_for(exec, parts * p.key_heads, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t part = i / p.key_heads;
      int64_t lo = 0, hi = p.batch;  // the last batch entry whose first part is <= part
      while (hi - lo > 1) {
        const int64_t mid = (lo + hi) / 2;
        (a.first_part[mid] <= part ? lo : hi) = mid;
      }
      const int64_t key = (part - a.first_part[lo]) * kDecodePart;
      const int64_t last = key + kDecodePart < a.lengths[lo] ? key + kDecodePart : a.lengths[lo];
      if (!decode_part(a, unit(lo, i % p.key_heads), key, last, a.partial + i * a.partial_floats)) failure.set();
    }
  });
  if (failure.get()) return kNoMemory;
  if (!done) return kCancelled;
  done = parallel_for(exec, p.batch * p.key_heads, 16, [&](int64_t begin, int64_t end) {
    alignas(64) float sums[512 + kColumns];
    for (int64_t i = begin; i < end; ++i) {
      const AttentionUnit u = unit(i / p.key_heads, i % p.key_heads);
      for (int64_t r = 0; r < p.queries * p.group(); ++r) merge_row(a, u, r, sums);
    }
  });
  return done ? kOk : kCancelled;
}
