// One row of a router: logits in, sanitised logits, scores and weights out. Shared by route_top_k, its backward,
// the losses and expert choice.

constexpr int32_t kRemoved = INT32_MIN;  // below the image of every float, -Inf included
constexpr float kNegInf = -HUGE_VALF;

HEDDLE_INLINE int32_t round_up(int32_t n, int32_t to) { return (n + to - 1) / to * to; }

HEDDLE_INLINE vf load_typed(const void* p, DType type, int64_t i, int n) {
  const bool whole = n >= W;
  if (type == DType::kFloat32) {
    const float* f = static_cast<const float*>(p) + i;
    return whole ? load(f) : load_n(f, n, kNegInf);
  }
  const uint16_t* h = static_cast<const uint16_t*>(p) + i;
  vf v;
  if (type == DType::kBFloat16) {
    v = whole ? load_bf16(h) : load_bf16_n(h, n);
  } else {
    v = whole ? load_f16(h) : load_f16_n(h, n);
  }
  return whole ? v : select(first_n(n), v, set1(kNegInf));
}

// Reads row `row` into l (padded to whole vectors with -Inf): NaN and masked become -Inf; rows without a finite
// maximum become their limit (see route_top_k.h). Returns the maximum, which is finite.
HEDDLE_INLINE float read_row(const void* logits, DType type, int64_t row, int32_t experts, const uint8_t* mask, float* l) {
  const int64_t base = row * experts;
  vf top = set1(kNegInf);
  for (int32_t i = 0; i < experts; i += W) {
    vf v = load_typed(logits, type, base + i, experts - i);
    v = select(not_nan(v), v, set1(kNegInf));
    store(l + i, v);
    top = max(top, v);
  }
  if (mask) {
    top = set1(kNegInf);
    for (int32_t i = 0; i < experts; ++i) {
      if (!mask[i]) l[i] = kNegInf;
    }
    for (int32_t i = 0; i < experts; i += W) top = max(top, load(l + i));
  }
  const float m = reduce_max(top);
  if (m > kNegInf && m < HUGE_VALF) return m;
  for (int32_t i = 0; i < experts; ++i) l[i] = l[i] == m && !(mask && !mask[i]) ? 0.0f : kNegInf;
  return 0.0f;
}

// p = exp(l - m) for the padded row; returns the sum, added in blocks so that 4,096 terms in one lane (scalar)
// keep the bound of 1e-6.
HEDDLE_INLINE float exp_row(const float* l, float m, int32_t experts, float* p) {
  constexpr int32_t kBlock = 32 * W;
  vf total = set1(0.0f);
  const vf shift = set1(m);
  for (int32_t begin = 0; begin < experts; begin += kBlock) {
    const int32_t end = begin + kBlock < experts ? begin + kBlock : experts;
    vf sum = set1(0.0f);
    for (int32_t i = begin; i < end; i += W) {
      const vf e = exp(sub(load(l + i), shift));
      store(p + i, e);
      sum = add(sum, e);
    }
    total = add(total, sum);
  }
  return reduce_add(total);
}

HEDDLE_INLINE vf apply_score(vf l, RouterScore score) {
  return score == RouterScore::kSigmoid ? sigmoid(l) : sqrt_softplus(l);
}

// s = score(l) for the whole padded row.
HEDDLE_INLINE void score_row(const float* l, float m, int32_t experts, RouterScore score, float* s) {
  if (score == RouterScore::kSoftmax) {
    const vf sum = set1(exp_row(l, m, experts, s));
    for (int32_t i = 0; i < experts; i += W) store(s + i, div(load(s + i), sum));
    return;
  }
  for (int32_t i = 0; i < experts; i += W) store(s + i, apply_score(load(l + i), score));
}

// Order-preserving integers: a < b as floats iff key(a) < key(b); -0 equals +0. The map is its own inverse.
HEDDLE_INLINE vi flip_negative(vi bits) { return xori(bits, srl<1>(sra<31>(bits))); }
HEDDLE_INLINE vi sort_key(vf x) { return flip_negative(as_int(add(x, set1(0.0f)))); }
HEDDLE_INLINE vf key_value(vi key) { return as_float(flip_negative(key)); }

// Whether the weights need the sum over all experts.
HEDDLE_INLINE bool needs_full_softmax(const RouterOptions& o) {
  return o.score == RouterScore::kSoftmax && !o.over_selected && !(o.normalize && o.epsilon == 0.0f && o.floor == 0.0f);
}

// Scores of W selected logits (missing lanes and ids of -1 hold -Inf and get 0). Softmax: exp(x - shift), divided
// by `full_sum` where the definition divides by the sum over all experts.
HEDDLE_INLINE vf selected_scores(const RouterOptions& o, vf x, vf shift, bool full, vf full_sum) {
  if (o.score != RouterScore::kSoftmax) return apply_score(x, o.score);
  const vf e = exp(sub(x, shift));
  return full ? div(e, full_sum) : e;
}

// What the scores are divided by and multiplied with: w = s / divisor * scale.
HEDDLE_INLINE float weight_divisor(const RouterOptions& o, bool full, float sum) {
  if (o.score == RouterScore::kSoftmax && !full) return sum;  // softmax over the selected, or its equal
  if (!o.normalize) return 1.0f;
  sum += o.epsilon;
  return sum < o.floor ? o.floor : sum;
}

HEDDLE_INLINE vf finish_weights(vf s, float divisor, float scale) {
  if (divisor <= 0.0f) return set1(0.0f);
  if (divisor != 1.0f) s = div(s, set1(divisor));
  return scale == 1.0f ? s : mul(s, set1(scale));
}

// Normalised scores that all underflow: for x below -87 sigmoid(x) is e^x and sqrt(softplus(x)) is e^(x/2) to the last
// bit, so their ratios are those of a softmax. Only rows without any finite logit keep weights of 0.
HEDDLE_INLINE bool scores_vanished(const RouterOptions& o, float sum) {
  return sum <= 0.0f && o.normalize && o.score != RouterScore::kSoftmax && o.epsilon == 0.0f && o.floor == 0.0f;
}
HEDDLE_INLINE vf vanished_scores(const RouterOptions& o, vf x, float top) {
  if (top == kNegInf) return set1(0.0f);
  return exp(mul(sub(x, set1(top)), set1(o.score == RouterScore::kSigmoid ? 1.0f : 0.5f)));
}

// Weights of one row whose k <= W selected logits are the lanes of x, the largest of them `shift`.
HEDDLE_INLINE vf weights_of_lanes(const RouterOptions& o, vf x, vf shift, float full_sum) {
  const bool full = needs_full_softmax(o);
  vf s = selected_scores(o, x, shift, full, set1(full_sum));
  const bool sums = o.normalize || (o.score == RouterScore::kSoftmax && !full);
  float sum = sums ? reduce_add(s) : 0.0f;
  if (scores_vanished(o, sum)) {
    s = vanished_scores(o, x, reduce_max(x));
    sum = reduce_add(s);
  }
  return finish_weights(s, weight_divisor(o, full, sum), o.scale);
}

// Weights of the k selected experts of one row. `l` as read_row left it, m its maximum, full_sum the sum of
// exponentials over all experts where needs_full_softmax. `x` is scratch of k rounded up to W.
HEDDLE_INLINE void selected_weights(const RouterOptions& o, const float* l, float m, float full_sum, const int32_t* ids,
                                    int32_t k, float* x, float* w) {
  const int32_t padded = round_up(k, W);
  for (int32_t j = 0; j < k; ++j) x[j] = ids[j] < 0 ? kNegInf : l[ids[j]];
  for (int32_t j = k; j < padded; ++j) x[j] = kNegInf;
  const bool full = needs_full_softmax(o);
  float top = m;
  if (o.score == RouterScore::kSoftmax && !full) {
    vf t = set1(kNegInf);
    for (int32_t j = 0; j < padded; j += W) t = max(t, load(x + j));
    top = reduce_max(t);
    if (top == kNegInf) {  // only -Inf selected: uniform over the valid ones
      for (int32_t j = 0; j < k; ++j) x[j] = ids[j] < 0 ? kNegInf : 0.0f;
      top = 0.0f;
    }
  }
  if (padded == W) {
    store_n(w, weights_of_lanes(o, load(x), set1(top), full_sum), k);
    return;
  }
  vf sum = set1(0.0f), largest = set1(kNegInf);
  for (int32_t j = 0; j < padded; j += W) {
    const vf v = load(x + j);
    const vf s = selected_scores(o, v, set1(top), full, set1(full_sum));
    largest = max(largest, v);
    store(x + j, s);
    sum = add(sum, s);
  }
  float total = reduce_add(sum);
  if (scores_vanished(o, total)) {
    sum = set1(0.0f);
    for (int32_t j = 0; j < k; ++j) x[j] = ids[j] < 0 ? kNegInf : l[ids[j]];
    for (int32_t j = k; j < padded; ++j) x[j] = kNegInf;
    for (int32_t j = 0; j < padded; j += W) {
      const vf s = vanished_scores(o, load(x + j), reduce_max(largest));
      store(x + j, s);
      sum = add(sum, s);
    }
    total = reduce_add(sum);
  }
  const float divisor = weight_divisor(o, full, total);
  for (int32_t j = 0; j < k; j += W) {
    const vf v = finish_weights(load(x + j), divisor, o.scale);
    if (k - j >= W) store(w + j, v); else store_n(w + j, v, k - j);
  }
}
