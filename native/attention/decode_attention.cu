// decodeAttention on the device; definition and promises in decode_attention.h.
//
// Floor: the bytes of the visible keys and values, read once per 16 rows (rows = queries x group). 8 key heads of 128,
// 131,072 keys, bf16: 537 MB, 160 us at the 3.35 TB/s of an H100; int8 (with scales) 285 MB, 85 us; int4 151 MB, 45 us.
// Arithmetic stays below: a tile of 32 keys and 16 rows takes 64 mma.m16n8k16 per 128 dims and pair of pieces, about
// 105 clocks of a multiprocessor, while its bytes take 1130 (bf16), 600 (int8) or 320 (int4) at its share of the
// bandwidth (14.5 bytes a clock). fp32 q has three pieces (24 bits): 315 clocks, still below all but int4's, which it
// meets. Widening int8 to bf16 costs 8 instructions per word, int4 10: 512 and 320 issue slots of a tile, of 2400 and 1280.
//
// Blocks: (part, key head, 16 rows). A part is 256, 512 or 1024 keys between multiples of that; which depends on the
// sequence's own visible keys, not on the batch or the device, so that a sequence has the same bits in any batch. 4,096
// keys of 8 heads make 128 blocks, 131,072 make 1,024. A block's four warps take its tiles of 32 keys in turns, by
// position, each with its own (max, sum, output); they are added in the order of the warps, and a second kernel adds the
// parts in key order in fp64. Partial results are 1.6 % of the bytes of bf16 keys (group 4, parts of 256), 0.4 % of
// parts of 1024, written and read.
//
// Words go from memory straight into fragments of matrix instructions (decode_words.cuh): no shared memory for keys or
// values, 16-byte loads of whole 128-byte lines. Each warp asks for its next tile by prefetch while it computes one, so
// about 16 KB a warp are under way; 18 KB a multiprocessor hide 700 ns of latency.
//
// Pages that are no multiple of 16 slots, and value dims that are no multiple of 4, are first copied into pages that
// are: memory and time of another pass over the visible keys. Not measured on a GPU yet.
#include "attention/decode_rows.cuh"

namespace heddle {
namespace {

constexpr int kMergeThreads = 256, kMergeGroups = kMergeThreads / kWarp;
constexpr int64_t kRepackSlots = 64;

// blockIdx.x: batch entry and row; blockIdx.y: 32 value columns. Warp w adds parts w, w + 8, ...; then the warps' sums
// are added in order. In double: ten million keys are ten thousand parts.
__global__ void __launch_bounds__(kMergeThreads) decode_merge_kernel(DecodeLaunch d) {
  __shared__ float tops[kMergeGroups];
  __shared__ double sums[kMergeGroups][kWarp + 1], totals[kMergeGroups];
  const AttentionProblem& p = d.a.problem;
  const int64_t rows = p.queries * p.query_heads, batch = blockIdx.x / rows, index = blockIdx.x % rows;
  const int64_t query = index / p.query_heads, head = index % p.query_heads;
  const int64_t key_head = head / p.group(), row = query * p.group() + head % p.group();
  const int warp = static_cast<int>(threadIdx.x) / kWarp, lane = static_cast<int>(threadIdx.x) % kWarp;
  const int32_t column = static_cast<int32_t>(blockIdx.y) * kWarp + lane;
  const int64_t parts = decode_span(d.a, batch).count;
  const float* from = partial_of(d, batch, 0, key_head, row);
  const int64_t step = p.key_heads * d.a.partial_floats;

  float top = kNegInf;
  for (int64_t i = threadIdx.x; i < parts; i += kMergeThreads) top = fmaxf(top, from[i * step]);
  top = block_max<kMergeThreads>(top, tops);
  const float sink = p.sinks ? p.sinks[head] * kLog2OfE : kNegInf, shift = fmaxf(sink, top);
  double sum = 0.0, total = 0.0;
#pragma unroll 4
  for (int64_t i = warp; i < parts; i += kMergeGroups) {
    const float* x = from + i * step;
    const float m = x[0], t = x[1];
    if (m == kNegInf && t == 0.0f) continue;
    const double factor = exp2f(m == kNegInf ? 0.0f : m - shift);
    total += t * factor;
    if (factor == 0.0) continue;  // what weighs nothing must not bring in an infinity
    if (column < p.value_dim) sum += x[kPartialHead + column] * factor;
  }
  sums[warp][lane] = sum;
  if (lane == 0) totals[warp] = total;
  __syncthreads();
  if (warp != 0) return;
  sum = total = 0.0;
  for (int w = 0; w < kMergeGroups; ++w) {
    sum += sums[w][lane];
    total += totals[w];
  }
  if (sink > kNegInf) total += exp2f(sink - shift);
  const bool empty = shift == kNegInf && total == 0.0;  // a row of only NaN logits has the total NaN
  if (column < p.value_dim) {
    const float value = empty ? 0.0f : static_cast<float>(sum / total);
    const int64_t at = (int64_t{blockIdx.x}) * p.value_dim + column;
    if (p.type == DType::kFloat32) store_float<DType::kFloat32>(d.a.output, at, value);
    else if (p.type == DType::kBFloat16) store_float<DType::kBFloat16>(d.a.output, at, value);
    else store_float<DType::kFloat16>(d.a.output, at, value);
  }
  if (d.a.log_sum_exp && blockIdx.y == 0 && lane == 0) {
    const float lse = empty ? kNegInf : (shift + log2f(static_cast<float>(total))) * kLnOf2;
    d.a.log_sum_exp[(batch * p.query_heads + head) * p.queries + query] = lse;
  }
}

// Pages of 64 slots with padded value dims, `pages` of them for each batch entry.
struct Repack {
  KvPools from, to;
  const int32_t *table, *starts, *lengths;
  int64_t table_stride, pages;
  int32_t *new_table, *new_starts;
};
// A thread a word; blockIdx.z: batch entry, blockIdx.y: keys, values or scales.
template <CacheType T>
__global__ void __launch_bounds__(kMergeThreads) decode_repack_kernel(Repack r) {
  constexpr int G = cache_group(T);
  const int64_t batch = blockIdx.z, start = r.starts[batch], length = r.lengths[batch];
  const int64_t base = start / kRepackSlots * kRepackSlots, heads = r.to.key_heads;
  const int32_t* table = r.table + batch * r.table_stride;
  const int64_t words = blockIdx.y == 0 ? r.to.page_key_words() : blockIdx.y == 1 ? r.to.page_value_words() : kRepackSlots;
  const int64_t all = r.pages * heads * words, thread = int64_t{blockIdx.x} * kMergeThreads + threadIdx.x;
  auto slot_of = [&](int64_t key) { return page_slot(r.from, table, start, key); };
  auto exists = [&](int64_t key) { return key >= start && key < length; };
  for (int64_t i = thread; i < all; i += int64_t{gridDim.x} * kMergeThreads) {
    const int64_t w = i % words, head = i / words % heads, key = base + i / words / heads * kRepackSlots;
    const int64_t to = (batch * r.pages * heads) * words + i;
    if (blockIdx.y == 2) {
      const bool there = exists(key + w);
      const PageSlot at = there ? slot_of(key + w) : PageSlot{0, 0};
      const int64_t from = (at.page * heads + head) * r.from.slots() + at.slot;
      r.to.key_scales[to] = there ? r.from.key_scales[from] : 0.0f;
      r.to.value_scales[to] = there ? r.from.value_scales[from] : 0.0f;
      continue;
    }
    // Element 0 .. G - 1 of the word, as its bits.
    uint32_t word = 0;
    if (blockIdx.y == 0) {
      const int64_t slot = w / kSlotBlock / r.to.key_words() * kSlotBlock + w % kSlotBlock, column = w / kSlotBlock % r.to.key_words();
      if (exists(key + slot)) {
        const PageSlot at = slot_of(key + slot);
        const int64_t from = (at.page * heads + head) * r.from.page_key_words() +
                             key_word(r.from, at.slot, static_cast<int32_t>(column * G));
        word = raw_word<T>(r.from.keys, from);
      }
      put_raw_word<T>(r.to.keys, to, word);
    } else {
      const int64_t column = w % r.to.value_dim, first = w / r.to.value_dim * G;
#pragma unroll 1
      for (int g = 0; g < G; ++g) {
        if (!exists(key + first + g) || column >= r.from.value_dim) continue;
        const PageSlot at = slot_of(key + first + g);
        const int64_t from = (at.page * heads + head) * r.from.page_value_words() +
                             value_word(r.from, at.slot, static_cast<int32_t>(column));
        word |= raw_element<T>(r.from.values, from, static_cast<int>(at.slot % G)) << element_shift<T>(g);
      }
      put_raw_word<T>(r.to.values, to, word);
    }
  }
  if (blockIdx.y == 0) {
    for (int64_t i = thread; i < r.pages; i += int64_t{gridDim.x} * kMergeThreads) {
      r.new_table[batch * r.pages + i] = static_cast<int32_t>(batch * r.pages + i);
    }
    if (thread == 0) r.new_starts[batch] = static_cast<int32_t>(base);
  }
}

// Replaces the pools, the table and the starts of `d` by copies that the kernel can read.
int64_t repack(DecodeLaunch& d, heddle_cuda_job& job) {
  DecodeAttentionArgs& a = d.a;
  const int64_t batch = a.problem.batch;
  Repack r{d.pools, d.pools, a.table, a.starts, a.lengths, a.table_stride, 0, nullptr, nullptr};
  r.pages = a.table_stride * a.page_size / kRepackSlots + 2;
  r.to.page_size = kRepackSlots;
  r.to.value_dim = (d.pools.value_dim + 3) / 4 * 4;
  const int64_t vectors = batch * r.pages * d.pools.key_heads;
  r.to.keys = job.scratch<char>(vectors * r.to.page_key_words() * r.to.word_bytes());
  r.to.values = job.scratch<char>(vectors * r.to.page_value_words() * r.to.word_bytes());
  if (d.pools.integers()) {
    r.to.key_scales = job.scratch<float>(vectors * kRepackSlots);
    r.to.value_scales = job.scratch<float>(vectors * kRepackSlots);
  }
  r.new_table = job.scratch<int32_t>(batch * r.pages);
  r.new_starts = job.scratch<int32_t>(batch);
  if (job.no_memory) return kNoMemory;
  const int64_t words = r.to.page_key_words() > r.to.page_value_words() ? r.to.page_key_words() : r.to.page_value_words();
  const int64_t blocks = ceil_div(r.pages * d.pools.key_heads * words, kMergeThreads);
  const dim3 grid(static_cast<unsigned>(blocks < 65536 ? blocks : 65536), d.pools.integers() ? 3 : 2,
                  static_cast<unsigned>(batch));
  d.pools = r.to;
  a.table = r.new_table;
  a.table_stride = r.pages;
  a.starts = r.new_starts;
  return with_cache_type(r.to.type, [&](auto type) {
    HEDDLE_LAUNCH((decode_repack_kernel<decltype(type)::value>), grid, dim3(kMergeThreads), 0, job.stream, r);
    return job.launched();
  });
}

}  // namespace

HEDDLE_CUDA_OP(decode_attention, DecodeAttentionArgs) {
  DecodeLaunch d;
  d.a = a;
  const AttentionProblem& p = a.problem;
  const int64_t rows = p.batch * p.queries * p.query_heads;
  if (rows == 0) return kOk;
  if (rows > INT32_MAX || p.batch > 65535) return kUnsupported;
  d.pools.type = a.cache_type;
  d.pools.key_heads = p.key_heads;
  d.pools.head_dim = p.head_dim;
  d.pools.value_dim = p.value_dim;
  d.pools.page_size = a.page_size;
  d.pools.keys = const_cast<void*>(a.keys);
  d.pools.values = const_cast<void*>(a.values);
  d.pools.key_scales = const_cast<float*>(a.key_scales);
  d.pools.value_scales = const_cast<float*>(a.value_scales);
  d.max_parts = most_parts(a.table_stride * a.page_size);
  d.a.partial_floats = p.queries * p.group() * decode_row_floats(p);
  d.a.partial = job.scratch<float>(p.batch * d.max_parts * p.key_heads * d.a.partial_floats);
  if (!d.a.partial) return kNoMemory;
  int64_t status = kOk;
  if (a.page_size % kSlotBlock != 0 || p.value_dim % 4 != 0) status = repack(d, job);
  if (status != kOk) return status;
  status = with_cache_type(a.cache_type, [&](auto type) { return launch_decode_parts<decltype(type)::value>(d, job); });
  if (status != kOk) return status;
  const dim3 grid(static_cast<unsigned>(rows), static_cast<unsigned>(ceil_div(p.value_dim, kWarp)));
  HEDDLE_LAUNCH(decode_merge_kernel, grid, dim3(kMergeThreads), 0, job.stream, d);
  return job.launched();
}

}  // namespace heddle
