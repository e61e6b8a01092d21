// See route_top_k.h for the definition and what the design rests on.

HEDDLE_INLINE int first_bit(uint64_t m) {
#if defined(_MSC_VER) && !defined(__clang__)
  unsigned long i;
  _BitScanForward64(&i, m);
  return static_cast<int>(i);
#else
  return __builtin_ctzll(m);
#endif
}

// Top-k of N vectors of keys held in registers (N * W <= 64, so one 64-bit word holds a mask over all keys).
template <int N>
HEDDLE_INLINE void top_k_registers(const int32_t* keys, int32_t k, int32_t* ids) {
  vi v[N];
  for (int i = 0; i < N; ++i) v[i] = loadi(keys + i * W);
  int32_t j = 0;
  while (j < k) {
    vi m = v[0];
    for (int i = 1; i < N; ++i) m = maxi(m, v[i]);
    m = spread_maxi(m);
    uint64_t hits = 0;
    for (int i = 0; i < N; ++i) {
      const vm equal = eqi(v[i], m);
      hits |= static_cast<uint64_t>(mask_bits(equal)) << (i * W);
      v[i] = select(equal, set1i(kRemoved), v[i]);
    }
    ids[j++] = first_bit(hits);
    hits &= hits - 1;
    if (hits) {  // ties, or nothing left but removed keys
      if (reduce_maxi(m) == kRemoved) {
        --j;
        while (j < k) ids[j++] = -1;
        return;
      }
      while (hits && j < k) {
        ids[j++] = first_bit(hits);
        hits &= hits - 1;
      }
    }
  }
}

// Top-k of any number of keys (a multiple of W): one maximum per lane, and its column rescanned on removal.
HEDDLE_INLINE void top_k_columns(int32_t* keys, int32_t padded, int32_t k, int32_t* ids) {
  vi best = loadi(keys), at = iota();
  for (int32_t i = W; i < padded; i += W) {
    const vi v = loadi(keys + i);
    const vm better = gti(v, best);
    best = select(better, v, best);
    at = select(better, addi(set1i(i), iota()), at);
  }
  for (int32_t j = 0; j < k; ++j) {
    const vi m = spread_maxi(best);
    const int32_t id = reduce_mini(select(eqi(best, m), at, set1i(INT32_MAX)));
    if (keys[id] == kRemoved) {
      for (; j < k; ++j) ids[j] = -1;
      return;
    }
    ids[j] = id;
    keys[id] = kRemoved;
    const int32_t lane = id % W;
    int32_t top = keys[lane], top_at = lane;
    for (int32_t i = lane + W; i < padded; i += W) {
      const bool better = keys[i] > top;
      top = better ? keys[i] : top;
      top_at = better ? i : top_at;
    }
    const vm here = eqi(iota(), set1i(lane));
    best = select(here, set1i(top), best);
    at = select(here, set1i(top_at), at);
  }
}

// Picks the register version whose size fits (8 vectors or 64 keys at most), or the column version.
template <int N = 1>
HEDDLE_INLINE void top_k_keys(int32_t* keys, int32_t padded, int32_t k, int32_t* ids) {
  if constexpr (N <= 8 && N * W <= 64) {
    if (padded == N * W) return top_k_registers<N>(keys, k, ids);
    return top_k_keys<N + 1>(keys, padded, k, ids);
  } else {
    top_k_columns(keys, padded, k, ids);
  }
}

// Sum of the two largest (or the largest) of c[0, n).
HEDDLE_INLINE float group_score(const float* c, int32_t n, bool top2) {
  vf hi = set1(kNegInf), lo = set1(kNegInf);
  for (int32_t i = 0; i < n; i += W) {
    const vf v = n - i >= W ? load(c + i) : load_n(c + i, n - i, kNegInf);
    lo = max(lo, min(hi, v));
    hi = max(hi, v);
  }
  const float first = reduce_max(hi);
  if (!top2) return first;
  const int lane = first_bit(mask_bits(eq(hi, set1(first))));
  hi = select(eqi(iota(), set1i(lane)), lo, hi);
  return first + reduce_max(hi);
}

// Removes from `keys` every expert outside the best group_keep groups (ties to the lower group).
HEDDLE_INLINE void limit_groups(const RouteTopKArgs& a, const float* c, int32_t* keys, float* scores) {
  const int32_t size = a.experts / a.group_count;
  for (int32_t g = 0; g < a.group_count; ++g) scores[g] = group_score(c + g * size, size, a.group_top2);
  for (int32_t g = 0; g < a.group_count; ++g) {
    int32_t better = 0;
    for (int32_t h = 0; h < a.group_count; ++h) better += scores[h] > scores[g] || (scores[h] == scores[g] && h < g);
    if (better < a.group_keep) continue;
    for (int32_t i = 0; i < size; ++i) keys[g * size + i] = kRemoved;
  }
}

HEDDLE_INLINE void route_row(const RouteTopKArgs& a, int64_t row) {
  alignas(64) float l[kMaxExperts + W];
  alignas(64) float s[kMaxExperts + W];
  alignas(64) int32_t keys[kMaxExperts + W];
  const int32_t padded = round_up(a.experts, W);
  const uint8_t* mask = a.mask ? a.mask + row * a.mask_stride : nullptr;
  const float m = read_row(a.logits, a.type, row, a.experts, mask, l);
  int32_t* ids = a.indices + row * a.k;
  float* weights = a.weights + row * a.k;

  const bool needs_scores = !a.given && ((a.selection_bias && !a.router.over_selected) || a.group_top2);
  float full_sum = 0.0f;
  if (needs_full_softmax(a.router)) full_sum = exp_row(l, m, a.experts, s);

  if (a.given) {
    for (int32_t j = 0; j < a.k; ++j) ids[j] = a.given[row * a.k + j];
  } else {
    const float* c = l;
    if (needs_scores) {
      if (!a.router.over_selected) score_row(l, m, a.experts, a.router.score, s);
      if (a.router.over_selected) for (int32_t i = 0; i < padded; i += W) store(s + i, load(l + i));
      c = s;
    }
    if (a.selection_bias) {
      for (int32_t i = 0; i < a.experts; i += W) {
        const int n = a.experts - i;
        const vf b = n >= W ? load(a.selection_bias + i) : load_n(a.selection_bias + i, n, 0.0f);
        const vf v = add(load(c + i), b);
        store(s + i, select(not_nan(v), v, set1(kNegInf)));
      }
      c = s;
    }
    for (int32_t i = 0; i < padded; i += W) {
      vi key = sort_key(load(c + i));
      if (i + W > a.experts) key = select(first_n(a.experts - i), key, set1i(kRemoved));
      storei(keys + i, key);
    }
    if (mask) {
      for (int32_t i = 0; i < a.experts; ++i) {
        if (!mask[i]) keys[i] = kRemoved;
      }
    }
    if (a.group_count > 1 && a.group_keep < a.group_count) {
      float scores[kMaxExperts];
      if (mask) {
        float* masked = s;
        for (int32_t i = 0; i < a.experts; ++i) masked[i] = mask[i] ? c[i] : kNegInf;
        c = masked;
      }
      limit_groups(a, c, keys, scores);
    }
    top_k_keys(keys, padded, a.k, ids);
  }
  alignas(64) float x[kMaxExperts + W];
  selected_weights(a.router, l, m, full_sum, ids, a.k, x, weights);
}

Status route_top_k(const RouteTopKArgs& a, const Exec& exec) {
  if (a.given) {
    const int64_t routes = a.tokens * a.k;
    for (int64_t i = 0; i < routes; ++i) {
      if (a.given[i] < -1 || a.given[i] >= a.experts) return bad_value(i);
    }
  }
  // About 20 microseconds a tile: long enough to pay for handing it to another thread.
  const int64_t grain = 1 + 16384 / (a.experts + 8 * a.k);
  const bool done = parallel_for(exec, a.tokens, grain, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) route_row(a, row);
  });
  return done ? kOk : kCancelled;
}
