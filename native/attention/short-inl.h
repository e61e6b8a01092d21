// Sequences whose keys fit one panel, the usual case over patches or frames.
//
// Scores are computed transposed, keys down and rows of queries across the lanes: maximum, sum and mask work lane by lane
// without a reduction, keys are read as they lie (one broadcast each) and only q is transposed. The weights are broadcast in
// turn to the values, and a softmax that is complete after one pass lets the sums leave the registers scaled, straight
// into the output. No row has work of its own but its addresses.
//
// Floor of 196 x 64 frames, 12 heads of 64, fp32, on two cores of a Xeon: 7.1 ms of FMA at the peak, 1 of exp, 2.5 of
// packing, 5.8 of memory if nothing of it overlapped; measured at the pace of 12 in cache, and 14 to 16 from memory.
//
// Lessons, measured there (cycles of one unit of 64 x 64: 28,000; tiles run at 90 % of the peak):
// - Row by row, with reductions, sums in memory and an address computed per row and use, the softmax, the packing and the
//   outputs took as long as the products: 22 ms instead of 16 before anything was done about memory.
// - Memory is waited for below its bandwidth: a line fetched by software seems to hold one of a core's 16 line fill buffers
//   until it is there. So fetches are spread as evenly as can be, a line per step of a tile and of the softmax: the same
//   lines in the score tiles alone cost 30 % more, no fetch 28 %, every other line 25 % (no hardware fetches pairs here).
// - Where two sequences fit L2, fetching row after row of all heads in the order of memory lets the hardware run ahead: 9 %.
// - Arrays of JavaScript begin 16 bytes into a line. Rows of 256 bytes then have five lines: leaving the fifth out cost 9 %.
//   Stores that bypass the cache gained 8 % where rows began at a line (a pass that reads them afterwards included), which
//   in JavaScript they never do.
// - A store that is not done yet holds up loads of like low address bits: loading four vectors before storing them made
//   the packing of keys 1.7 times faster. The check for finite values needs more than one chain.
// - Copies of K and V cost what L1 and L2 exchange (6 cycles a vector), yet rows a multiple of 4 KiB apart share one set
//   of L1, so that tiles cannot read them where they are.
// - 2 MiB pages would gain 4 % over patches and 12 % over frames: the memory is the caller's.

HEDDLE_INLINE bool is_short(const AttentionProblem& p, const Sequence& s) {
  return s.keys > 0 && s.keys <= panel_keys(p.head_dim, p.value_dim) && !has_transform(p);
}

constexpr int kChunkRows = kSub;                // rows whose weights are in memory together
constexpr int64_t kFetchBytes = 1792 << 10;  // of two sequences, for which L2 is large enough on servers
static_assert(kChunkRows % kColumns == 0, "a chunk is whole tiles");

struct ShortScratch {
  float *keys, *values, *query, *weights, *sums, *mean;
  const char** vectors;
  int64_t floats;
};

constexpr int kElements = 64;  // of a key that lie together
static_assert(kElements % (4 * W) == 0, "four vectors lie together");
HEDDLE_INLINE int key_floats(int dim) { return (dim + kElements - 1) / kElements * kElements; }
HEDDLE_INLINE int groups_of(int count) { return (count + kRows - 1) / kRows; }
// First of `count` keys or rows in group g of a micro-kernel, groups as equal as they can be: 64 as 5 x 13, not 4 x 14 + 8.
HEDDLE_INLINE int group_begin(int count, int g) { return count * g / groups_of(count); }

HEDDLE_INLINE ShortScratch short_scratch(const AttentionProblem& p, int keys, int64_t vectors, float* base) {
  ShortScratch m;
  int64_t at = 0;
  auto take = [&](int64_t n) {
    float* x = base + at;
    at += (n + 15) / 16 * 16;
    return x;
  };
  m.keys = take(int64_t{groups_of(keys)} * kRows * key_floats(p.head_dim));
  m.values = take(int64_t{whole_columns(p.value_dim)} * keys);
  m.query = take(int64_t{p.head_dim} * kChunkRows);
  m.weights = take(int64_t{keys} * kChunkRows);
  m.sums = take(int64_t{kRows} * whole_columns(p.value_dim));
  m.mean = take(whole_columns(p.value_dim));
  m.vectors = reinterpret_cast<const char**>(take(2 * vectors));
  m.floats = at;
  return m;
}

#include "attention/short_fetch-inl.h"

#include "attention/short_tiles-inl.h"

// What a chunk of rows has in common, and a lane for each row.
struct ChunkRows {
  int count, lo, hi;            // keys that any row sees; lo is even
  int whole_lo, whole_hi;       // keys that every row sees
  RowView view[kChunkRows];
  int64_t query[kChunkRows], output[kChunkRows];  // first element; of the prefix, in its own output
  alignas(64) int32_t first[kChunkRows], end[kChunkRows];
  alignas(64) float scale[kChunkRows], lse[kChunkRows];
};

HEDDLE_INLINE void view_chunk(const AttentionProblem& p, const AttentionUnit& u, int64_t first, int count, ChunkRows* x) {
  const int64_t group = p.group();
  const bool all = p.left < 0 && p.right < 0;
  int keys = static_cast<int>(u.sequence.keys), lo = keys, hi = 0, whole_lo = 0, whole_hi = keys;
  int64_t position = u.begin + (group == 1 ? first : first / group), member = group == 1 ? 0 : first % group;
  for (int r = 0; r < count; ++r) {
    x->view[r].position = position;
    x->view[r].head = static_cast<int32_t>(u.key_head * group + member);
    if (++member == group) {
      member = 0;
      ++position;
    }
    if (all) continue;
    const KeyRange range = key_range(p, u.sequence, x->view[r].position);
    const int a = static_cast<int>(range.lo), b = static_cast<int>(range.hi);
    x->first[r] = a;
    x->end[r] = b;
    if (a < b && a < lo) lo = a;
    if (a < b && b > hi) hi = b;
    if (a > whole_lo) whole_lo = a;
    if (b < whole_hi) whole_hi = b;
  }
  if (!all) {
    for (int r = count; r < kChunkRows; ++r) x->first[r] = x->end[r] = 0;
  }
  const Sequence& s = u.sequence;
  const auto output_at = [&](int64_t i, int64_t head) {
    return p.is_prefix(i) ? p.prefix_at(s, p.query_heads, head) * p.value_dim : p.output_at(s, i, head);
  };
  if (group == 1) {
    const auto same = [](int64_t i) { return i; };
    const int64_t begin = u.begin + first, end = begin + count, h = u.key_head;
    list_positions(p, begin, end, p.query_stride[1], x->query, [&](int64_t i) { return p.query_at(s, i, h); }, same);
    list_positions(p, begin, end, p.output_stride[1], x->output, [&](int64_t i) { return output_at(i, h); }, same);
  } else {
    for (int r = 0; r < count; ++r) {
      x->query[r] = p.query_at(s, x->view[r].position, x->view[r].head);
      x->output[r] = output_at(x->view[r].position, x->view[r].head);
    }
  }
  for (int r = count; r < kChunkRows; ++r) x->query[r] = kNoVector;
  x->count = count;
  x->lo = all ? 0 : lo & ~1;
  x->hi = all ? keys : hi;
  x->whole_lo = whole_lo;
  x->whole_hi = whole_hi;
}

// Masks the keys that a lane's row does not see, and returns the maximum of the others.
HEDDLE_INLINE vf lanes_max(const ChunkRows& x, int lane, float* s) {
  vf top[4];
  for (vf& t : top) t = set1(kNegInf);
  int k = x.lo;
  if (x.whole_lo > x.lo || x.whole_hi < x.hi) {
    const vi first = loadi(x.first + lane), end = loadi(x.end + lane);
    for (; k < x.hi; ++k) {
      float* at = s + k * kChunkRows;
      vf z = load(at);
      if (k < x.whole_lo || k >= x.whole_hi) {
        const vi key = set1i(k);
        z = select(mask_and(gti(end, key), mask_not(gti(first, key))), z, set1(kNegInf));
        store(at, z);
      }
      top[0] = max(z, top[0]);
    }
    return top[0];
  }
  for (; k + 4 <= x.hi; k += 4) {  // a NaN score leaves the maximum alone and shows in its weight
    HEDDLE_UNROLL(4)
    for (int i = 0; i < 4; ++i) top[i] = max(load(s + (k + i) * kChunkRows), top[i]);
  }
  for (; k < x.hi; ++k) top[0] = max(load(s + k * kChunkRows), top[0]);
  return max(max(top[0], top[1]), max(top[2], top[3]));
}

// s = 2^(s * factor - shift) in place as weights; returns their sum. A key always adds to the same of two chains, so keys
// that other rows of the chunk see (weight 0 here) do not change the sum.
HEDDLE_INLINE vf lanes_exp(const ChunkRows& x, float* s, float factor, vf shift, Fetch* fetch) {
  const vf f = set1(factor), m = sub(set1(0.0f), shift);
  vf sum[2] = {set1(0.0f), set1(0.0f)};
  int k = x.lo, lines = x.hi > x.lo ? fetch->share((x.hi - x.lo) / 2) : 0;
  for (; k + 2 <= x.hi; k += 2) {
    if (lines > 0) {
      --lines;
      fetch->line();
    }
    HEDDLE_UNROLL(2)
    for (int i = 0; i < 2; ++i) {
      float* at = s + (k + i) * kChunkRows;
      const vf w = exp2_lanes(fma(load(at), f, m));
      store(at, w);
      sum[i] = add(sum[i], w);
    }
  }
  if (k < x.hi) {
    const vf w = exp2_lanes(fma(load(s + k * kChunkRows), f, m));
    store(s + k * kChunkRows, w);
    sum[0] = add(sum[0], w);
  }
  return add(sum[0], sum[1]);
}

// Softmax of W rows: weights in place, what their sums are scaled by, and the log-sum-exp where it is asked for.
HEDDLE_INLINE void softmax_lanes(const AttentionArgs& a, const Sequence& s, ChunkRows* x, int lane, float* scores,
                                 Fetch* fetch) {
  const AttentionProblem& p = a.problem;
  const float factor = p.scale * kLog2e;
  const vf zero = set1(0.0f), negative = set1(kNegInf);
  vf shift = mul(lanes_max(*x, lane, scores), set1(factor));
  vf total = lanes_exp(*x, scores, factor, select(eq(shift, negative), zero, shift), fetch);
  if (s.keys == 1 && x->hi > x->lo) {  // weight 1 but for a rounding, which would show in a row that is a value
    const vm seen = gt(total, zero);
    store(scores, select(seen, set1(1.0f), load(scores)));
    total = select(seen, set1(1.0f), total);
  }
  vf part = set1(1.0f);
  if (p.sinks) {
    alignas(64) float t[W] = {};
    for (int i = 0; i < W && lane + i < x->count; ++i) t[i] = p.sinks[x->view[lane + i].head] * kLog2e;
    const vf sink = load(t), top = select(gt(sink, shift), sink, shift);
    const vm any = gt(top, negative);
    part = select(any, exp2_lanes(sub(shift, top)), part);
    total = select(any, add(mul(total, part), exp2_lanes(sub(sink, top))), total);
    shift = select(any, top, shift);
  }
  const vm empty = mask_and(eq(shift, negative), eq(total, zero));  // a row of only NaN logits has total NaN
  store(x->scale + lane, select(empty, zero, div(part, total)));
  if (a.log_sum_exp || a.prefix_lse || p.uniform_empty) {
    const vf tail = select(not_nan(total), log_normal(total), total);
    store(x->lse + lane, select(empty, negative, add(mul(shift, set1(kLn2)), tail)));
  }
}

HEDDLE_INLINE void store_row(void* to, DType type, int64_t at, const float* from, int dim) {
  int c = 0;
  if (type == DType::kBFloat16) {
    for (uint16_t* h = static_cast<uint16_t*>(to) + at; c + W <= dim; c += W) store_bf16(h + c, load(from + c));
  }
  for (; c < dim; c += W) store_float(to, type, at + c, load(from + c), dim - c);
}

// Rows [begin, end) of a chunk, at most kRows: sums of values, scaled, into the output.
HEDDLE_INLINE void weigh_rows(const AttentionArgs& a, const AttentionUnit& u, const ShortScratch& m, bool finite,
                              const ChunkRows& x, int begin, int end, Fetch* fetch) {
  const AttentionProblem& p = a.problem;
  const int columns = whole_columns(p.value_dim), panel = static_cast<int>(u.sequence.keys);
  int lo = x.lo, hi = x.hi;
  if (x.whole_lo > x.lo || x.whole_hi < x.hi) {
    lo = hi;
    hi = x.lo;
    for (int r = begin; r < end; ++r) {
      if (x.first[r] >= x.end[r]) continue;
      lo = x.first[r] < lo ? x.first[r] : lo;
      hi = x.end[r] > hi ? x.end[r] : hi;
    }
  }
  float* out[kRows];
  const bool direct = p.type == DType::kFloat32 && p.value_dim % W == 0;
  for (int r = 0; r < end - begin; ++r) {
    out[r] = direct ? static_cast<float*>(a.output) + x.output[begin + r] : m.sums + r * columns;
  }
  // The prefix has an output of its own: always in float32.
  const bool prefix = p.is_prefix(x.view[begin].position);
  for (int r = 0; prefix && r < end - begin && p.is_prefix(x.view[begin + r].position); ++r) out[r] = m.sums + r * columns;
  if (lo > hi) lo = hi = 0;  // no row sees a key
  const WeighCall call{m.weights + lo * kChunkRows + begin, m.values + int64_t{lo} * kColumns, hi - lo, panel, p.value_dim,
                       x.scale + begin,                 out,                               fetch};
  if (finite) {
    with_rows<kRows>(end - begin, call);
  } else {
    weigh_careful(call, end - begin);
  }
  for (int r = 0; r < end - begin && (prefix || !direct); ++r) {
    const float* from = m.sums + r * columns;
    const bool own = p.is_prefix(x.view[begin + r].position);
    if (out[r] != from) continue;
    store_row(own ? a.prefix_output : a.output, own ? DType::kFloat32 : p.type, x.output[begin + r], from, p.value_dim);
  }
}

// At most kChunkRows rows of a unit.
HEDDLE_INLINE void attend_chunk(const AttentionArgs& a, const AttentionUnit& u, const ShortScratch& m, bool finite,
                                int64_t first, int count, Fetch* fetch, const float** mean) {
  const AttentionProblem& p = a.problem;
  const Sequence& s = u.sequence;
  const int keys = static_cast<int>(s.keys), dim = p.head_dim;
  ChunkRows x;
  view_chunk(p, u, first, count, &x);
  if (x.lo < x.hi) {
    const Vectors queries{p.query, p.type, p.query_stride[3], dim};
    for (int r = 0; r < count; r += kColumns) {
      pack_transposed(queries, x.query + r, count - r > W ? kColumns : W, m.query + int64_t{r} * dim, kColumns);
    }
    for (int g = 0; g < groups_of(keys); ++g) {
      const int begin = group_begin(keys, g), end = group_begin(keys, g + 1);
      if (end <= x.lo || begin >= x.hi) continue;
      with_rows<kRows>(end - begin, KeyTileCall{m.keys + int64_t{g} * kRows * key_floats(dim), m.query, dim, count,
                                                m.weights + begin * kChunkRows, fetch});
    }
  }
  for (int r = 0; r < count; r += W) softmax_lanes(a, s, &x, r, m.weights + r, fetch);
  for (int g = 0; g < groups_of(count); ++g) {
    weigh_rows(a, u, m, finite, x, group_begin(count, g), group_begin(count, g + 1), fetch);
  }
  if (!a.log_sum_exp && !a.prefix_lse && !p.uniform_empty) return;
  for (int r = 0; r < count; ++r) {
    const RowView& row = x.view[r];
    const bool prefix = p.is_prefix(row.position);
    const int64_t at = prefix ? p.prefix_at(s, p.query_heads, row.head) : p.lse_at(s, row.position, row.head);
    float* lse = prefix ? a.prefix_lse : a.log_sum_exp;
    if (lse) lse[at] = x.lse[r];
    if (!p.uniform_empty || x.lse[r] != kNegInf) continue;
    if (!*mean) {
      mean_value(p, u, m.mean);
      *mean = m.mean;
    }
    store_row(prefix ? a.prefix_output : a.output, prefix ? DType::kFloat32 : p.type, x.output[r], m.mean, p.value_dim);
  }
}

HEDDLE_INLINE bool attend_short(const AttentionArgs& a, const AttentionUnit& u, const UnitRun& run) {
  const AttentionProblem& p = a.problem;
  const int keys = static_cast<int>(u.sequence.keys);
  const int64_t count = (u.end - u.begin) * p.group(), vectors = plan_fetch(a, u, run, nullptr);
  float* base = static_cast<float*>(attention_scratch(short_scratch(p, keys, vectors, nullptr).floats * 4));
  if (!base) return false;
  const ShortScratch m = short_scratch(p, keys, vectors, base);
  const bool finite = pack_short(p, u, m);
  Fetch fetch;
  if (vectors) {
    plan_fetch(a, u, run, m.vectors);
    fetch.next = m.vectors;
    fetch.bytes = p.head_dim * dtype_bytes(p.type);
    fetch.lines = vectors * ((fetch.bytes + 63) / 64);
    const int64_t columns = whole_columns(p.value_dim) / kColumns;
    fetch.steps = (count + kColumns - 1) / kColumns * groups_of(keys) * p.head_dim +
                  (count + kChunkRows - 1) / kChunkRows * groups_of(kChunkRows) * columns * keys + (count + W - 1) / W * (keys / 2);
  }
  const float* mean = nullptr;
  for (int64_t r = 0; r < count; r += kChunkRows) {
    attend_chunk(a, u, m, finite, r, count - r < kChunkRows ? static_cast<int>(count - r) : kChunkRows, &fetch, &mean);
  }
  return true;
}
