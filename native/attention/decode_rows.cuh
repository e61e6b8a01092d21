// Parts, rows and logits of decoding on the device, and a row worked element by element: see decode_attention.cu.
#pragma once
#include "attention/attention_rows.cuh"
#include "attention/decode_words.cuh"
#include "cuda/job.h"
#include "cuda/warp.cuh"

namespace heddle {

constexpr int kDecodeRows = 16, kDecodeWarps = 4, kDecodeThreads = kDecodeWarps * kWarp;
constexpr int kDecodeTile = 32;  // keys of a warp at a time
constexpr int kPartBlocks = kDecodePart / kSlotBlock, kTileBlocks = kDecodeTile / kSlotBlock;

struct DecodeLaunch {
  DecodeAttentionArgs a;
  KvPools pools;
  int64_t max_parts = 0;   // of any sequence
  int32_t row_tiles = 1, slices = 1;
};
// Launches decode_part_kernel (decode_part.cuh) for a cache of type T: one file per type, since nvcc takes long for each.
template <CacheType T>
int64_t launch_decode_parts(DecodeLaunch& d, heddle_cuda_job& job);

// Keys of a part. It depends on the sequence's own visible keys alone, so that its bits do not depend on the batch:
// short sequences get smaller parts, since 8 heads x 4096 keys should still fill 132 multiprocessors.
HEDDLE_BOTH inline int32_t decode_part_keys(int64_t visible) {
  return visible <= 8192 ? 256 : visible <= 32768 ? 512 : kDecodePart;
}

// Parts [first, first + count) of `keys` keys each are visible to the queries of a sequence.
struct DecodeSpan {
  int64_t first, count;
  int32_t keys;
};
__device__ inline int64_t first_seen(const AttentionProblem& p, int64_t key) {
  return p.left < 0 || key < p.left ? 0 : key - p.left;
}
__device__ inline DecodeSpan decode_span(const DecodeAttentionArgs& a, int64_t batch) {
  const AttentionProblem& p = a.problem;
  const int64_t length = a.lengths[batch], oldest = first_seen(p, length - p.queries);
  const int32_t keys = decode_part_keys(length - oldest);
  const int64_t first = oldest / keys;
  return {first, (length + keys - 1) / keys - first, keys};
}
// The most parts that `keys` keys, anywhere in a sequence, can lie in.
inline int64_t most_parts(int64_t keys) {
  int64_t most = 0;
  for (const int64_t n : {int64_t{8192}, int64_t{32768}, keys}) {
    const int64_t parts = (n < keys ? n : keys) / decode_part_keys(n < keys ? n : keys) + 2;
    if (parts > most) most = parts;
  }
  return most;
}

// Floats of a partial result of all rows of a part and key head; as on the CPU.
HEDDLE_BOTH inline float* partial_of(const DecodeLaunch& d, int64_t batch, int64_t part, int64_t head, int64_t row) {
  const AttentionProblem& p = d.a.problem;
  return d.a.partial + ((batch * d.max_parts + part) * p.key_heads + head) * d.a.partial_floats + row * decode_row_floats(p);
}

// What one row of the tile is.
struct DecodeRow {
  int64_t lo, hi;  // keys that it sees
  int64_t own;     // key of its token
  int32_t head;
  bool exists;
};
__device__ inline DecodeRow decode_row(const AttentionProblem& p, int64_t length, int64_t key_head, int64_t row) {
  const int64_t group = p.group();
  DecodeRow r;
  r.exists = row < p.queries * group;
  const int64_t i = r.exists ? row / group : 0;
  r.head = static_cast<int32_t>(key_head * group + (r.exists ? row % group : 0));
  r.own = length - p.queries + i;
  r.lo = first_seen(p, r.own);
  r.hi = r.exists ? r.own + 1 : r.lo;
  return r;
}
__device__ inline int64_t query_start(const AttentionProblem& p, int64_t batch, int64_t row) {
  return batch * p.query_stride[0] + row / p.group() * p.query_stride[1];
}
// `distance`: of the key from the row's own token.
__device__ inline float decode_logit(const AttentionProblem& p, int32_t head, int64_t distance, float product) {
  float z = product * p.scale;
  if (p.softcap > 0.0f) z = tanhf(z / p.softcap) * p.softcap;
  if (p.alibi) z -= p.alibi[head] * static_cast<float>(distance);
  return z;
}

// One row over the keys of one warp, element by element: for rows in whose sums something was not finite. Weights of 0
// bring nothing in. `out`: maximum, total, sums.
template <CacheType T>
__device__ inline void careful_row(const DecodeLaunch& d, int64_t batch, int64_t key_head, int64_t row_index, int64_t begin,
                                   int64_t end, int64_t first_tile, int32_t column, int32_t columns, bool formed,
                                   float unit, float* out) {
  const AttentionProblem& p = d.a.problem;
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  const DecodeRow row = decode_row(p, d.a.lengths[batch], key_head, row_index);
  const int32_t* table = d.a.table + batch * d.a.table_stride;
  const int64_t start = d.a.starts[batch];
  const int64_t q = query_start(p, batch, row_index) + row.head * p.query_stride[2];
  float m = kNegInf, total = 0.0f;
#pragma unroll 1
  for (int32_t c = lane; c < columns; c += kWarp) out[2 + c] = 0.0f;
#pragma unroll 1
  for (int64_t tile = first_tile; tile < end; tile += kDecodeWarps * kDecodeTile) {
    if (tile + kDecodeTile <= begin) continue;
    const int64_t key = tile + lane;
    const bool seen = key >= row.lo && key < row.hi;
    float z = kNegInf, scale = 1.0f;
    if (seen) {
      const PageSlot at = page_slot(d.pools, table, start, key);
      float product = 0.0f;
#pragma unroll 1
      for (int32_t e = 0; e < p.head_dim; ++e) {
        product = fmaf(load_as_float(p.query, p.type, q + e), key_element<T>(d.pools, at.page, key_head, at.slot, e), product);
      }
      if (cache_is_integer(T)) {
        const int64_t scale_at = (at.page * p.key_heads + key_head) * d.pools.slots() + at.slot;
        product *= d.pools.key_scales[scale_at];
        scale = d.pools.value_scales[scale_at];
      }
      z = formed ? decode_logit(p, row.head, row.own - key, product) : product;
    }
    // A negative scale without other transforms forms its logits, so that unit is positive.
    const float top = fmaxf(m, warp_max(z != z ? kNegInf : z) * unit), base = top == kNegInf ? 0.0f : top;
    const float keep = m == kNegInf ? 0.0f : exp2f(m - base);
    float weight = z == kNegInf ? 0.0f : exp2f(fmaf(z, unit, -base));
    m = top;
    total = total * keep + warp_sum(weight);
    if (weight != 0.0f) weight *= scale;
#pragma unroll 1
    for (int32_t c = lane; c < columns; c += kWarp) out[2 + c] *= keep;
#pragma unroll 1
    for (int j = 0; j < kDecodeTile; ++j) {
      const float w = __shfl_sync(kFullMask, weight, j);
      if (w == 0.0f) continue;
      const PageSlot at = page_slot(d.pools, table, start, tile + j);
#pragma unroll 1
      for (int32_t c = lane; c < columns; c += kWarp) {
        out[2 + c] = fmaf(w, value_element<T>(d.pools, at.page, key_head, at.slot, column + c), out[2 + c]);
      }
    }
  }
  if (lane == 0) {
    out[0] = m;
    out[1] = total;
  }
}

}  // namespace heddle
