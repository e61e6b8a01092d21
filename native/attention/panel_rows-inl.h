// The rows of one micro-kernel over one panel: scores, which become weights in place, and their product with the values.
//
// A row's shift is what its logits are reduced by before 2^x. With 512-bit registers it is lazy: the largest logit of the
// first sub-panel of 32 keys that the row sees, raised to the row's largest logit after a panel whose weights add up to
// more than kLargestSum. So a panel takes one pass: each sub-panel becomes weights while it is in L1, without looking for
// the largest logit (one of ten operations per 16 scores). The sum also tells of NaN, and of Inf where 2^x overflows.
// Raised or not is a row's own affair: rows beside one that is raised keep their shift and get the same bits again.
// A weight of up to 2^16 costs no precision: its x is then exact to 2^-21.
//
// Narrower registers look for the largest logit first: there a max replaces the min that keeps x inside 2^x's reach, and
// nothing is won. So do transformed logits, where ALiBi may raise the top in every panel.

struct PanelRows {
  const AttentionProblem& p;
  const Sequence& s;
  const Panel& panel;
  const UnitScratch& m;
  const RowView* rows;
  const float* query;
  float* sums;
  int count;
  int64_t first;  // row of the unit
  float factor;   // of the scores, to logits in units of ln 2
  KeyRange all;   // keys that every row sees
  int64_t end;    // beyond the last key that some row sees
  Run runs[kMaxPanel / kSub];
  int run_count = 0, limit = 0;
  alignas(64) float shift[kRowStride] = {}, sum[kRowStride] = {};
};

// Products of the rows with the keys of some runs, -Inf where they are masked.
HEDDLE_INLINE void score_runs(const PanelRows& x, const Run* runs, int run_count, bool transform) {
  with_rows<kRows>(x.count, ScoresCall{x.query, x.m.keys, x.p.head_dim, runs, run_count, x.limit, x.m.scores});
  const KeyRange whole{x.panel.key + runs[0].begin * kSub, x.panel.key + runs[run_count - 1].end * kSub};
  if (!transform && x.all.lo <= whole.lo && x.all.hi >= whole.hi) return;
  for (int r = 0; r < x.count; ++r) {
    if (!transform && x.rows[r].range.lo <= whole.lo && x.rows[r].range.hi >= whole.hi) continue;
    float* row = x.m.scores + r * kScoreStride;
    for (int n = 0; n < run_count; ++n) {
      for (int sub = runs[n].begin; sub < runs[n].end; ++sub) {
        mask_sub(x.p, x.s, x.rows[r], transform, x.panel.key, sub, row);
      }
    }
  }
}

// Weights by the shifts that the rows have; a row without one takes the largest logit of its first sub-panel. Each
// sub-panel is finished while it is in L1. False when a row's sum says that its shift is too small (or is NaN).
HEDDLE_INLINE bool weigh_by_shift(PanelRows* x) {
  alignas(64) float minus[kRowStride], lanes[kRows * kColumns];
  for (int i = 0; i < x->count * kColumns; i += W) store(lanes + i, set1(0.0f));
  bool started = true;
  for (int r = 0; r < x->count; ++r) {
    started &= x->shift[r] > kNegInf;
    minus[r] = x->shift[r] > kNegInf ? -x->shift[r] : 0.0f;
  }
  for (int n = 0; n < x->run_count; ++n) {
    for (int sub = x->runs[n].begin; sub < x->runs[n].end; ++sub) {
      const Run run{sub, sub + 1};
      score_runs(*x, &run, 1, false);
      if (!started) {
        started = true;
        for (int r = 0; r < x->count; ++r) {
          if (x->shift[r] > kNegInf) continue;
          x->shift[r] = row_max(x->m.scores + r * kScoreStride, &run, 1) * x->factor;
          started &= x->shift[r] > kNegInf;
          if (x->shift[r] > kNegInf) minus[r] = -x->shift[r];
        }
      }
      exp_sub(x->m.scores + sub * kSub, x->count, x->factor, minus, lanes);
    }
  }
  bool fits = true;
  for (int r = 0; r < x->count; ++r) {
    x->sum[r] = reduce_add(add(load(lanes + r * kColumns), load(lanes + r * kColumns + W)));
    fits &= x->sum[r] <= kLargestSum;
  }
  return fits;
}

// Weights by the largest logit; rows whose sum is known to fit keep their shift and get the same weights again.
HEDDLE_INLINE void weigh_by_max(PanelRows* x, bool transform) {
  score_runs(*x, x->runs, x->run_count, transform);
  for (int r = 0; r < x->count; ++r) {
    float* row = x->m.scores + r * kScoreStride;
    const float top = row_max(row, x->runs, x->run_count) * x->factor, before = x->m.shift[x->first + r];
    if (!(x->sum[r] <= kLargestSum)) x->shift[r] = top > before ? top : before;
  }
  for (int r = 0; r < x->count; ++r) {
    float* row = x->m.scores + r * kScoreStride;
    x->sum[r] = exp_row(row, x->runs, x->run_count, x->factor, x->shift[r] == kNegInf ? 0.0f : x->shift[r]);
    if (x->s.keys == 1) set_only_weight(row, &x->sum[r]);
  }
}

// The sub-panels that some row sees.
HEDDLE_INLINE void list_runs(PanelRows* x) {
  for (int sub = 0; sub < x->panel.size / kSub; ++sub) {
    if (!(x->panel.packed >> sub & 1) || !sub_is_seen(x->p, x->s, x->rows, x->count, x->panel.key + sub * kSub)) continue;
    if (x->run_count && x->runs[x->run_count - 1].end == sub) {
      ++x->runs[x->run_count - 1].end;
    } else {
      x->runs[x->run_count++] = {sub, sub + 1};
    }
  }
}

HEDDLE_INLINE void attend_rows(PanelRows* x, bool transform) {
  const AttentionProblem& p = x->p;
  const UnitScratch& m = x->m;
  const Panel& panel = x->panel;
  const int64_t left = x->end - panel.key;
  x->limit = left < panel.size ? static_cast<int>(left) : panel.size;
  bool begun = false;
  for (int r = 0; r < x->count; ++r) {
    x->sum[r] = HUGE_VALF;
    x->shift[r] = m.shift[x->first + r];
    begun |= x->shift[r] > kNegInf || m.total[x->first + r] != 0.0f;
  }
  if (transform || !kLazyShift || !weigh_by_shift(x)) weigh_by_max(x, transform);
  alignas(64) float alpha[kRowStride] = {};
  for (int r = 0; r < x->count; ++r) alpha[r] = m.shift[x->first + r] - (x->shift[r] == kNegInf ? 0.0f : x->shift[r]);
  for (int r = 0; r < kRowStride; r += W) store(alpha + r, exp2_lanes(load(alpha + r)));
  for (int r = 0; r < x->count; ++r) {
    m.shift[x->first + r] = x->shift[r];
    m.total[x->first + r] = m.total[x->first + r] * alpha[r] + x->sum[r];
  }
  const int64_t stride = whole_columns(p.value_dim);
  if (panel.finite) {
    with_rows<kRows>(x->count, ValuesCall{m.scores, m.values, panel.size, p.value_dim, x->runs, x->run_count, x->limit,
                                          begun ? alpha : nullptr, x->sums, stride});
    return;
  }
  for (int64_t i = 0; i < x->count * stride && !begun; ++i) x->sums[i] = 0.0f;
  for (int c = 0; c < p.value_dim; c += kColumns) {
    careful_value_tile(x->count, m.scores, m.values + int64_t{c} * panel.size, x->runs, x->run_count, alpha, x->sums + c,
                      stride);
  }
}
