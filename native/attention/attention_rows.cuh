// What the attention kernels share on the device: which rows a block computes, what they see, and their logits. The
// counterpart of logits-inl.h, which has the definitions.
#pragma once
#include "attention/problem.h"
#include "cuda/warp.cuh"

namespace heddle {

constexpr float kMinusInf = -HUGE_VALF;
constexpr float kLog2OfE = 1.44269504f, kLnOf2 = 0.693147181f;

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

__device__ inline Sequence device_sequence(const AttentionProblem& p, int64_t index) {
  Sequence s;
  if (!p.query_offsets) {
    s.batch = index / p.inner;
    s.inner = index % p.inner;
    s.query_begin = s.key_begin = 0;
    s.queries = p.queries;
    s.keys = p.keys;
    return s;
  }
  s.batch = p.batch_segments ? index / p.batch_segments : 0;
  s.inner = 0;
  s.query_begin = p.query_offsets[index];
  s.queries = p.query_offsets[index + 1] - s.query_begin;
  s.key_begin = p.key_offsets[index];
  s.keys = p.key_offsets[index + 1] - s.key_begin;
  return s;
}

// False for the whole block when there is nothing to do.
__device__ inline bool find_rows(const AttentionProblem& p, int64_t rows, int64_t block, int64_t key_head, BlockRows* out) {
  const int64_t group = p.group();
  int64_t index, at;
  if (p.query_offsets) {
    int64_t lo = 0, hi = p.segments;  // the last sequence that begins at or before the block
    while (hi - lo > 1) {
      const int64_t mid = (lo + hi) / 2;
      if (p.query_offsets[mid] * group / rows + mid <= block) lo = mid;
      else hi = mid;
    }
    index = lo;
    at = block - (p.query_offsets[lo] * group / rows + lo);
  } else {
    const int64_t each = ceil_div(p.queries * group, rows);
    index = block / each;
    at = block % each;
  }
  out->sequence = device_sequence(p, index);
  out->key_head = key_head;
  out->count = out->sequence.queries * group;
  out->first = at * rows;
  return out->first < out->count;
}

struct DeviceRange {
  int64_t lo, hi;
};
// Keys that causal and window allow to query position i.
__device__ inline DeviceRange device_range(const AttentionProblem& p, const Sequence& s, int64_t i) {
  if (p.step > 1) {
    const int64_t at = i / p.step * p.step, left = p.left * p.step, right = (p.right + 1) * p.step;
    return {left < 0 || left > at ? 0 : at - left, right <= 0 || at + right > s.keys ? s.keys : at + right};
  }
  const int64_t diagonal = i + s.keys - s.queries;
  int64_t lo = p.left < 0 || diagonal < p.left ? 0 : diagonal - p.left;
  int64_t hi = p.right < 0 || diagonal + p.right + 1 > s.keys ? s.keys : diagonal + p.right + 1;
  if (hi < 0) hi = 0;
  if (lo > hi) lo = hi;
  return {lo, hi};
}

// Keys that any of the positions [first, last] may see.
__device__ inline DeviceRange union_range(const AttentionProblem& p, const Sequence& s, int64_t first, int64_t last) {
  if (p.query_ids) return {0, s.keys};
  return {device_range(p, s, first).lo, device_range(p, s, last).hi};
}

// Whether anything but causal, window and scale forms the logits.
__host__ __device__ inline bool forms_logits(const AttentionProblem& p) {
  return p.softcap > 0.0f || p.bias || p.alibi || p.mask || p.block_mask || p.query_ids || !(p.scale > 0.0f);
}

__device__ inline float load_any(const void* p, DType type, int64_t i) {
  return type == DType::kFloat32    ? load_as_float<DType::kFloat32>(p, i)
         : type == DType::kBFloat16 ? load_as_float<DType::kBFloat16>(p, i)
                                    : load_as_float<DType::kFloat16>(p, i);
}

__device__ inline bool sees(const AttentionProblem& p, const Sequence& s, int64_t position, int64_t head,
                            const DeviceRange& range, int64_t key) {
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
  if (p.bias) z += load_any(p.bias, p.bias_type, p.bias_at(s, position, head, key));
  if (p.alibi) z -= p.alibi[head] * fabsf(static_cast<float>(key - (position + s.keys - s.queries)));
  return z;
}

}  // namespace heddle
