// See stream_attention.h for the definition.

// Chunks of a block, packed when they are asked for: keys transposed to [slot / 16][dim][slot % 16], values as rows.
struct BlockChunks {
  const StreamAttentionArgs& a;
  int64_t key_head, first, count;  // first key inside the block
  int keys_in_all, at;             // of the part; place of the first key inside the part
  float *key_room, *value_room, *key_scale, *value_scale;
  PartChunk* chunk;

  int size(int64_t i) const {
    const int64_t left = keys_in_all - i * kChunk;
    return static_cast<int>(left < kChunk ? left : kChunk);
  }
  const PartChunk& place(int64_t i) const {
    chunk->begin = 0;
    chunk->end = size(i);
    chunk->at = at + static_cast<int>(i) * kChunk;
    chunk->keys = reinterpret_cast<const char*>(key_room);
    chunk->key_scales = nullptr;
    chunk->value_scales = nullptr;
    return *chunk;
  }
  const PartChunk& keys(int64_t i) const {
    const AttentionProblem& p = a.problem;
    const Vectors from{a.keys, a.block_type, 1, p.head_dim};
    const int64_t token = first + i * kChunk;
    const int n = size(i);
    for (int s = 0; s < n; s += kSlotBlock) {
      int64_t index[kSlotBlock];
      for (int j = 0; j < kSlotBlock; ++j) {
        index[j] = s + j < n ? ((token + s + j) * p.key_heads + key_head) * p.head_dim : -1;
      }
      pack_transposed(from, index, kSlotBlock, key_room + s * p.head_dim, kSlotBlock);
    }
    return place(i);
  }
  const PartChunk& values(int64_t i) const {
    const AttentionProblem& p = a.problem;
    const int64_t token = first + i * kChunk;
    const int n = size(i);
    place(i);
    if (a.block_type == DType::kFloat32 && p.key_heads == 1) {
      chunk->values = static_cast<const char*>(a.values) + token * p.value_dim * 4;
    } else {
      for (int s = 0; s < n; ++s) {
        const int64_t from = ((token + s) * p.key_heads + key_head) * p.value_dim;
        const char* row = static_cast<const char*>(a.values) + from * dtype_bytes(a.block_type);
        float* to = value_room + s * p.value_dim;
        int c = 0;
        for (; c + W <= p.value_dim; c += W) store(to + c, load_float(row, a.block_type, c, W));
        if (c < p.value_dim) store_n(to + c, load_float(row, a.block_type, c, p.value_dim - c), p.value_dim - c);
      }
      chunk->values = reinterpret_cast<const char*>(value_room);
    }
    if (a.value_scales) {
      for (int s = 0; s < n; ++s) value_scale[s] = a.value_scales[(token + s) * p.key_heads + key_head];
      chunk->value_scales = value_scale;
    }
    return *chunk;
  }
  int64_t ahead(int64_t, bool) const { return 0; }
};

static bool stream_part(const StreamAttentionArgs& a, int64_t part, int64_t key_head, float* partial) {
  const AttentionProblem& p = a.problem;
  const int64_t group = p.group(), rows = p.queries * group, stride = decode_row_floats(p);
  const int64_t part_key = (a.first_part + part) * kDecodePart;
  const int64_t from = a.offset > part_key ? a.offset : part_key, stop = a.offset + a.tokens;
  const int64_t to = stop < part_key + kDecodePart ? stop : part_key + kDecodePart;
  const int64_t room = (kChunk * (p.head_dim + int64_t{p.value_dim}) + 2 * kChunk + W) * 4;
  const int64_t own = part_scratch(p.value_dim, 1, false, nullptr).bytes;
  char* base = static_cast<char*>(attention_scratch(own + room));
  if (!base) return false;
  const PartScratch m = part_scratch(p.value_dim, 1, false, base);
  float* floats = reinterpret_cast<float*>(base + own);
  for (int64_t first = 0; first < rows; first += kPartRows) {
    const int count = static_cast<int>(rows - first < kPartRows ? rows - first : kPartRows);
    PartRow row[kPartRows];
    int lo = kDecodePart, hi = 0;
    const int least = static_cast<int>(from - part_key), most = static_cast<int>(to - part_key);
    auto inside = [&](int64_t x) { return static_cast<int>(x < least ? least : x > most ? most : x); };
    for (int r = 0; r < count; ++r) {
      const int64_t i = (first + r) / group, head = key_head * group + (first + r) % group;
      const int64_t diagonal = i + a.total_keys - p.queries - part_key;
      PartRow& x = row[r];
      x.lo = p.left < 0 ? least : inside(diagonal - p.left);
      x.hi = p.right < 0 ? most : inside(diagonal + p.right + 1);
      if (x.hi < x.lo) x.hi = x.lo;
      x.scale = p.scale;
      x.softcap = p.softcap;
      x.slope = p.alibi ? p.alibi[head] : 0.0f;
      x.diagonal = diagonal;
      x.transform = p.softcap > 0.0f || p.alibi || !(p.scale > 0.0f);
      if (x.lo == x.hi) continue;
      lo = x.lo < lo ? x.lo : lo;
      hi = x.hi > hi ? x.hi : hi;
    }
    float* out = partial + first * stride;
    if (lo >= hi) {
      for (int r = 0; r < count; ++r) out[r * stride] = kNegInf, out[r * stride + 1] = 0.0f, out[r * stride + 2] = -1.0f;
      continue;
    }
    const int64_t tiles = (rows + kPartRows - 1) / kPartRows;
    const PartQuery q = part_query(a.packed + (key_head * tiles + first / kPartRows) * part_query_bytes(p.head_dim), p.head_dim);
    const BlockChunks source{a,
                             key_head,
                             part_key + lo - a.offset,
                             (hi - lo + kChunk - 1) / kChunk,
                             hi - lo,
                             lo,
                             floats,
                             floats + kChunk * p.head_dim,
                             floats + kChunk * (p.head_dim + p.value_dim),
                             floats + kChunk * (p.head_dim + p.value_dim) + kChunk,
                             m.chunks};
    part_scores<CacheType::kFloat32>(q, m, source, p.head_dim, count);
    if (a.key_scales) {
      for (int r = 0; r < count; ++r) {
        for (int j = lo; j < hi; ++j) m.scores[r * kPartStride + j] *= a.key_scales[(part_key + j - a.offset) * p.key_heads + key_head];
      }
    }
    const int begin = lo / 32 * 32, end = (hi + 31) / 32 * 32;
    for (int r = 0; r < count; ++r) {
      float* s = m.scores + r * kPartStride;
      const char* const ahead[2] = {reinterpret_cast<const char*>(s), reinterpret_cast<const char*>(s)};
      const PartMax x = part_softmax(row[r], begin, end, s, ahead, a.want_best);
      out[r * stride] = x.shift;
      out[r * stride + 1] = x.total;
      out[r * stride + 2] = x.best;
    }
    part_values<CacheType::kFloat32>(m, source, p.value_dim, count);
    const int64_t columns = (p.value_dim + 15) / 16 * 16;
    for (int r = 0; r < count; ++r) {
      for (int64_t c = 0; c < columns; c += W) store(out + r * stride + kPartialHead + c, load(m.sums + r * columns + c));
    }
  }
  return true;
}

// Adds the block's parts to one row's state in key order.
static void add_parts(const StreamAttentionArgs& a, int64_t key_head, int64_t row) {
  const AttentionProblem& p = a.problem;
  const int64_t group = p.group(), rows = p.queries * group, stride = decode_row_floats(p);
  double* state = a.state + (row / group * p.query_heads + key_head * group + row % group) * (kStateHead + p.value_dim);
  double* sums = state + kStateHead;
  for (int64_t i = 0; i < a.parts; ++i) {
    const float* x = a.partial + ((i * p.key_heads + key_head) * rows + row) * stride;
    if (x[0] == kNegInf && x[1] == 0.0f) continue;
    if (a.want_best && x[2] >= 0.0f && (state[3] < 0 || x[0] > state[2])) {
      state[2] = x[0];
      state[3] = static_cast<double>((a.first_part + i) * kDecodePart) + x[2];
    }
    const double shift = x[0] == kNegInf ? state[0] : x[0];
    double factor = 1;
    if (shift > state[0]) {
      const double old = state[1] == 0 ? 0 : ::exp2(state[0] - shift);
      state[0] = shift;
      state[1] *= old;
      for (int64_t c = 0; c < p.value_dim; ++c) sums[c] = old == 0 ? 0 : sums[c] * old;  // not Inf times 0
    } else if (x[0] != kNegInf) {
      factor = ::exp2(shift - state[0]);
    }
    state[1] += x[1] * factor;
    if (factor == 0) continue;
    for (int64_t c = 0; c < p.value_dim; ++c) sums[c] += x[kPartialHead + c] * factor;
  }
}

Status stream_parts(const StreamAttentionArgs& a, const Exec& exec) {
  const AttentionProblem& p = a.problem;
  const int64_t group = p.group(), rows = p.queries * group, tiles = (rows + kPartRows - 1) / kPartRows;
  for (int64_t i = 0; i < p.key_heads * tiles; ++i) {
    const int64_t key_head = i / tiles, first = i % tiles * kPartRows;
    const int count = static_cast<int>(rows - first < kPartRows ? rows - first : kPartRows);
    pack_queries(p.query, p.type, p.head_dim, count, part_query(a.packed + i * part_query_bytes(p.head_dim), p.head_dim), [&](int r) {
      return (first + r) / group * p.query_stride[1] + (key_head * group + (first + r) % group) * p.query_stride[2];
    });
  }
  Failure failure;
  const int64_t floats = rows * decode_row_floats(p);
  bool done = parallel_for(exec, a.parts * p.key_heads, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      if (!stream_part(a, i / p.key_heads, i % p.key_heads, a.partial + i * floats)) failure.set();
    }
  });
  if (failure.get()) return kNoMemory;
  if (!done) return kCancelled;
  // Not cancelled from here on: a state that has half of a block would be of no use.
  Exec rest = exec;
  rest.user_cancel = nullptr;
  done = parallel_for(rest, p.key_heads * rows, 16, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) add_parts(a, i / rows, i % rows);
  });
  return done ? kOk : kCancelled;
}
