// Parts of int8 and int4 caches on the integer kernels of DotKernels: q as three signed bytes, p as three unsigned ones.

constexpr float kSplitRange = 8323072.0f;   // 127 * 2^16: the largest number whose three signed bytes are balanced
constexpr float kWeightRange = 16776960.0f;  // below 2^24 also after a rounding

// Splits q of each row. Rows whose q is not finite, or all but vanishes, are marked odd and get their scores from the
// widening kernel.
static void split_queries(const DotKernels& dot, const PartQuery& q, int dim, int rows, int bias) {
  const int dims = static_cast<int>(part_dims(dim));
  *q.odd = 0;
  for (int r = 0; r < (rows + kMicroRows - 1) / kMicroRows * kMicroRows; ++r) {
    alignas(64) float x[512 + 16] = {};
    alignas(64) int8_t piece[3][512 + 16];
    const float* from = q.values + r / kMicroRows * kMicroRows * dims + r % kMicroRows;
    float top = 0.0f;
    bool finite = true;
    for (int d = 0; d < dims && r < rows; ++d) {
      x[d] = from[d * kMicroRows];
      const float y = x[d] < 0.0f ? -x[d] : x[d];
      finite &= x[d] - x[d] == 0.0f;
      top = y > top ? y : top;
    }
    const bool usable = finite && top >= 1e-25f;
    if (r < rows && !usable && !(finite && top == 0.0f)) *q.odd |= 1u << r;
    if (!usable) {
      for (int d = 0; d < dims; ++d) x[d] = 0.0f;
    }
    dot.split(x, usable ? kSplitRange / top : 0.0f, (dims + 15) / 16 * 16, piece[0], piece[1], piece[2]);
    q.scale[r] = usable ? top / kSplitRange : 0.0f;
    int32_t* words = q.words + r / kMicroRows * (dims / 4) * kMicroRows * 3 + r % kMicroRows * 3;
    for (int i = 0; i < 3; ++i) {
      int32_t sum = 0;
      for (int d = 0; d < dims; ++d) sum += piece[i][d];
      for (int w = 0; w < dims / 4; ++w) memcpy(words + w * kMicroRows * 3 + i, piece[i] + w * 4, 4);
      q.start[r * 3 + i] = -bias * sum;
    }
  }
}

template <CacheType T>
static void dot_scores(const DotKernels& dot, const PartQuery& x, const PartScratch& m, int64_t chunks, int dim, int rows) {
  constexpr bool four = T == CacheType::kInt4;
  constexpr int G = cache_group(T);
  const int dims = static_cast<int>(part_dims(dim));
  const uint32_t odd = *x.odd;
  for (int64_t i = 0; i < chunks; ++i) {
    const int64_t ahead = bytes_ahead(m, chunks, i, false, rows);
    for (int r = 0; r < rows; r += kMicroRows) {
      const DotQuery q{x.words + r / kMicroRows * (dims / 4) * kMicroRows * 3, x.start + r * 3, x.scale + r};
      dot.scores(four, m.chunks[i], q, dim, rows - r < kMicroRows ? rows - r : kMicroRows, m.scores + r * kPartStride, ahead);
    }
  }
  for (int r = 0; odd >> r; ++r) {
    if (!(odd >> r & 1)) continue;
    const float* q = x.values + r / kMicroRows * kMicroRows * dims + r % kMicroRows;
    for (int64_t i = 0; i < chunks; ++i) {
      score_chunk<T, 1>(m.chunks[i], q, (dim + G - 1) / G, m.scores + r * kPartStride, 0);
    }
  }
}

// p times the scales of its values, in place, over a chunk; top and check find the largest and whether all are finite.
HEDDLE_INLINE void scale_weights(const PartChunk& c, float* row, vf* top, vf* check) {
  const vf zero = set1(0.0f);
  const float* scales = c.value_scales;
  auto step = [&](int s, vf x) {
    const vf y = select(eq(x, zero), x, mul(x, load(scales + s)));
    *top = max(y, *top);
    *check = fma(y, zero, *check);
    return y;
  };
  row += c.at;
  int s = c.begin;
  if (s % W == 0) {
    for (; s + W <= c.end; s += W) store(row + s, step(s, load(row + s)));
  }
  for (s = s / W * W; s < c.end; s += W) {
    const int before = c.begin - s, inside = c.end - s;
    const vf x = load(row + s);
    const vm own = mask_and(first_n(inside < W ? inside : W), mask_not(first_n(before < 0 ? 0 : before)));
    store(row + s, select(own, step(s, select(own, x, zero)), x));
  }
}

// The digits of a chunk whose words are shared with slots of another page or part, zero where they are not its own.
template <int G>
HEDDLE_INLINE PartChunk own_digits(PartChunk c, const uint8_t* digits, int rows, uint8_t* own) {
  const int base = c.begin / G * G;
  for (int r = 0; r < rows; ++r) {
    uint8_t* to = own + r * kDigitStride;
    memset(to, 0, (kChunk + 8) * 4);
    for (int s = c.begin; s < c.end; ++s) {
      const uint8_t* from = digits + r * kDigitStride + (c.at + s) / 4 * 16 + (c.at + s) % 4;
      for (int i = 0; i < 3; ++i) to[(s - base) / 4 * 16 + i * 4 + (s - base) % 4] = from[i * 4];
    }
  }
  c.at = -base;
  c.begin = base;
  return c;
}

template <CacheType T>
static void dot_values(const DotKernels& dot, const PartScratch& m, int64_t chunks, int columns, int rows, int begin, int end) {
  constexpr bool four = T == CacheType::kInt4;
  constexpr int G = cache_group(T);
  const int64_t stride = (columns + 15) / 16 * 16;
  const vf zero = set1(0.0f);
  for (int64_t i = 0; i < chunks; ++i) m.chunks[i].ahead = bytes_ahead(m, chunks, i, true, rows);
  for (int first = 0; first < rows; first += kMicroRows) {
    const int n = rows - first < kMicroRows ? rows - first : kMicroRows;
    float factor[kMicroRows];
    int32_t sum[kMicroRows][3];
    for (int r = 0; r < n; ++r) {
      float* row = m.scores + (first + r) * kPartStride;
      vf top = zero, check = zero;
      for (int64_t i = 0; i < chunks; ++i) scale_weights(m.chunks[i], row, &top, &check);
      const float largest = reduce_max(top);
      const bool finite = reduce_max(select(eq(check, zero), zero, set1(1.0f))) == 0.0f;
      factor[r] = finite ? largest / kWeightRange : NAN;
      if (!(factor[r] > 1e-30f)) {  // nothing to add up, or not a number
        for (int j = begin; j < end; ++j) row[j] = 0.0f;
      }
      const float inverse = factor[r] > 1e-30f ? 1.0f / factor[r] : 0.0f;
      dot.digits(row + begin, inverse, end - begin, m.digits + r * kDigitStride + begin * 4, sum[r]);
    }
    for (int64_t i = 0; i < n * 3 * stride; ++i) m.products[i] = 0;
    auto whole = [](const PartChunk& c) { return (c.begin | c.end | c.at) % G == 0; };
    for (int64_t i = 0; i < chunks;) {
      int64_t stop = i;
      while (stop < chunks && stop - i < kDotChunks && whole(m.chunks[stop])) ++stop;
      if (stop > i) {
        dot.values(four, m.chunks + i, static_cast<int>(stop - i), m.digits, columns, static_cast<int>(stride), n, m.products);
        i = stop;
        continue;
      }
      alignas(64) uint8_t own[kMicroRows * kDigitStride];
      const PartChunk c = own_digits<G>(m.chunks[i++], m.digits, n, own);
      dot.values(four, &c, 1, own, columns, static_cast<int>(stride), n, m.products);
    }
    for (int r = 0; r < n; ++r) {
      const int bias = four ? 8 : 0;
      const int32_t* x = m.products + r * 3 * stride;
      auto digit = [&](int i, int64_t c) { return to_float(subi(loadi(x + i * stride + c), set1i(bias * sum[r][i]))); };
      for (int64_t c = 0; c < stride; c += W) {
        const vf low = fma(digit(1, c), set1(256.0f), digit(2, c));
        store(m.sums + (first + r) * stride + c, mul(fma(digit(0, c), set1(65536.0f), low), set1(factor[r])));
      }
    }
  }
}
