// The passes of route_sinkhorn.h.

// Sum of a * b over n floats, n a multiple of W, in blocks as in exp_row.
HEDDLE_INLINE float dot_blocked(const float* a, const float* b, int32_t n) {
  constexpr int32_t kBlock = 32 * W;
  vf total = set1(0.0f);
  for (int32_t begin = 0; begin < n; begin += kBlock) {
    const int32_t end = begin + kBlock < n ? begin + kBlock : n;
    vf sum = set1(0.0f);
    for (int32_t i = begin; i < end; i += W) sum = fma(load(a + i), load(b + i), sum);
    total = add(total, sum);
  }
  return reduce_add(total);
}

HEDDLE_INLINE void sinkhorn_exp_row(const SinkhornPass& p, int64_t row) {
  alignas(64) float l[kMaxExperts + W];
  alignas(64) float c[kMaxExperts + W];
  const SinkhornArgs& a = p.args;
  const float m = read_row(a.logits, a.type, row, a.experts, nullptr, l);
  exp_row(l, m, a.experts, c);
  float* cost = p.cost + row * p.stride;
  for (int32_t e = 0; e < a.experts; ++e) cost[e] = c[e];
  for (int32_t e = a.experts; e < p.stride; ++e) cost[e] = 0.0f;
}

HEDDLE_INLINE void sinkhorn_scale_block(const SinkhornPass& p, int64_t block, int64_t end) {
  const SinkhornArgs& a = p.args;
  double* HEDDLE_RESTRICT column = p.partial + block * a.experts;
  for (int32_t e = 0; e < a.experts; ++e) column[e] = 0.0;
  for (int64_t row = block * kSinkhornRows; row < end; ++row) {
    const float* HEDDLE_RESTRICT cost = p.cost + row * p.stride;
    const double sum = dot_blocked(cost, p.right, p.stride);
    const double left = 1.0 / (static_cast<double>(a.tokens) * (sum + a.epsilon));
    for (int32_t e = 0; e < a.experts; ++e) column[e] += left * static_cast<double>(cost[e]);
  }
}

HEDDLE_INLINE void sinkhorn_select_row(const SinkhornPass& p, int64_t row) {
  alignas(64) float l[kMaxExperts + W];
  alignas(64) float x[kMaxExperts + W];
  alignas(64) int32_t keys[kMaxExperts + W];
  const SinkhornArgs& a = p.args;
  const int32_t padded = round_up(a.experts, W);
  const float m = read_row(a.logits, a.type, row, a.experts, nullptr, l);
  // l - m first: it is exact near the maximum, where the winners are.
  for (int32_t i = 0; i < padded; i += W) {
    vi key = sort_key(add(sub(load(l + i), set1(m)), load(p.log_right + i)));
    if (i + W > a.experts) key = select(first_n(a.experts - i), key, set1i(kRemoved));
    storei(keys + i, key);
  }
  int32_t* ids = a.indices + row * a.k;
  top_k_keys(keys, padded, a.k, ids);
  RouterOptions router;
  router.score = a.score;
  const float full_sum = needs_full_softmax(router) ? exp_row(l, m, a.experts, x) : 0.0f;
  selected_weights(router, l, m, full_sum, ids, a.k, x, a.weights + row * a.k);
}

Status sinkhorn_pass(const SinkhornPass& p, const Exec& exec) {
  const int64_t tokens = p.args.tokens;
  const int64_t blocks = (tokens + kSinkhornRows - 1) / kSinkhornRows;
  const bool done = parallel_for(exec, blocks, 1, [&](int64_t begin, int64_t end) {
    for (int64_t b = begin; b < end; ++b) {
      const int64_t first = b * kSinkhornRows;
      const int64_t last = first + kSinkhornRows < tokens ? first + kSinkhornRows : tokens;
      if (p.phase == SinkhornPhase::kScale) {
        sinkhorn_scale_block(p, b, last);
        continue;
      }
      for (int64_t row = first; row < last; ++row) {
        if (p.phase == SinkhornPhase::kExp) sinkhorn_exp_row(p, row);
        else sinkhorn_select_row(p, row);
      }
    }
  });
  return done ? kOk : kCancelled;
}
