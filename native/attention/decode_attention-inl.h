// See decode_attention.h for the definition and what the design rests on.

// Key-side of a unit: which pages its chunks come from.
HEDDLE_INLINE int64_t padded_slots(int64_t page_size) { return (page_size + kSlotBlock - 1) / kSlotBlock * kSlotBlock; }

// Chunks of keys [begin, end) of a sequence for one key head.
HEDDLE_INLINE int64_t page_chunks(const DecodeAttentionArgs& a, int64_t batch, int64_t key_head, int64_t part_key,
                                  int64_t begin, int64_t end, PartChunk* out) {
  const AttentionProblem& p = a.problem;
  const int group = cache_group(a.cache_type), word = cache_word_bytes(a.cache_type);
  const int64_t slots = padded_slots(a.page_size), first_page = a.starts[batch] / a.page_size;
  const int64_t words = (p.head_dim + group - 1) / group;
  const int64_t key_bytes = slots * words * word, value_bytes = slots / group * p.value_dim * word;
  const int32_t* table = a.table + batch * a.table_stride;
  int64_t count = 0;
  for (int64_t key = begin; key < end;) {
    const int64_t page = key / a.page_size, first = page * a.page_size;
    const int64_t vector = table[page - first_page] * int64_t{p.key_heads} + key_head;
    const int64_t slot = key - first, stop = slot / kChunk * kChunk + kChunk;
    int64_t last = end - first < a.page_size ? end - first : a.page_size;
    if (stop < last) last = stop;
    PartChunk& c = out[count++];
    c.keys = static_cast<const char*>(a.keys) + vector * key_bytes;
    c.values = static_cast<const char*>(a.values) + vector * value_bytes;
    c.key_scales = a.key_scales ? a.key_scales + vector * slots : nullptr;
    c.value_scales = a.value_scales ? a.value_scales + vector * slots : nullptr;
    c.begin = static_cast<int>(slot);
    c.end = static_cast<int>(last);
    c.at = static_cast<int>(first - part_key);
    c.first_key = c.keys + slot / kSlotBlock * kSlotBlock * words * word;
    c.first_value = c.values + slot / group * p.value_dim * word;
    c.ahead = 0;
    key = first + last;
  }
  return count;
}

template <CacheType T>
static void decode_rows(const DecodeAttentionArgs& a, const DotKernels* dot, const PartQuery& q, const PartScratch& m, int64_t chunks,
                        const PartRow* row, int rows, int begin, int end, float* partial, int64_t stride) {
  const AttentionProblem& p = a.problem;
  if (cache_is_integer(T) && dot) {
    dot_scores<T>(*dot, q, m, chunks, p.head_dim, rows);
  } else {
    part_scores<T>(q, m, ReadyChunks{m, chunks, rows}, p.head_dim, rows);
  }
  for (int r = 0; r < rows; ++r) {
    const char* ahead[2];
    softmax_ahead(m, chunks, r, ahead);
    const PartMax x = part_softmax(row[r], begin, end, m.scores + r * kPartStride, ahead);
    partial[r * stride] = x.shift;
    partial[r * stride + 1] = x.total;
  }
  if (cache_is_integer(T) && dot) {
    dot_values<T>(*dot, m, chunks, p.value_dim, rows, begin, end);
  } else {
    part_values<T>(m, ReadyChunks{m, chunks, rows}, p.value_dim, rows);
  }
  const int64_t columns = (p.value_dim + 15) / 16 * 16;
  for (int r = 0; r < rows; ++r) {
    for (int64_t c = 0; c < columns; c += W) store(partial + r * stride + kPartialHead + c, load(m.sums + r * columns + c));
  }
}

// Key (inside the whole sequence) of the token of query i, and the first key that it sees.
HEDDLE_INLINE int64_t query_key(const DecodeAttentionArgs& a, int64_t batch, int64_t i) {
  return a.lengths[batch] - a.problem.queries + i;
}
HEDDLE_INLINE int64_t first_seen(const DecodeAttentionArgs& a, int64_t key) {
  return a.problem.left < 0 || key < a.problem.left ? 0 : key - a.problem.left;
}

// Rows [16 tile, 16 tile + 16) of a unit's q, packed once for all its parts.
HEDDLE_INLINE PartQuery unit_query(const DecodeAttentionArgs& a, int64_t batch, int64_t key_head, int64_t tile) {
  const AttentionProblem& p = a.problem;
  const int64_t tiles = (p.queries * p.group() + kPartRows - 1) / kPartRows;
  return part_query(a.packed + ((batch * p.key_heads + key_head) * tiles + tile) * part_query_bytes(p.head_dim), p.head_dim);
}

static void pack_unit(const DecodeAttentionArgs& a, const DotKernels* dot, int64_t batch, int64_t key_head) {
  const AttentionProblem& p = a.problem;
  const int64_t group = p.group(), rows = p.queries * group;
  for (int64_t first = 0; first < rows; first += kPartRows) {
    const int count = static_cast<int>(rows - first < kPartRows ? rows - first : kPartRows);
    const PartQuery q = unit_query(a, batch, key_head, first / kPartRows);
    pack_queries(p.query, p.type, p.head_dim, count, q, [&](int r) {
      const int64_t i = (first + r) / group, head = key_head * group + (first + r) % group;
      return batch * p.query_stride[0] + i * p.query_stride[1] + head * p.query_stride[2];
    });
    if (dot) split_queries(*dot, q, p.head_dim, count, a.cache_type == CacheType::kInt4 ? 8 : 128);
  }
}

struct DecodeUnit {
  int64_t batch, key_head, part;
};

// At most `count` chunks (and one) that a unit reads first.
HEDDLE_INLINE int64_t first_chunks(const DecodeAttentionArgs& a, const DecodeUnit& u, int64_t count, PartChunk* out) {
  const int64_t part_key = u.part * kDecodePart, seen = first_seen(a, query_key(a, u.batch, 0));
  const int64_t begin = seen > part_key ? seen : part_key, length = a.lengths[u.batch];
  const int64_t end = begin + count * (a.page_size < kChunk ? a.page_size : kChunk);
  return page_chunks(a, u.batch, u.key_head, part_key, begin, end < length ? end : length, out);
}

// One part of one sequence for one key head: partial shifts, totals and sums of its rows.
static bool decode_part(const DecodeAttentionArgs& a, const DotKernels* dot, const DecodeUnit& u, const DecodeUnit* next,
                        float* partial) {
  const AttentionProblem& p = a.problem;
  const int64_t batch = u.batch, key_head = u.key_head;
  const int64_t group = p.group(), rows = p.queries * group, stride = decode_row_floats(p);
  const int64_t part_key = u.part * kDecodePart, slots = a.page_size < kChunk ? a.page_size : kChunk;
  const int64_t most = kDecodePart / slots + kDecodePart / a.page_size + 4 + kMaxLead + 2;
  char* base = static_cast<char*>(attention_scratch(part_scratch(p.value_dim, most, dot, nullptr).bytes));
  if (!base) return false;
  PartScratch m = part_scratch(p.value_dim, most, dot, base);
  const int64_t vector_bytes = int64_t{p.value_dim} * cache_word_bytes(a.cache_type) / cache_group(a.cache_type);
  m.chunk_bytes = slots * vector_bytes > 0 ? slots * vector_bytes : 1;
  m.lead = kLeadBytes / m.chunk_bytes;
  m.lead = m.lead < 1 ? 1 : m.lead > kMaxLead ? kMaxLead : m.lead;
  for (int64_t first = 0; first < rows; first += kPartRows) {
    const int count = static_cast<int>(rows - first < kPartRows ? rows - first : kPartRows);
    PartRow row[kPartRows];
    int lo = kDecodePart, hi = 0;
    for (int r = 0; r < count; ++r) {
      const int64_t i = (first + r) / group, head = key_head * group + (first + r) % group;
      const int64_t own = query_key(a, batch, i), below = first_seen(a, own) - part_key, above = own + 1 - part_key;
      PartRow& x = row[r];
      x.lo = static_cast<int>(below < 0 ? 0 : below > kDecodePart ? kDecodePart : below);
      x.hi = static_cast<int>(above < x.lo ? x.lo : above > kDecodePart ? kDecodePart : above);
      x.scale = p.scale;
      x.softcap = p.softcap;
      x.slope = p.alibi ? p.alibi[head] : 0.0f;
      x.diagonal = own - part_key;
      x.transform = p.softcap > 0.0f || p.alibi || !(p.scale > 0.0f);
      if (x.lo == x.hi) continue;
      lo = x.lo < lo ? x.lo : lo;
      hi = x.hi > hi ? x.hi : hi;
    }
    float* to = partial + first * stride;
    if (lo >= hi) {
      for (int r = 0; r < count; ++r) to[r * stride] = kNegInf, to[r * stride + 1] = 0.0f;
      continue;
    }
    const int64_t chunks = page_chunks(a, batch, key_head, part_key, part_key + lo, part_key + hi, m.chunks);
    if (next) m.following = first_chunks(a, *next, m.lead, m.chunks + chunks);
    const int begin = lo / 32 * 32, end = (hi + 31) / 32 * 32;
    const PartQuery q = unit_query(a, batch, key_head, first / kPartRows);
    switch (a.cache_type) {
#define HEDDLE_DECODE_CASE(type)                                                                 \
  case CacheType::type:                                                                          \
    decode_rows<CacheType::type>(a, dot, q, m, chunks, row, count, begin, end, to, stride);      \
    break;
      HEDDLE_DECODE_CASE(kFloat32)
      HEDDLE_DECODE_CASE(kFloat16)
      HEDDLE_DECODE_CASE(kBFloat16)
      HEDDLE_DECODE_CASE(kInt8)
      HEDDLE_DECODE_CASE(kInt4)
#undef HEDDLE_DECODE_CASE
    }
  }
  return true;
}

// Adds the parts of one row in key order, in double: ten million keys are ten thousand parts.
HEDDLE_INLINE void merge_row(const DecodeAttentionArgs& a, int64_t batch, int64_t key_head, int64_t row, double* sums) {
  const AttentionProblem& p = a.problem;
  const int64_t columns = p.value_dim, stride = decode_row_floats(p);
  const int64_t first = a.first_part[batch], parts = a.first_part[batch + 1] - first;
  const float* from = a.partial + (first * p.key_heads + key_head) * a.partial_floats + row * stride;
  const int64_t step = p.key_heads * a.partial_floats, head = key_head * p.group() + row % p.group();
  float top = kNegInf;
  for (int64_t i = 0; i < parts; ++i) top = from[i * step] > top ? from[i * step] : top;
  const float sink = p.sinks ? p.sinks[head] * kLog2e : kNegInf;
  const float shift = sink > top ? sink : top;
  double total = 0;
  for (int64_t c = 0; c < columns; ++c) sums[c] = 0;
  for (int64_t i = 0; i < parts; ++i) {
    const float* x = from + i * step;
    if (x[0] == kNegInf && x[1] == 0.0f) continue;
    const double factor = reduce_max(exp2_lanes(set1(x[0] == kNegInf ? 0.0f : x[0] - shift)));
    total += x[1] * factor;
    if (factor == 0) continue;  // what weighs nothing must not bring in an infinity
    for (int64_t c = 0; c < columns; ++c) sums[c] += x[kPartialHead + c] * factor;
  }
  if (sink > kNegInf) total += reduce_max(exp2_lanes(set1(sink - shift)));
  const bool empty = shift == kNegInf && total == 0;  // a row of only NaN logits has total NaN
  const int64_t query = row / p.group(), out = ((batch * p.queries + query) * p.query_heads + head) * p.value_dim;
  alignas(64) float result[512 + W];
  for (int64_t c = 0; c < columns; ++c) result[c] = empty ? 0.0f : static_cast<float>(sums[c] / total);
  for (int64_t c = 0; c < columns; c += W) {
    store_float(a.output, p.type, out + c, load(result + c), static_cast<int>(columns - c));
  }
  if (a.log_sum_exp) {
    const float t = static_cast<float>(total);
    const float tail = t == t ? reduce_max(log_normal(set1(t))) : t;
    a.log_sum_exp[(batch * p.query_heads + head) * p.queries + query] = empty ? kNegInf : shift * kLn2 + tail;
  }
}

Status decode_parts(const DecodeAttentionArgs& a, const Exec& exec) {
  const AttentionProblem& p = a.problem;
  const DotKernels* dot = cache_is_integer(a.cache_type) ? dot_kernels(HEDDLE_REGION_ISA) : nullptr;
  const int64_t units = a.first_part[p.batch] * p.key_heads, rows = p.queries * p.group();
  auto unit = [&](int64_t i) {
    const int64_t part = i / p.key_heads;
    int64_t lo = 0, hi = p.batch;  // the last batch entry whose first part is <= part
    while (hi - lo > 1) {
      const int64_t mid = (lo + hi) / 2;
      (a.first_part[mid] <= part ? lo : hi) = mid;
    }
    return DecodeUnit{lo, i % p.key_heads, part - a.first_part[lo] + a.part_offset[lo]};
  };
  bool done = parallel_for(exec, p.batch * p.key_heads, 1 + 32 / (rows + 1), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) pack_unit(a, dot, i / p.key_heads, i % p.key_heads);
  });
  if (!done) return kCancelled;
  // A tile of several units in a row knows what it will read next.
  int64_t grain = units / (8 * exec.threads);
  grain = grain < 1 ? 1 : grain > 8 ? 8 : grain;
  Failure failure;
  done = parallel_for(exec, units, grain, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const bool more = i + 1 < end;
      const DecodeUnit u = unit(i), next = unit(more ? i + 1 : i);
      if (!decode_part(a, dot, u, more ? &next : nullptr, a.partial + i * a.partial_floats)) failure.set();
    }
  });
  if (failure.get()) return kNoMemory;
  if (!done) return kCancelled;
  done = parallel_for(exec, p.batch * p.key_heads * rows, 16, [&](int64_t begin, int64_t end) {
    double sums[512];
    for (int64_t i = begin; i < end; ++i) merge_row(a, i / rows / p.key_heads, i / rows % p.key_heads, i % rows, sums);
  });
  return done ? kOk : kCancelled;
}

// Lessons. Measured on a Xeon with two 512-bit ports, 2 cores, about 16 GB/s of stream bandwidth each; D = 128, shares of
// what a plain read of the same pools reaches between the calls, with one and four query heads per key head:
// - 32,768 keys: float32 85 and 77 %. 131,072 keys: bfloat16 89 and 76 %, int8 80 to 85 and 59 to 62 %, int4 69 to 83
//   and 39 to 48 %.
// - Four rows on int8 and int4 are bound by arithmetic: on one core a part and key head take 15.1 and 14.1 us from memory
//   and as much from L2, of which vpdpbusd at its peak takes 9.0 (24 bits of q and of p take three each); reading takes
//   9.5 and 4.8. One row takes 10.8 and 6.4. Widening to fp32 needs half as many operations again; fewer bits of q or p
//   miss the bound of 5e-6.
// Reasoned, not measured one by one: KVCache asks for 2 MiB pages; memory is fetched kLeadBytes before it is computed on,
// across passes and units of a tile; q is packed once per call.
