// The passes of router_loss.h.

// ds/dl of a score s at l, for scores that look at one logit. Written so that neither end cancels or divides by 0.
HEDDLE_INLINE vf score_slope(vf l, vf s, RouterScore score) {
  if (score == RouterScore::kSigmoid) return mul(s, sigmoid(neg(l)));
  const vm positive = gt(s, set1(0.0f));
  const vf safe = select(positive, s, set1(1.0f));
  return select(positive, div(sigmoid(l), add(safe, safe)), set1(0.0f));
}

HEDDLE_INLINE void scale_row(float* p, int32_t experts, float factor) {
  for (int32_t i = 0; i < experts; i += W) store(p + i, mul(load(p + i), set1(factor)));
}

// Sum of a padded row, blocked as in exp_row; lanes beyond the experts must be 0.
HEDDLE_INLINE float sum_row(const float* p, int32_t experts) {
  constexpr int32_t kBlock = 32 * W;
  vf total = set1(0.0f);
  for (int32_t begin = 0; begin < experts; begin += kBlock) {
    const int32_t end = begin + kBlock < experts ? begin + kBlock : experts;
    vf sum = set1(0.0f);
    for (int32_t i = begin; i < end; i += W) sum = add(sum, load(p + i));
    total = add(total, sum);
  }
  return reduce_add(total);
}

// Logits and scores of one row, padded with scores of 0; returns the divisor that `normalize` applied (1: none).
HEDDLE_INLINE float loss_scores(const RouterLossArgs& a, int64_t row, float* l, float* p) {
  if (a.score == kScoreGiven) {
    for (int32_t i = 0; i < a.experts; i += W) {
      vf v = load_typed(a.logits, a.type, row * a.experts + i, a.experts - i);
      v = select(not_nan(v), v, set1(0.0f));
      if (a.experts - i < W) v = select(first_n(a.experts - i), v, set1(0.0f));
      store(p + i, v);
    }
  } else {
    const float m = read_row(a.logits, a.type, row, a.experts, nullptr, l);
    score_row(l, m, a.experts, static_cast<RouterScore>(a.score), p);
  }
  if (!a.normalize || a.score == static_cast<int32_t>(RouterScore::kSoftmax)) return 1.0f;
  const float sum = sum_row(p, a.experts);
  scale_row(p, a.experts, sum == 0.0f ? 0.0f : 1.0f / sum);
  return sum;
}

HEDDLE_INLINE void z_row(const RouterLossPass& p, int64_t row, double* total) {
  alignas(64) float l[kMaxExperts + W];
  alignas(64) float e[kMaxExperts + W];
  const RouterLossArgs& a = p.args;
  const float m = read_row(a.logits, a.type, row, a.experts, nullptr, l);
  const float sum = exp_row(l, m, a.experts, e);
  const double lse = static_cast<double>(m) + ::log(static_cast<double>(sum));
  *total += lse * lse;
  if (!a.gradient) return;
  const vf factor = set1(static_cast<float>(p.z_factor * lse / static_cast<double>(sum)));
  float* g = a.gradient + row * a.experts;
  for (int32_t i = 0; i < a.experts; i += W) {
    const vf v = mul(load(e + i), factor);
    if (a.experts - i >= W) store(g + i, v);
    else store_n(g + i, v, a.experts - i);
  }
}

HEDDLE_INLINE void importance_row(const RouterLossArgs& a, int64_t row, double* HEDDLE_RESTRICT column) {
  alignas(64) float l[kMaxExperts + W];
  alignas(64) float p[kMaxExperts + W];
  loss_scores(a, row, l, p);
  for (int32_t e = 0; e < a.experts; ++e) column[e] += static_cast<double>(p[e]);
}

HEDDLE_INLINE void loss_backward_row(const RouterLossPass& pass, int64_t row) {
  alignas(64) float l[kMaxExperts + W];
  alignas(64) float p[kMaxExperts + W];
  const RouterLossArgs& a = pass.args;
  const float divisor = loss_scores(a, row, l, p);
  const bool softmax = a.score == static_cast<int32_t>(RouterScore::kSoftmax);
  float dot = 0.0f, factor = 1.0f;
  if (softmax || a.normalize) {
    dot = dot_blocked(p, pass.by_score, round_up(a.experts, W));
    if (!softmax) factor = divisor == 0.0f ? 0.0f : 1.0f / divisor;
  }
  float* g = a.gradient + row * a.experts;
  for (int32_t i = 0; i < a.experts; i += W) {
    const int n = a.experts - i;
    vf v = sub(load(pass.by_score + i), set1(dot));
    if (softmax) {
      v = mul(v, load(p + i));
    } else {
      v = mul(v, set1(factor));
      if (a.score != kScoreGiven) {
        const auto score = static_cast<RouterScore>(a.score);
        const vf x = load(l + i);
        v = mul(v, score_slope(x, apply_score(x, score), score));
      }
    }
    if (n >= W) store(g + i, v);
    else store_n(g + i, v, n);
  }
}

Status router_loss_pass(const RouterLossPass& p, const Exec& exec) {
  const RouterLossArgs& a = p.args;
  const int64_t blocks = (a.tokens + kLossRows - 1) / kLossRows;
  const bool z = a.kind == LossKind::kZ;
  const bool done = parallel_for(exec, blocks, 1, [&](int64_t begin, int64_t end) {
    for (int64_t b = begin; b < end; ++b) {
      const int64_t last = (b + 1) * kLossRows < a.tokens ? (b + 1) * kLossRows : a.tokens;
      double* partial = p.backward ? nullptr : p.partial + (z ? b : b * a.experts);
      for (int32_t e = 0; partial && e < (z ? 1 : a.experts); ++e) partial[e] = 0.0;
      for (int64_t row = b * kLossRows; row < last; ++row) {
        if (a.mask && !a.mask[row]) {
          float* g = a.gradient ? a.gradient + row * a.experts : nullptr;
          for (int32_t e = 0; g && e < a.experts; ++e) g[e] = 0.0f;
        } else if (p.backward) {
          loss_backward_row(p, row);
        } else if (z) {
          z_row(p, row, partial);
        } else {
          importance_row(a, row, partial);
        }
      }
    }
  });
  return done ? kOk : kCancelled;
}
