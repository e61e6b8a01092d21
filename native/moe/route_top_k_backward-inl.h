// See route_top_k_backward.h.

// What one row needs. Kept to 80 KiB: the smallest default stack of a thread is 128 KiB (musl).
struct BackwardRow {
  alignas(64) float l[kMaxExperts + W];
  alignas(64) float p[kMaxExperts + W];
  float x[kMaxExperts];          // by slot: the score is x / total, in double
  float ds[kMaxExperts];         // by slot: gradient by that score
  float by_expert[kMaxExperts];  // ds summed over the slots of an expert; valid where it is selected
  double total = 1.0;

  double s(int32_t j) const { return static_cast<double>(x[j]) / total; }
};

// ds of every slot from g and s. Returns false when the weights are constant zero.
HEDDLE_INLINE bool score_gradients(const RouterOptions& o, const float* g, const int32_t* ids, int32_t k, BackwardRow& r) {
  double divisor = 1.0, shift = 0.0;
  if (o.normalize) {
    double sum = 0.0, weighted = 0.0;
    for (int32_t j = 0; j < k; ++j) {
      if (ids[j] < 0) continue;
      sum += r.s(j);
      weighted += static_cast<double>(g[j]) * r.s(j);
    }
    const double with_epsilon = sum + static_cast<double>(o.epsilon);
    const bool floored = with_epsilon < static_cast<double>(o.floor);
    divisor = floored ? static_cast<double>(o.floor) : with_epsilon;
    if (!(divisor > 0.0)) return false;
    shift = floored ? 0.0 : weighted / divisor;
  }
  const double factor = static_cast<double>(o.scale) / divisor;
  for (int32_t j = 0; j < k; ++j) {
    r.ds[j] = ids[j] < 0 ? 0.0f : static_cast<float>(factor * (static_cast<double>(g[j]) - shift));
  }
  return true;
}

HEDDLE_INLINE void sum_by_expert(const int32_t* ids, int32_t k, BackwardRow& r) {
  for (int32_t j = 0; j < k; ++j) {
    if (ids[j] >= 0) r.by_expert[ids[j]] = 0.0f;
  }
  for (int32_t j = 0; j < k; ++j) {
    if (ids[j] >= 0) r.by_expert[ids[j]] += r.ds[j];
  }
}

HEDDLE_INLINE void backward_selected(const RouterOptions& o, const float* g, const int32_t* ids, int32_t k, BackwardRow& r,
                                     float* out) {
  float top = kNegInf;
  for (int32_t j = 0; j < k; ++j) {
    if (ids[j] >= 0 && r.l[ids[j]] > top) top = r.l[ids[j]];
  }
  if (top == kNegInf) return;
  const int32_t padded = round_up(k, W);
  for (int32_t j = 0; j < padded; ++j) r.p[j] = j < k && ids[j] >= 0 ? r.l[ids[j]] : kNegInf;
  for (int32_t j = 0; j < padded; j += W) store(r.p + j, exp(sub(load(r.p + j), set1(top))));
  double sum = 0.0, weighted = 0.0;
  for (int32_t j = 0; j < k; ++j) {
    if (ids[j] < 0) continue;
    sum += static_cast<double>(r.p[j]);
    weighted += static_cast<double>(r.p[j]) * static_cast<double>(g[j]);
  }
  for (int32_t j = 0; j < k; ++j) {
    r.ds[j] = 0.0f;
    if (ids[j] < 0) continue;
    const double p = static_cast<double>(r.p[j]) / sum;
    r.ds[j] = static_cast<float>(static_cast<double>(o.scale) * p * (static_cast<double>(g[j]) - weighted / sum));
  }
  sum_by_expert(ids, k, r);
  for (int32_t j = 0; j < k; ++j) {
    if (ids[j] >= 0) out[ids[j]] = r.by_expert[ids[j]];
  }
}

HEDDLE_INLINE void backward_softmax(const RouteBackwardArgs& a, float m, const float* g, const int32_t* ids, BackwardRow& r,
                                    float* out) {
  exp_row(r.l, m, a.experts, r.p);
  for (int32_t j = 0; j < a.k; ++j) r.x[j] = ids[j] < 0 ? 0.0f : r.p[ids[j]];
  double total = 0.0;
  for (int32_t j = 0; j < a.k; ++j) {  // each selected expert once: its term is then 0
    if (ids[j] < 0) continue;
    total += static_cast<double>(r.p[ids[j]]);
    r.p[ids[j]] = 0.0f;
  }
  total += static_cast<double>(sum_row(r.p, a.experts));
  r.total = total;
  if (!score_gradients(a.router, g, ids, a.k, r)) return;
  double dot = 0.0;
  for (int32_t j = 0; j < a.k; ++j) dot += static_cast<double>(r.ds[j]) * r.s(j);
  sum_by_expert(ids, a.k, r);
  const vf factor = set1(static_cast<float>(0.0 - dot / total));
  for (int32_t i = 0; i < a.experts; i += W) {
    const vf v = mul(load(r.p + i), factor);
    if (a.experts - i >= W) store(out + i, v);
    else store_n(out + i, v, a.experts - i);
  }
  for (int32_t j = 0; j < a.k; ++j) {
    if (ids[j] >= 0) out[ids[j]] = static_cast<float>(r.s(j) * (static_cast<double>(r.by_expert[ids[j]]) - dot));
  }
}

HEDDLE_INLINE void backward_single(const RouteBackwardArgs& a, const float* g, const int32_t* ids, BackwardRow& r, float* out) {
  const RouterScore score = a.router.score;
  for (int32_t i = 0; i < a.experts; i += W) store(r.p + i, apply_score(load(r.l + i), score));
  for (int32_t j = 0; j < a.k; ++j) r.x[j] = ids[j] < 0 ? 0.0f : r.p[ids[j]];
  if (!score_gradients(a.router, g, ids, a.k, r)) return;
  sum_by_expert(ids, a.k, r);
  for (int32_t i = 0; i < a.experts; i += W) store(r.p + i, score_slope(load(r.l + i), load(r.p + i), score));
  for (int32_t j = 0; j < a.k; ++j) {
    if (ids[j] >= 0) out[ids[j]] = r.by_expert[ids[j]] * r.p[ids[j]];
  }
}

HEDDLE_INLINE void backward_row(const RouteBackwardArgs& a, int64_t row) {
  BackwardRow r;
  const uint8_t* mask = a.mask ? a.mask + row * a.mask_stride : nullptr;
  const float m = read_row(a.logits, a.type, row, a.experts, mask, r.l);
  const float* g = a.grad_weights + row * a.k;
  const int32_t* ids = a.indices + row * a.k;
  float* out = a.grad_logits + row * a.experts;
  for (int32_t e = 0; e < a.experts; ++e) out[e] = 0.0f;
  if (a.router.score != RouterScore::kSoftmax) return backward_single(a, g, ids, r, out);
  if (needs_full_softmax(a.router)) return backward_softmax(a, m, g, ids, r, out);
  backward_selected(a.router, g, ids, a.k, r, out);
}

Status route_top_k_backward(const RouteBackwardArgs& a, const Exec& exec) {
  for (int64_t i = 0; i < a.tokens * a.k; ++i) {
    if (a.indices[i] < -1 || a.indices[i] >= a.experts) return bad_value(i);
  }
  const int64_t grain = 1 + 16384 / (a.experts + 8 * a.k);
  const bool done = parallel_for(exec, a.tokens, grain, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) backward_row(a, row);
  });
  return done ? kOk : kCancelled;
}
