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

// Keys that top_k_registers takes: two 64-bit words of mask, and vectors the register file can hold or spill.
constexpr int kRegisterVectors = W == 16 ? 8 : W == 8 ? 16 : 8;
constexpr int kRegisterKeys = kRegisterVectors * W;

// One bit per key equal to m, which are removed.
template <int N>
HEDDLE_INLINE void remove_equal(vi* v, vi m, uint64_t* hits) {
  hits[0] = hits[1] = 0;
  HEDDLE_UNROLL(16)
  for (int i = 0; i < N; ++i) {
    const vm equal = eqi(v[i], m);
    hits[i * W / 64] |= static_cast<uint64_t>(mask_bits(equal)) << (i * W % 64);
    v[i] = select(equal, set1i(kRemoved), v[i]);
  }
}

template <int N>
HEDDLE_INLINE vi spread_largest(const vi* v) {
  vi m = v[0];
  HEDDLE_UNROLL(16)
  for (int i = 1; i < N; ++i) m = maxi(m, v[i]);
  return spread_maxi(m);
}

HEDDLE_INLINE int32_t bit_count(uint32_t m) {
  m = m - ((m >> 1) & 0x55555555u);
  m = (m & 0x33333333u) + ((m >> 2) & 0x33333333u);
  return static_cast<int32_t>((((m + (m >> 4)) & 0x0f0f0f0fu) * 0x01010101u) >> 24);
}

// Top-k of N vectors of keys.
template <int N>
HEDDLE_INLINE void top_k_registers(const int32_t* keys, int32_t k, int32_t* ids) {
  vi v[N];
  HEDDLE_UNROLL(16)
  for (int i = 0; i < N; ++i) v[i] = loadi(keys + i * W);
  int32_t j = 0;
  while (j < k) {
    const vi m = spread_largest<N>(v);
    uint64_t hits[2];
    remove_equal<N>(v, m, hits);
    const bool one = ((hits[0] & (hits[0] - 1)) | (hits[1] & (hits[1] - 1))) == 0 && (hits[0] == 0 || hits[1] == 0);
    if (!one || N * W == 1) {  // ties, or nothing left but removed keys
      if (reduce_maxi(m) == kRemoved) {
        while (j < k) ids[j++] = -1;
        return;
      }
    }
    for (int word = 0; word < (N * W > 64 ? 2 : 1); ++word) {
      for (uint64_t h = hits[word]; h && j < k; h &= h - 1) ids[j++] = word * 64 + first_bit(h);
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

// Picks the register version whose size fits, or the column version.
template <int N = 1>
HEDDLE_INLINE void top_k_keys(int32_t* keys, int32_t padded, int32_t k, int32_t* ids) {
  if constexpr (N <= kRegisterVectors) {
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

// Moves the keys of the best group_keep groups (ties to the lower group) to the front, in ascending order of group,
// and fills `kept` with those groups. Returns the number of keys left, padded with removed ones.
HEDDLE_INLINE int32_t limit_groups(const RouteTopKArgs& a, const float* c, int32_t* keys, int32_t* kept) {
  const int32_t size = a.experts / a.group_count;
  float scores[kMaxExperts + W];
  for (int32_t g = 0; g < a.group_count; ++g) scores[g] = group_score(c + g * size, size, a.group_top2);
  const vf all = load_n(scores, a.group_count < W ? a.group_count : W, kNegInf);
  int32_t count = 0;
  for (int32_t g = 0; g < a.group_count; ++g) {
    int32_t better = 0;  // groups that go before this one
    if (a.group_count <= W) {
      const vf mine = set1(scores[g]);
      const uint32_t earlier = (1u << g) - 1u;
      better = bit_count(mask_bits(gt(all, mine)) | (mask_bits(eq(all, mine)) & earlier));
    } else {
      for (int32_t h = 0; h < a.group_count; ++h) better += (scores[h] > scores[g]) | ((scores[h] == scores[g]) & (h < g));
    }
    if (better >= a.group_keep) continue;
    // To the left or in place, whole vectors: what a store overruns is a group not kept or copied next.
    if (count != g) {
      if (size % W == 0) {
        for (int32_t i = 0; i < size; i += W) storei(keys + count * size + i, loadi(keys + g * size + i));
      } else {
        for (int32_t i = 0; i < size; ++i) keys[count * size + i] = keys[g * size + i];
      }
    }
    kept[count++] = g;
  }
  const int32_t left = count * size;
  for (int32_t i = left; i < round_up(left, W); ++i) keys[i] = kRemoved;
  return left;
}

// R rows without bias, groups, mask or given ids, whose experts fit the registers and k <= W: the winners' logits are
// read off the keys themselves. Returns a bit for each row that it could not do (ties, no finite maximum): those take
// the general path. Rows do not mix; two at a time hide the latency of each other's reductions.
template <int N, int R>
HEDDLE_INLINE uint32_t route_rows_registers(const RouteTopKArgs& a, int64_t row) {
  const bool full = needs_full_softmax(a.router);
  vi v[R][N], first[R], selected[R];
  uint64_t repeated[R];  // non-zero once a maximum was shared
  HEDDLE_UNROLL(2)
  for (int r = 0; r < R; ++r) {
    HEDDLE_UNROLL(16)
    for (int i = 0; i < N; ++i) {
      const vf x = load_typed(a.logits, a.type, (row + r) * a.experts + i * W, a.experts - i * W);
      v[r][i] = sort_key(select(not_nan(x), x, set1(kNegInf)));
    }
    if (N * W > a.experts) v[r][N - 1] = select(first_n(a.experts - (N - 1) * W), v[r][N - 1], set1i(kRemoved));
    selected[r] = set1i(INT32_MIN + 0x7fffff);  // the key of -Inf
    first[r] = spread_largest<N>(v[r]);
    repeated[r] = 0;
  }
  for (int32_t j = 0; j < a.k; ++j) {
    const vm here = eqi(iota(), set1i(j));
    HEDDLE_UNROLL(2)
    for (int r = 0; r < R; ++r) {
      const vi m = spread_largest<N>(v[r]);
      uint64_t hits[2];
      remove_equal<N>(v[r], m, hits);
      selected[r] = select(here, m, selected[r]);
      int32_t* id = a.indices + (row + r) * a.k + j;
      if constexpr (N * W <= 64) {
        repeated[r] |= hits[0] & (hits[0] - 1);
        *id = first_bit(hits[0]);
      } else {
        const bool low = hits[0] != 0;
        repeated[r] |= (hits[0] & (hits[0] - 1)) | (hits[1] & (hits[1] - 1)) | (low ? hits[1] : 0);
        *id = low ? first_bit(hits[0]) : 64 + first_bit(hits[1]);
      }
    }
  }
  uint32_t left = 0;
  for (int r = 0; r < R; ++r) {
    const vf shift = key_value(first[r]);
    if (repeated[r] != 0 || !mask_bits(lt(abs(shift), set1(HUGE_VALF)))) {
      left |= 1u << r;
      continue;
    }
    float full_sum = 0.0f;
    if (full) {
      vf sum = set1(0.0f);
      for (int i = 0; i < N; ++i) {
        vf x = load_typed(a.logits, a.type, (row + r) * a.experts + i * W, a.experts - i * W);
        x = select(not_nan(x), x, set1(kNegInf));
        sum = add(sum, exp(sub(x, shift)));
      }
      full_sum = reduce_add(sum);
    }
    store_n(a.weights + (row + r) * a.k, weights_of_lanes(a.router, key_value(selected[r]), shift, full_sum), a.k);
  }
  return left;
}

// c = score(l) + bias into `c` (unless null) and its keys; one tight loop per score function.
template <class Score>
HEDDLE_INLINE void choice_row(const float* l, const float* bias, int32_t experts, float* c, int32_t* keys, const Score& score) {
  const int32_t whole = experts / W * W;
  auto finish = [&](int32_t i, vf v, vf b) {
    if (bias) {
      v = add(v, b);
      v = select(not_nan(v), v, set1(kNegInf));
    }
    if (c) store(c + i, v);
    return sort_key(v);
  };
  HEDDLE_UNROLL(2)
  for (int32_t i = 0; i < whole; i += W) {
    storei(keys + i, finish(i, score(load(l + i)), bias ? load(bias + i) : set1(0.0f)));
  }
  if (whole < experts) {
    const int n = experts - whole;
    const vi key = finish(whole, score(load(l + whole)), bias ? load_n(bias + whole, n, 0.0f) : set1(0.0f));
    storei(keys + whole, select(first_n(n), key, set1i(kRemoved)));
  }
}

static void route_row(const RouteTopKArgs& a, int64_t row) {
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
    // c = score + bias, kept where groups or weights need it, and its keys.
    const float* from = l;
    if (needs_scores && !a.router.over_selected && a.router.score == RouterScore::kSoftmax) {
      score_row(l, m, a.experts, a.router.score, s);
      from = s;
    }
    const bool scored = needs_scores && !a.router.over_selected;
    const float* c = a.selection_bias || scored ? s : from;
    if (scored && a.router.score == RouterScore::kSigmoid) {
      choice_row(from, a.selection_bias, a.experts, s, keys, [](vf v) { return sigmoid(v); });
    } else if (scored && a.router.score == RouterScore::kSqrtSoftplus) {
      choice_row(from, a.selection_bias, a.experts, s, keys, [](vf v) { return sqrt_softplus(v); });
    } else {
      choice_row(from, a.selection_bias, a.experts, c == s ? s : nullptr, keys, [](vf v) { return v; });
    }
    if (mask) {
      for (int32_t i = 0; i < a.experts; ++i) {
        if (!mask[i]) keys[i] = kRemoved;
      }
    }
    if (a.group_count > 1 && a.group_keep < a.group_count) {
      if (mask) {
        float* masked = s;
        for (int32_t i = 0; i < a.experts; ++i) masked[i] = mask[i] ? c[i] : kNegInf;
        c = masked;
      }
      int32_t kept[kMaxExperts];
      const int32_t size = a.experts / a.group_count;
      const int32_t left = limit_groups(a, c, keys, kept);
      top_k_keys(keys, round_up(left, W), a.k, ids);
      for (int32_t j = 0; j < a.k; ++j) {
        if (ids[j] >= 0) ids[j] = kept[ids[j] / size] * size + ids[j] % size;
      }
    } else {
      top_k_keys(keys, padded, a.k, ids);
    }
  }
  alignas(64) float x[kMaxExperts + W];
  selected_weights(a.router, l, m, full_sum, ids, a.k, x, weights);
}

template <int N>
HEDDLE_INLINE void route_rows(const RouteTopKArgs& a, int64_t begin, int64_t end) {
  int64_t row = begin;
  if constexpr (W > 1 && N * W <= 64) {
    for (; row + 2 <= end; row += 2) {
      const uint32_t left = route_rows_registers<N, 2>(a, row);
      if (left & 1u) route_row(a, row);
      if (left & 2u) route_row(a, row + 1);
    }
  }
  for (; row < end; ++row) {
    if (route_rows_registers<N, 1>(a, row)) route_row(a, row);
  }
}

// The loop over rows for the number of vectors; false when the general path is needed.
template <int N = 1>
HEDDLE_INLINE bool route_rows_fast(const RouteTopKArgs& a, int64_t begin, int64_t end) {
  if constexpr (N <= kRegisterVectors) {
    if (round_up(a.experts, W) != N * W) return route_rows_fast<N + 1>(a, begin, end);
    route_rows<N>(a, begin, end);
    return true;
  } else {
    return false;
  }
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
    const bool plain = !a.given && !a.mask && !a.selection_bias && a.k <= W && (a.group_count <= 1 || a.group_keep == a.group_count);
    if (plain && route_rows_fast(a, begin, end)) return;
    for (int64_t row = begin; row < end; ++row) route_row(a, row);
  });
  return done ? kOk : kCancelled;
}
