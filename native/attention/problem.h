// What every attention op is given, and how its work is cut into units. See attention.h for the definition.
#pragma once
#include <atomic>
#include <cstdint>

#include "core/dtype.h"
#include "core/workspace.h"

namespace heddle {

// One sequence: one of the `inner` of a batch entry, or a segment of the packed batch.
struct Sequence {
  int64_t batch, query_begin, queries, key_begin, keys;
  int64_t inner = 0;
};

// A vector in front of every sequence of a batch entry, the class token: position 0 as query, key and value.
struct Prefix {
  bool present = false;
  int64_t query = 0, key = 0, value = 0;  // first element, counted from q, k and v
  int64_t query_stride[2] = {}, key_stride[2] = {}, value_stride[2] = {};  // batch, head
};

struct AttentionProblem {
  int64_t batch = 0, queries = 0, keys = 0;  // of the whole tensors; with segments, of the packed batch
  int32_t query_heads = 0, key_heads = 0, head_dim = 0, value_dim = 0;
  DType type = DType::kFloat32;
  const void *query = nullptr, *key = nullptr, *value = nullptr;
  int64_t query_stride[4] = {}, key_stride[4] = {}, value_stride[4] = {};  // batch, sequence, head, element
  const void* bias = nullptr;
  DType bias_type = DType::kFloat32;
  int64_t bias_stride[3] = {}, mask_stride[3] = {}, block_stride[3] = {};  // batch, head, query; 0 = broadcast
  const float *alibi = nullptr, *sinks = nullptr;                          // [query_heads]
  const uint8_t *mask = nullptr, *block_mask = nullptr;
  int64_t block_query = 1, block_key = 1;
  const int32_t *query_ids = nullptr, *key_ids = nullptr;
  int64_t query_id_stride = 0, key_id_stride = 0;
  const int32_t *query_offsets = nullptr, *key_offsets = nullptr;  // [segments + 1]
  int64_t segments = 0;
  int64_t left = -1, right = -1;
  float scale = 1.0f, softcap = 0.0f;
  bool uniform_empty = false;
  int64_t output_stride[3] = {}, lse_stride[3] = {};  // batch, position, head; elements of the output are contiguous
  int64_t query_token[2] = {}, key_token[2] = {};     // batch, position: rows of contiguous gradients

  // Factorized attention: several sequences in a batch entry, positions through a list, a common prefix.
  int64_t inner = 1;
  struct {
    int64_t query = 0, key = 0, value = 0, bias = 0, mask = 0, output = 0, lse = 0, token = 0;
  } inner_stride;
  int64_t step = 1;                // positions that causal and window count as one
  int64_t batch_segments = 0;      // segments of a batch entry, 0 = all
  const int32_t* order = nullptr;  // position in the packed batch of each place in a segment
  Prefix prefix;
  int64_t longest = 0;  // bound of the queries and keys of a segment, 0 = not known

  HEDDLE_BOTH int64_t sequences() const { return query_offsets ? segments : batch * inner; }
  HEDDLE_BOTH int32_t group() const { return key_heads ? query_heads / key_heads : 0; }
  HEDDLE_BOTH int64_t place(int64_t i) const { return order ? order[i] : i; }
  HEDDLE_BOTH bool is_prefix(int64_t i) const { return prefix.present && i == 0; }

  // First element of position i of a sequence.
  HEDDLE_BOTH int64_t query_at(const Sequence& s, int64_t i, int64_t head) const {
    if (is_prefix(i)) return prefix.query + s.batch * prefix.query_stride[0] + head * prefix.query_stride[1];
    return s.batch * query_stride[0] + s.inner * inner_stride.query +
           place(s.query_begin + i - prefix.present) * query_stride[1] + head * query_stride[2];
  }
  HEDDLE_BOTH int64_t key_at(const Sequence& s, int64_t i, int64_t head) const {
    if (is_prefix(i)) return prefix.key + s.batch * prefix.key_stride[0] + head * prefix.key_stride[1];
    return s.batch * key_stride[0] + s.inner * inner_stride.key +
           place(s.key_begin + i - prefix.present) * key_stride[1] + head * key_stride[2];
  }
  HEDDLE_BOTH int64_t value_at(const Sequence& s, int64_t i, int64_t head) const {
    if (is_prefix(i)) return prefix.value + s.batch * prefix.value_stride[0] + head * prefix.value_stride[1];
    return s.batch * value_stride[0] + s.inner * inner_stride.value +
           place(s.key_begin + i - prefix.present) * value_stride[1] + head * value_stride[2];
  }
  // Not for the prefix: its results are apart.
  HEDDLE_BOTH int64_t output_at(const Sequence& s, int64_t i, int64_t head) const {
    return s.batch * output_stride[0] + s.inner * inner_stride.output +
           place(s.query_begin + i - prefix.present) * output_stride[1] + head * output_stride[2];
  }
  HEDDLE_BOTH int64_t lse_at(const Sequence& s, int64_t i, int64_t head) const {
    return s.batch * lse_stride[0] + s.inner * inner_stride.lse +
           place(s.query_begin + i - prefix.present) * lse_stride[1] + head * lse_stride[2];
  }
  HEDDLE_BOTH int64_t query_token_at(const Sequence& s, int64_t i) const {
    return s.batch * query_token[0] + s.inner * inner_stride.token +
           place(s.query_begin + i - prefix.present) * query_token[1];
  }
  HEDDLE_BOTH int64_t key_token_at(const Sequence& s, int64_t i) const {
    return s.batch * key_token[0] + s.inner * inner_stride.token +
           place(s.key_begin + i - prefix.present) * key_token[1];
  }
  // Row of a prefix in [batch, inner, heads].
  HEDDLE_BOTH int64_t prefix_at(const Sequence& s, int64_t heads, int64_t head) const {
    return (s.batch * inner + s.inner) * heads + head;
  }
  HEDDLE_BOTH int64_t bias_at(const Sequence& s, int64_t i, int64_t head, int64_t key) const {
    return s.batch * bias_stride[0] + s.inner * inner_stride.bias + head * bias_stride[1] +
           (s.query_begin + i) * bias_stride[2] + s.key_begin + key;
  }
  // Results contiguous as [batch, queries, heads, value dim] and [batch, heads, queries].
  void set_contiguous_results() {
    output_stride[2] = value_dim;
    output_stride[1] = int64_t{query_heads} * value_dim;
    output_stride[0] = queries * output_stride[1];
    lse_stride[0] = query_heads * queries;
    lse_stride[1] = 1;
    lse_stride[2] = queries;
    query_token[0] = queries;
    key_token[0] = keys;
    query_token[1] = key_token[1] = 1;
  }
};

HEDDLE_BOTH inline Sequence sequence_of(const AttentionProblem& p, int64_t index) {
  if (!p.query_offsets) return {index / p.inner, 0, p.queries, 0, p.keys, index % p.inner};
  const int64_t q = p.query_offsets[index], k = p.key_offsets[index];
  const int64_t batch = p.batch_segments ? index / p.batch_segments : 0;
  return {batch, q, p.query_offsets[index + 1] - q, k, p.key_offsets[index + 1] - k};
}

// Keys [lo, hi) that causal and window allow to query position i.
struct KeyRange {
  int64_t lo, hi;
};
HEDDLE_BOTH inline KeyRange key_range(const AttentionProblem& p, const Sequence& s, int64_t i) {
  if (p.step > 1) {  // keys == queries
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

// Whether anything but causal, window and scale forms the logits.
HEDDLE_BOTH inline bool has_transform(const AttentionProblem& p) {
  return p.softcap > 0.0f || p.bias || p.alibi || p.mask || p.block_mask || p.query_ids || !(p.scale > 0.0f);
}

// Units of work: (sequence, key head, block of query positions). How they are cut depends on the threads; the
// result does not, because no sum crosses a unit.
struct AttentionPlan {
  int64_t block = 0;  // query positions of a unit
  int64_t units = 0, grain = 1;
  AlignedBuffer<int64_t> first;  // first unit of each segment, where lengths differ
};
struct AttentionUnit {
  Sequence sequence;
  int64_t key_head, begin, end;  // query positions inside the sequence
};
bool make_plan(const AttentionProblem& p, int threads, AttentionPlan* plan);
AttentionUnit unit_of(const AttentionProblem& p, const AttentionPlan& plan, int64_t index);

// Set by any thread; read after the loop. Its code, like attention_scratch, is outside the vector regions.
class Failure {
 public:
  void set();
  bool get() const;

 private:
  std::atomic<int32_t> failed_{0};
};
void* attention_scratch(int64_t bytes);

}  // namespace heddle
