// What the attention kernels share on the device: which rows a block computes, what they see, and their logits. The
// counterpart of logits-inl.h, which has the definitions.
#pragma once
#include "attention/problem.h"
#include "cuda/warp.cuh"

namespace heddle {

constexpr float kLog2OfE = 1.44269504f, kLnOf2 = 0.693147181f;

// In place of a line's first element where there is no line. Not -1: a prefix may lie below the tensor it is counted from.
constexpr int64_t kNoLine = INT64_MIN;

// Row r of a (sequence, key head) is query position r / group of head key_head * group + r % group: a block serves all
// heads that share its keys, so grouped queries read them once, and decoding fills its rows with heads.
struct BlockRows {
  Sequence sequence;
  int64_t key_head, first, count;  // rows [first, first + block) of `count`
};

// Blocks of `rows` rows that cover all sequences. Ragged sequences: sequence s begins at block
// offset[s] * group / rows + s, which leaves room for all of it, and a few blocks are empty.
__host__ inline int64_t row_blocks(const AttentionProblem& p, int64_t rows) {
  if (p.query_offsets) return p.queries * p.group() / rows + p.segments;
  return p.sequences() * ceil_div(p.queries * p.group(), rows);
}
// The same for blocks of keys.
__host__ inline int64_t key_blocks(const AttentionProblem& p, int64_t keys) {
  if (p.key_offsets) return p.keys / keys + p.segments;
  return p.sequences() * ceil_div(p.keys, keys);
}

// Sequence and place inside it, in blocks, of a block of `rows` rows; a position has `group` of them.
__device__ inline int64_t find_block(const AttentionProblem& p, const int32_t* offsets, int64_t positions, int64_t group,
                                     int64_t rows, int64_t block, Sequence* out) {
  if (!offsets) {
    const int64_t each = ceil_div(positions * group, rows);
    *out = sequence_of(p, block / each);
    return block % each;
  }
  int64_t lo = 0, hi = p.segments;  // the last sequence that begins at or before the block
  while (hi - lo > 1) {
    const int64_t mid = (lo + hi) / 2;
    if (offsets[mid] * group / rows + mid <= block) lo = mid;
    else hi = mid;
  }
  *out = sequence_of(p, lo);
  return block - (offsets[lo] * group / rows + lo);
}

// False for the whole block when there is nothing to do.
__device__ inline bool find_rows(const AttentionProblem& p, int64_t rows, int64_t block, int64_t key_head, BlockRows* out) {
  out->first = find_block(p, p.query_offsets, p.queries, p.group(), rows, block, &out->sequence) * rows;
  out->key_head = key_head;
  out->count = out->sequence.queries * p.group();
  return out->first < out->count;
}
// The same for keys: [first, first + block) of `count`.
__device__ inline bool find_keys(const AttentionProblem& p, int64_t keys, int64_t block, int64_t key_head, BlockRows* out) {
  out->first = find_block(p, p.key_offsets, p.keys, 1, keys, block, &out->sequence) * keys;
  out->key_head = key_head;
  out->count = out->sequence.keys;
  return out->first < out->count;
}

// Keys that any of the positions [first, last] may see.
__device__ inline KeyRange union_range(const AttentionProblem& p, const Sequence& s, int64_t first, int64_t last) {
  if (p.query_ids) return {0, s.keys};
  return {key_range(p, s, first).lo, key_range(p, s, last).hi};
}

__device__ inline bool sees(const AttentionProblem& p, const Sequence& s, int64_t position, int64_t head,
                            const KeyRange& range, int64_t key) {
  if (key >= s.keys) return false;
  bool seen = key >= range.lo && key < range.hi;
  const int64_t query = s.query_begin + position, at = s.key_begin + key;
  if (!seen && p.query_ids) {
    const int32_t id = p.query_ids[s.batch * p.query_id_stride + query];
    seen = id >= 0 && id == p.key_ids[s.batch * p.key_id_stride + at];
  }
  if (seen && p.mask) {
    seen = p.mask[s.batch * p.mask_stride[0] + s.inner * p.inner_stride.mask + head * p.mask_stride[1] +
                  query * p.mask_stride[2] + at] != 0;
  }
  if (seen && p.block_mask) {
    seen = p.block_mask[s.batch * p.block_stride[0] + head * p.block_stride[1] +
                        query / p.block_query * p.block_stride[2] + at / p.block_key] != 0;
  }
  return seen;
}

// Natural logit of a visible pair from its raw product; *slope is d logit / d (scale * product).
__device__ inline float logit_of(const AttentionProblem& p, const Sequence& s, int64_t position, int64_t head,
                                 int64_t key, float product, float* slope) {
  float z = product * p.scale;
  float d = 1.0f;
  if (p.softcap > 0.0f) {
    const float t = tanhf(z / p.softcap);
    z = t * p.softcap;
    d = 1.0f - t * t;
  }
  if (slope) *slope = d;
  if (p.bias) z += load_as_float(p.bias, p.bias_type, p.bias_at(s, position, head, key));
  if (p.alibi) z -= p.alibi[head] * fabsf(static_cast<float>(key - (position + s.keys - s.queries)));
  return z;
}

}  // namespace heddle
