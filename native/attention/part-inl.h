// Products of a few rows with one chunk of words (decode_attention.h has the layout), and the softmax of a part.

constexpr bool kFewRegisters = W == 8 || W == 1;

template <CacheType T>
HEDDLE_INLINE vi load_words(const char* p) {
  vi w;
  if constexpr (T == CacheType::kFloat16) {
    w = as_int(load_f16(reinterpret_cast<const uint16_t*>(p)));
  } else {
    w = loadi(reinterpret_cast<const int32_t*>(p));
  }
  // Nibbles hold x + 8: with the top bit turned they are two's complement.
  if constexpr (T == CacheType::kInt4) w = xori(w, set1i(static_cast<int32_t>(0x88888888u)));
  return w;
}

// The first n words, n < W.
template <CacheType T>
HEDDLE_INLINE vi load_words_n(const char* p, int n) {
  vi w;
  if constexpr (T == CacheType::kFloat16) {
    w = as_int(load_f16_n(reinterpret_cast<const uint16_t*>(p), n));
  } else {
    w = as_int(load_n(reinterpret_cast<const float*>(p), n, 0.0f));
  }
  if constexpr (T == CacheType::kInt4) w = xori(w, set1i(static_cast<int32_t>(0x88888888u)));
  return w;
}

// Element g of each word.
template <CacheType T, int g>
HEDDLE_INLINE vf element(vi w) {
  if constexpr (T == CacheType::kBFloat16) {
    return g == 0 ? as_float(shl<16>(w)) : as_float(andi(w, set1i(static_cast<int32_t>(0xffff0000u))));
  } else if constexpr (T == CacheType::kInt8) {
    return to_float(g == 3 ? sra<24>(w) : sra<24>(shl<(24 - 8 * g) & 31>(w)));
  } else if constexpr (T == CacheType::kInt4) {
    return to_float(g == 7 ? sra<28>(w) : sra<28>(shl<(28 - 8 * (g & 3) - 4 * (g >> 2)) & 31>(w)));
  } else {
    return as_float(w);
  }
}

// a[r][b] += q[r] times element g of each word, for g on.
template <CacheType T, int R, int B, int g = 0>
HEDDLE_INLINE void score_step(const vi* w, const float* q, vf (*a)[B]) {
  if constexpr (g < cache_group(T)) {
    vf x[B];
    HEDDLE_UNROLL(8)
    for (int b = 0; b < B; ++b) x[b] = element<T, g>(w[b]);
    HEDDLE_UNROLL(8)
    for (int r = 0; r < R; ++r) {
      const vf y = set1(q[g * kMicroRows + r]);
      HEDDLE_UNROLL(8)
      for (int b = 0; b < B; ++b) a[r][b] = fma(y, x[b], a[r][b]);
    }
    score_step<T, R, B, g + 1>(w, q, a);
  }
}

// Scores of R rows with B groups of W slots from `slot` on.
template <CacheType T, int R, int B>
static void score_tile(const PartChunk& c, int slot, const float* q, int words, float* scores, int64_t ahead) {
  constexpr int kBytes = cache_word_bytes(T);
  const char* k[B];
  vf a[R][B];
  HEDDLE_UNROLL(8)
  for (int b = 0; b < B; ++b) {
    const int s = slot + b * W;
    k[b] = c.keys + (int64_t{s / kSlotBlock} * words * kSlotBlock + s % kSlotBlock) * kBytes;
    for (int r = 0; r < R; ++r) a[r][b] = set1(0.0f);
  }
  for (int i = 0; i < words; ++i) {
    vi w[B];
    HEDDLE_UNROLL(8)
    for (int b = 0; b < B; ++b) {
      if (W >= 8) HEDDLE_PREFETCH_L2(k[b] + ahead);
      w[b] = load_words<T>(k[b]);
      k[b] += kSlotBlock * kBytes;
    }
    score_step<T, R, B>(w, q, a);
    q += cache_group(T) * kMicroRows;
  }
  HEDDLE_UNROLL(8)
  for (int b = 0; b < B; ++b) {
    HEDDLE_UNROLL(8)
    for (int r = 0; r < R; ++r) {
      vf x = a[r][b];
      if constexpr (cache_is_integer(T)) x = mul(x, load(c.key_scales + slot + b * W));
      store(scores + r * kPartStride + c.at + slot + b * W, x);
    }
  }
}

// Slots beside [begin, end) get scores too: those before are overwritten or masked, those after by the next chunk.
template <CacheType T, int R>
static void score_chunk(const PartChunk& c, const float* q, int words, float* scores, int64_t ahead) {
  constexpr int B = R > 2 && kFewRegisters ? 2 : 4;
  int slot = c.begin / kSlotBlock * kSlotBlock;
  for (; slot + B * W <= c.end; slot += B * W) score_tile<T, R, B>(c, slot, q, words, scores, ahead);
  for (; slot < c.end; slot += W) score_tile<T, R, 1>(c, slot, q, words, scores, ahead);
}

template <CacheType T, int R, int C, bool Careful, int g = 0>
HEDDLE_INLINE void value_step(const vi* w, const float* p, vf (*a)[C]) {
  if constexpr (g < cache_group(T)) {
    vf y[R];
    HEDDLE_UNROLL(8)
    for (int r = 0; r < R; ++r) y[r] = set1(p[r * kChunk + g]);
    HEDDLE_UNROLL(8)
    for (int c = 0; c < C; ++c) {
      const vf x = element<T, g>(w[c]);
      HEDDLE_UNROLL(8)
      for (int r = 0; r < R; ++r) {
        const vf v = Careful ? select(eq(y[r], set1(0.0f)), y[r], x) : x;
        a[r][c] = fma(y[r], v, a[r][c]);
      }
    }
    value_step<T, R, C, Careful, g + 1>(w, p, a);
  }
}

// sums[r] += weights[r] times C vectors of columns from `column` on, slots of the chunk in order.
template <CacheType T, int R, int C, bool Careful>
static void value_tile(const PartChunk& c, const float* weights, int columns, int column, float* sums, int64_t stride,
                       int64_t ahead) {
  constexpr int kBytes = cache_word_bytes(T), G = cache_group(T);
  const int first = c.begin / G, last = (c.end + G - 1) / G, left = columns - column;
  const char* v = c.values + (int64_t{first} * columns + column) * kBytes;
  weights += first * G - c.begin / kSlotBlock * kSlotBlock;
  vf a[R][C];
  HEDDLE_UNROLL(8)
  for (int r = 0; r < R; ++r) {
    HEDDLE_UNROLL(8)
    for (int i = 0; i < C; ++i) a[r][i] = load(sums + r * stride + column + i * W);
  }
  for (int s = first; s < last; ++s) {
    vi w[C];
    HEDDLE_UNROLL(8)
    for (int i = 0; i < C; ++i) {
      if (W >= 8) HEDDLE_PREFETCH_L2(v + i * W * kBytes + ahead);
      w[i] = left >= C * W ? load_words<T>(v + i * W * kBytes) : load_words_n<T>(v + i * W * kBytes, left - i * W);
    }
    value_step<T, R, C, Careful>(w, weights, a);
    weights += G;
    v += int64_t{columns} * kBytes;
  }
  HEDDLE_UNROLL(8)
  for (int r = 0; r < R; ++r) {
    HEDDLE_UNROLL(8)
    for (int i = 0; i < C; ++i) store(sums + r * stride + column + i * W, a[r][i]);
  }
}

template <CacheType T, int R, bool Careful>
static void value_chunk(const PartChunk& c, const float* weights, int columns, float* sums, int64_t stride, int64_t ahead) {
  constexpr int C = Careful ? 1 : kFewRegisters ? (R > 2 ? 2 : 4) : (R > 2 ? 4 : 8);
  int column = 0;
  for (; column + C * W <= columns; column += C * W) {
    value_tile<T, R, C, Careful>(c, weights, columns, column, sums, stride, ahead);
  }
  for (; column < columns; column += W) value_tile<T, R, 1, Careful>(c, weights, columns, column, sums, stride, ahead);
}

HEDDLE_INLINE int chunk_base(const PartChunk& c) { return c.begin / kSlotBlock * kSlotBlock; }

// The weights of a chunk's slots from chunk_base() on, zero for slots that are not its own. With scales they are
// multiplied in, so that values need none; a weight of zero stays zero.
HEDDLE_INLINE void chunk_weights(const PartChunk& c, const float* row, float* out) {
  const int base = chunk_base(c);
  for (int s = 0; s < kChunk; s += W) {
    const int at = base + s;
    if (at >= c.end) {
      store(out + s, set1(0.0f));
      continue;
    }
    vf x = load(row + c.at + at);
    if (at < c.begin || at + W > c.end) {
      const vm before = first_n(c.begin - at < 0 ? 0 : c.begin - at), inside = first_n(c.end - at < W ? c.end - at : W);
      x = select(mask_and(inside, mask_not(before)), x, set1(0.0f));
    }
    if (c.value_scales) x = select(eq(x, set1(0.0f)), x, mul(x, load(c.value_scales + at)));
    store(out + s, x);
  }
}

// One row of a part as its softmax sees it.
struct PartRow {
  int lo, hi;              // visible keys inside the part
  float scale, softcap;
  float slope;             // ALiBi
  int64_t diagonal;        // key of the row's own token, counted from the first key of the part
  bool transform;          // anything but the scale forms the logits
};

struct PartMax {
  float shift, total;      // the largest logit in units of ln 2; the sum of the weights
  float best;              // the first key that has the largest logit, where asked for; -1 when there is none
};

// Scores of keys [begin, end) (multiples of 32) become weights 2^(z - shift), 0 where not visible. Each lane adds the
// keys at its place in order. Meanwhile memory is kept busy: each pass fetches 4 KiB from its address of `ahead` on.
HEDDLE_INLINE PartMax part_softmax(const PartRow& row, int begin, int end, float* s, const char* const* ahead,
                                   bool want_best = false) {
  const vf none = set1(-HUGE_VALF);
  vf top = none;
  for (int j = begin; j < end; j += W) {
    if (W >= 8) HEDDLE_PREFETCH_L2(ahead[0] + j * 4);
    vf z = load(s + j);
    if (row.transform) {
      z = mul(z, set1(row.scale));
      if (row.softcap > 0.0f) z = mul(tanh_lanes(div(z, set1(row.softcap))), set1(row.softcap));
      if (row.slope != 0.0f) {
        const vf d = abs(to_float(addi(set1i(static_cast<int32_t>(j - row.diagonal)), iota())));
        z = fnma(set1(row.slope), d, z);
      }
    }
    if (j < row.lo || j + W > row.hi) {
      const int below = row.lo - j, above = row.hi - j;
      const vm seen = mask_and(first_n(above < 0 ? 0 : above < W ? above : W),
                               mask_not(first_n(below < 0 ? 0 : below < W ? below : W)));
      z = select(seen, z, none);
      store(s + j, z);
    } else if (row.transform) {
      store(s + j, z);
    }
    top = max(z, top);
  }
  const float factor = (row.transform ? 1.0f : row.scale) * kLog2e;
  PartMax r;
  const float largest = reduce_max(top);
  r.shift = largest * factor;
  r.best = -1.0f;
  if (want_best && largest > kNegInf) {
    int j = row.lo;
    while (s[j] != largest) ++j;
    r.best = static_cast<float>(j);
  }
  const vf f = set1(factor), m = set1(r.shift == kNegInf ? 0.0f : -r.shift);
  vf sum[2] = {set1(0.0f), set1(0.0f)};
  for (int j = begin; j < end; j += 2 * W) {
    if (W >= 8) HEDDLE_PREFETCH_L2(ahead[1] + j * 4);
    if (W >= 8) HEDDLE_PREFETCH_L2(ahead[1] + j * 4 + 64);
    const vf a = exp2_lanes(fma(load(s + j), f, m)), b = exp2_lanes(fma(load(s + j + W), f, m));
    store(s + j, a);
    store(s + j + W, b);
    sum[0] = add(sum[0], a);
    sum[1] = add(sum[1], b);
  }
  r.total = reduce_add(add(sum[0], sum[1]));
  return r;
}

HEDDLE_INLINE bool all_finite(const float* x, int count) {
  const vf zero = set1(0.0f);
  vf check = zero;
  int i = 0;
  for (; i + W <= count; i += W) check = fma(load(x + i), zero, check);
  if (i < count) check = fma(load_n(x + i, count - i, 0.0f), zero, check);
  return reduce_max(select(eq(check, zero), zero, set1(1.0f))) == 0.0f;
}

// Calls f.template run<R>() for R == rows.
template <int R, class F>
HEDDLE_INLINE void with_micro_rows(int rows, const F& f) {
  if constexpr (R > 1) {
    if (rows < R) return with_micro_rows<R - 1>(rows, f);
  }
  f.template run<R>();
}

template <CacheType T>
struct ScoreChunkCall {
  const PartChunk& c;
  const float* q;
  int words;
  float* scores;
  int64_t ahead;
  template <int R>
  inline void run() const { score_chunk<T, R>(c, q, words, scores, ahead); }
};

template <CacheType T>
struct ValueChunkCall {
  const PartChunk& c;
  const float* weights;
  int columns;
  float* sums;
  int64_t stride, ahead;
  template <int R>
  inline void run() const { value_chunk<T, R, false>(c, weights, columns, sums, stride, ahead); }
};
