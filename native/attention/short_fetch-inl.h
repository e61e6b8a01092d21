// Short sequences: addresses, and the memory that later units read and write.

// to[i] = make(index of the first element) for positions [begin, end) of one head; `stride` lies between neighbours.
template <class T, class At, class Make>
HEDDLE_INLINE T* list_positions(const AttentionProblem& p, int64_t begin, int64_t end, int64_t stride, T* to, const At& at,
                                const Make& make) {
  if (p.order) {
    for (; begin < end; ++begin) *to++ = make(at(begin));
    return to;
  }
  if (begin < end && p.is_prefix(begin)) *to++ = make(at(begin++));
  if (begin >= end) return to;
  const int64_t x = at(begin), count = end - begin;
  for (int64_t i = 0; i < count; ++i) to[i] = make(x + i * stride);
  return to + count;
}

// The memory that the next unit reads and writes, a line per step of a tile. Its rows lie far apart, where no hardware
// prefetches, and there is too little arithmetic to wait for them; a burst of prefetches stalls as loads do.
struct Fetch {
  const char** next = nullptr;
  // Of a vector; what of *next comes next. Arrays of JavaScript begin 16 bytes into a line: the last byte of each 64 finds
  // the line that no neighbour has fetched.
  int64_t bytes = 0, at = 63;
  int64_t lines = 0, issued = 0; // of the unit
  int64_t steps = 1, done = 0;   // of this unit
  // Lines to fetch during a tile of so many steps.
  int share(int64_t tile) {
    done += tile;
    const int64_t due = done >= steps ? lines - issued : lines * done / steps - issued;
    const int64_t n = due < tile ? due : tile;
    issued += n;
    return static_cast<int>(n);
  }
  inline void line() {
    HEDDLE_PREFETCH_L2(*next + at);
    at += 64;
    if (at >= bytes) {
      at = 63;
      ++next;
    }
  }
};

// What a unit reads and writes.
HEDDLE_INLINE void list_vectors(const AttentionArgs& a, const AttentionUnit& u, const char** to) {
  const AttentionProblem& p = a.problem;
  const Sequence& s = u.sequence;
  const int64_t size = dtype_bytes(p.type), head = u.key_head * p.group();
  const auto list = [&](const void* data, int64_t begin, int64_t end, int64_t stride, const auto& at) {
    const char* base = static_cast<const char*>(data);
    to = list_positions(p, begin, end, stride, to, at, [=](int64_t x) { return base + x * size; });
  };
  list(p.key, 0, s.keys, p.key_stride[1], [&](int64_t i) { return p.key_at(s, i, u.key_head); });
  list(p.value, 0, s.keys, p.value_stride[1], [&](int64_t i) { return p.value_at(s, i, u.key_head); });
  for (int64_t h = head; h < head + p.group(); ++h) {
    list(p.query, u.begin, u.end, p.query_stride[1], [&](int64_t i) { return p.query_at(s, i, h); });
    list(a.output, u.begin, u.end, p.output_stride[1],
         [&](int64_t i) { return p.output_at(s, p.is_prefix(i) ? 1 : i, h); });
  }
}

// The same of all heads: row after row, as they lie in memory, so that the hardware prefetches ahead of the list.
HEDDLE_INLINE const char** list_rows(const AttentionArgs& a, const Sequence& s, KeyRange keys, KeyRange queries,
                                     const char** to) {
  const AttentionProblem& p = a.problem;
  const int64_t size = dtype_bytes(p.type);
  const auto list = [&](const void* data, KeyRange rows, int64_t heads, const auto& at) {
    for (int64_t i = rows.lo; i < rows.hi; ++i) {
      const char* base = static_cast<const char*>(data) + at(i, 0) * size;
      const int64_t step = heads > 1 ? (at(i, 1) - at(i, 0)) * size : 0;
      for (int64_t h = 0; h < heads; ++h) to[h] = base + h * step;
      to += heads;
    }
  };
  list(p.key, keys, p.key_heads, [&](int64_t i, int64_t h) { return p.key_at(s, i, h); });
  list(p.value, keys, p.key_heads, [&](int64_t i, int64_t h) { return p.value_at(s, i, h); });
  list(p.query, queries, p.query_heads, [&](int64_t i, int64_t h) { return p.query_at(s, i, h); });
  list(a.output, queries, p.query_heads, [&](int64_t i, int64_t h) { return p.output_at(s, p.is_prefix(i) ? 1 : i, h); });
  return to;
}

// Units [begin, end) that a thread does one after the other, and the one it is at.
struct UnitRun {
  int64_t begin, end, at;
};

// Lists what this unit is to fetch and returns how many vectors; `to` may be null. Where all heads of two sequences fit
// L2 it is this head's share of the next sequence; elsewhere, and where a run starts, the next unit.
HEDDLE_INLINE int64_t plan_fetch(const AttentionArgs& a, const AttentionUnit& u, const UnitRun& run, const char** to) {
  const AttentionProblem& p = a.problem;
  const int64_t group = p.group(), heads = p.key_heads, after = run.at + heads - u.key_head;
  int64_t count = 0;
  bool ahead = false;
  if (u.begin == 0 && u.end == u.sequence.queries && after < run.end) {
    const AttentionUnit v = unit_of(a.problem, *a.plan, after);
    const Sequence& s = v.sequence;
    const int64_t vectors = 2 * (s.keys * heads + s.queries * p.query_heads);
    ahead = is_short(p, s) && v.end == s.queries && 2 * vectors * p.head_dim * dtype_bytes(p.type) <= kFetchBytes;
    if (ahead) {
      const KeyRange keys{s.keys * u.key_head / heads, s.keys * (u.key_head + 1) / heads};
      const KeyRange queries{s.queries * u.key_head / heads, s.queries * (u.key_head + 1) / heads};
      count = 2 * ((keys.hi - keys.lo) * heads + (queries.hi - queries.lo) * p.query_heads);
      if (to) to = list_rows(a, s, keys, queries, to);
    }
  }
  if (run.at + 1 < run.end && (!ahead || (run.at - u.key_head <= run.begin && u.key_head + 1 < heads))) {
    const AttentionUnit v = unit_of(a.problem, *a.plan, run.at + 1);
    const Sequence& s = v.sequence;
    if (is_short(p, s)) {
      count += 2 * (s.keys + (v.end - v.begin) * group);
      if (to) list_vectors(a, v, to);
    }
  }
  return count;
}
