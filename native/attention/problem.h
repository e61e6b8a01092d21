// What every attention op is given, and how its work is cut into units. See attention.h for the definition.
#pragma once
#include <atomic>
#include <cstdint>

#include "core/dtype.h"
#include "core/workspace.h"

namespace heddle {

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

  int64_t sequences() const { return query_offsets ? segments : batch; }
  int32_t group() const { return key_heads ? query_heads / key_heads : 0; }
};

// One sequence: a batch entry, or a segment of the packed batch.
struct Sequence {
  int64_t batch, query_begin, queries, key_begin, keys;
};
Sequence sequence_of(const AttentionProblem& p, int64_t index);

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
