// Parts of int8 and int4 caches on the integer kernels of DotKernels: q and p as three signed bytes each.

constexpr float kSplitRange = 8323072.0f;  // 127 * 2^16: the largest number whose three signed bytes are balanced

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
    const int64_t ahead = bytes_ahead(m, chunks, i, false);
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

// p times the scales of its values, in place, over a chunk; returns max, NaN when one is.
HEDDLE_INLINE void scale_weights(const PartChunk& c, float* row, vf* top, vf* check) {
  const vf zero = set1(0.0f);
  for (int s = chunk_base(c); s < c.end; s += W) {
    const int before = c.begin - s, inside = c.end - s;
    if (before >= W) continue;
    const vf x = load(row + c.at + s);
    const vm own = mask_and(first_n(inside < W ? inside : W), mask_not(first_n(before < 0 ? 0 : before)));
    const vf y = select(own, select(eq(x, zero), x, mul(x, load(c.value_scales + s))), zero);
    store(row + c.at + s, select(own, y, x));
    *top = max(y, *top);
    *check = fma(y, zero, *check);
  }
}

template <CacheType T>
static void dot_values(const DotKernels& dot, const PartScratch& m, int64_t chunks, int columns, int rows, int begin, int end) {
  constexpr bool four = T == CacheType::kInt4;
  constexpr int G = cache_group(T);
  const int64_t stride = (columns + 15) / 16 * 16;
  const vf zero = set1(0.0f);
  for (int first = 0; first < rows; first += kMicroRows) {
    const int n = rows - first < kMicroRows ? rows - first : kMicroRows;
    float factor[kMicroRows];
    int64_t sum[kMicroRows][3] = {};
    bool finite[kMicroRows];
    for (int r = 0; r < n; ++r) {
      float* row = m.scores + (first + r) * kPartStride;
      vf top = zero, check = zero;
      for (int64_t i = 0; i < chunks; ++i) scale_weights(m.chunks[i], row, &top, &check);
      const float largest = reduce_max(top);
      finite[r] = reduce_max(select(eq(check, zero), zero, set1(1.0f))) == 0.0f;
      factor[r] = largest > 0.0f && finite[r] ? largest / kSplitRange : 0.0f;
      const float inverse = factor[r] > 0.0f ? 1.0f / factor[r] : 0.0f;
      int8_t* piece = m.pieces + r * 3 * kPieceStride + kChunk;
      const bool usable = factor[r] > 1e-30f;
      if (!usable) factor[r] = 0.0f;
      for (int i = 0; i < 3; ++i) {
        memset(piece + i * kPieceStride + begin - kChunk, 0, kChunk);
        memset(piece + i * kPieceStride + end, 0, kChunk);
      }
      if (!usable) {
        for (int j = begin; j < end; ++j) row[j] = 0.0f;
      }
      dot.split(row + begin, inverse, end - begin, piece + begin, piece + kPieceStride + begin, piece + 2 * kPieceStride + begin);
      for (int i = 0; i < 3; ++i) {
        int32_t s = 0;
        for (int j = begin; j < end; ++j) s += piece[i * kPieceStride + j];
        sum[r][i] = s;
      }
    }
    for (int64_t i = 0; i < n * 3 * stride; ++i) m.products[i] = 0;
    for (int64_t i = 0; i < chunks; ++i) {
      const PartChunk& c = m.chunks[i];
      const int base = c.begin / G * G, stop = (c.end + G - 1) / G * G;
      const int64_t ahead = bytes_ahead(m, chunks, i, true);
      const int8_t* piece = m.pieces + kChunk + c.at + base;
      if (base == c.begin && stop == c.end) {
        dot.values(four, c, piece, columns, static_cast<int>(stride), n, m.products, ahead);
        continue;
      }
      // A word that is shared with slots of another page or part: their weights must not count here.
      alignas(64) int8_t own[kMicroRows * 3 * kPieceStride];
      for (int k = 0; k < n * 3; ++k) {
        int8_t* to = own + k * kPieceStride;
        memset(to, 0, kChunk + 8);
        memcpy(to + c.begin - base, piece + k * kPieceStride + c.begin - base, static_cast<size_t>(c.end - c.begin));
      }
      dot.values(four, c, own, columns, static_cast<int>(stride), n, m.products, ahead);
    }
    for (int r = 0; r < n; ++r) {
      const int bias = four ? 8 : 128;
      const int32_t* x = m.products + r * 3 * stride;
      float* to = m.sums + (first + r) * stride;
      for (int64_t c = 0; c < stride; ++c) {
        const int64_t hi = x[c] - bias * sum[r][0], mid = x[stride + c] - bias * sum[r][1];
        const int64_t whole = hi * 65536 + mid * 256 + (x[2 * stride + c] - bias * sum[r][2]);
        to[c] = finite[r] ? static_cast<float>(whole) * factor[r] : NAN;
      }
    }
  }
}
