// The rows of one part over its chunks: scratch, what is fetched ahead, both products.

struct PartScratch {
  float *scores, *weights, *sums;
  int32_t* products;  // of the integer kernels
  uint8_t* digits;
  PartChunk* chunks;  // of the part; behind them the first `following` of the next one
  int64_t following = 0;
  int64_t lead = 0;         // chunks between what is computed on and what is fetched
  int64_t chunk_bytes = 1;  // of values
  int64_t bytes;
};

HEDDLE_INLINE PartScratch part_scratch(int value_dim, int64_t chunks, bool dot, char* base) {
  PartScratch m;
  int64_t at = 0;
  auto take = [&](int64_t n) {
    char* x = base + at;
    at += (n + 63) / 64 * 64;
    return x;
  };
  const int64_t columns = (value_dim + 15) / 16 * 16;
  m.scores = reinterpret_cast<float*>(take(int64_t{kPartRows} * kPartStride * 4)) + kScoreSlack;
  m.weights = reinterpret_cast<float*>(take(kMicroRows * kChunk * 4));
  m.sums = reinterpret_cast<float*>(take(kPartRows * columns * 4));
  m.products = reinterpret_cast<int32_t*>(take(dot ? kMicroRows * 3 * columns * 4 : 0));
  m.digits = reinterpret_cast<uint8_t*>(take(dot ? kMicroRows * kDigitStride : 0));
  m.chunks = reinterpret_cast<PartChunk*>(take(chunks * static_cast<int64_t>(sizeof(PartChunk))));
  m.bytes = at;
  return m;
}

// Rows of q as floats [row / 4][dim][row % 4]; at(r) is the index of row r's first element.
template <class At>
HEDDLE_INLINE void pack_queries(const void* q, DType type, int dim, int rows, const PartQuery& out, const At& at) {
  const int dims = static_cast<int>(part_dims(dim));
  for (int r = 0; r < rows; ++r) {
    float* to = out.values + r / kMicroRows * kMicroRows * dims + r % kMicroRows;
    const int64_t from = at(r);
    for (int d = 0; d < dim; ++d) to[d * kMicroRows] = read_float(q, type, from + d);
    for (int d = dim; d < dims; ++d) to[d * kMicroRows] = 0.0f;
  }
}

// A part reads the keys of its `count` chunks, then their values; behind those come the keys of the next part.
HEDDLE_INLINE const char* stream_at(const PartScratch& m, int64_t count, int64_t i) {
  if (i < count) return m.chunks[i].first_key;
  if (i < 2 * count) return m.chunks[i - count].first_value;
  return i < 2 * count + m.following ? m.chunks[i - count].first_key : nullptr;
}

// Rows whose softmax fetches values, and the chunks that they fetch together: 8 KiB each.
constexpr int kFetchingRows = 4;
HEDDLE_INLINE int64_t softmax_chunks(const PartScratch& m, int rows) {
  return (rows < kFetchingRows ? rows : kFetchingRows) * int64_t{8192} / m.chunk_bytes;
}

// What the passes of the softmax of row r fetch: values behind those that the last keys fetch.
HEDDLE_INLINE void softmax_ahead(const PartScratch& m, int64_t count, int r, const char** ahead) {
  for (int i = 0; i < 2; ++i) {
    const int64_t at = (r * 2 + i) * int64_t{4096}, chunk = m.lead + at / m.chunk_bytes;
    const bool some = r < kFetchingRows && chunk < count;
    ahead[i] = some ? m.chunks[chunk].first_value + at % m.chunk_bytes : reinterpret_cast<const char*>(m.scores);
  }
}

// Bytes from the keys (or values) of chunk i to what is fetched while they are computed on.
HEDDLE_INLINE int64_t bytes_ahead(const PartScratch& m, int64_t count, int64_t i, bool values, int rows) {
  const char* here = values ? m.chunks[i].first_value : m.chunks[i].first_key;
  const char* next = stream_at(m, count, (values ? count + i + softmax_chunks(m, rows) : i) + m.lead);
  return next ? next - here : 0;
}

// Chunks that lie in memory as the kernels want them. A source whose chunks do not (stream_attention-inl.h) packs one
// at a time.
struct ReadyChunks {
  const PartScratch& m;
  int64_t count;
  int rows;
  const PartChunk& keys(int64_t i) const { return m.chunks[i]; }
  const PartChunk& values(int64_t i) const { return m.chunks[i]; }
  int64_t ahead(int64_t i, bool values) const { return bytes_ahead(m, count, i, values, rows); }
};

template <CacheType T, class Source>
static void part_scores(const PartQuery& q, const PartScratch& m, const Source& source, int dim, int rows) {
  constexpr int G = cache_group(T);
  const int words = (dim + G - 1) / G, dims = static_cast<int>(part_dims(dim));
  for (int64_t i = 0; i < source.count; ++i) {
    const PartChunk& c = source.keys(i);
    const int64_t ahead = source.ahead(i, false);
    for (int r = 0; r < rows; r += kMicroRows) {
      const int n = rows - r < kMicroRows ? rows - r : kMicroRows;
      with_micro_rows<kMicroRows>(n, ScoreChunkCall<T>{c, q.values + r * dims, words, m.scores + r * kPartStride, ahead});
    }
  }
}

template <CacheType T, class Source>
static void part_values(const PartScratch& m, const Source& source, int columns, int rows) {
  const int64_t stride = (columns + 15) / 16 * 16;
  for (int64_t i = 0; i < rows * stride; ++i) m.sums[i] = 0.0f;
  for (int64_t i = 0; i < source.count; ++i) {
    const PartChunk& c = source.values(i);
    const int64_t ahead = source.ahead(i, true);
    for (int r = 0; r < rows; r += kMicroRows) {
      const int n = rows - r < kMicroRows ? rows - r : kMicroRows;
      for (int j = 0; j < n; ++j) chunk_weights(c, m.scores + (r + j) * kPartStride, m.weights + j * kChunk);
      with_micro_rows<kMicroRows>(
          n, ValueChunkCall<T>{c, m.weights, columns, m.sums + r * stride, stride, ahead});
    }
  }
  if constexpr (cache_is_integer(T)) return;  // elements are finite; a scale that is not belongs to the result
  for (int r = 0; r < rows; ++r) {
    float* sums = m.sums + r * stride;
    if (all_finite(sums, columns)) continue;
    // Keys of weight 0 must not bring in a value that is not finite: the same sums without them.
    for (int64_t c = 0; c < stride; ++c) sums[c] = 0.0f;
    for (int64_t i = 0; i < source.count; ++i) {
      const PartChunk& c = source.values(i);
      chunk_weights(c, m.scores + r * kPartStride, m.weights);
      value_chunk<T, 1, true>(c, m.weights, columns, sums, stride, 0);
    }
  }
}
