// Which sequences the kernel of attention_short.cuh serves, and its launch.
#include "attention/attention_rows.cuh"
#include "attention/attention_short_launch.h"

namespace heddle {
namespace {

bool aligned_output(const AttentionArgs& a) {
  const AttentionProblem& p = a.problem;
  const int64_t all = p.output_stride[0] | p.output_stride[1] | p.output_stride[2] | p.inner_stride.output | p.value_dim;
  return all % 8 == 0 && reinterpret_cast<uintptr_t>(a.output) % 16 == 0;
}

}  // namespace

bool serves_short(const AttentionProblem& p) {
  return p.type != DType::kFloat32 && p.head_dim <= 128 && p.value_dim <= 128;
}

bool all_short(const AttentionProblem& p) {
  const int64_t keys = p.query_offsets ? p.longest : p.keys;
  return serves_short(p) && keys <= kShortKeys && (keys > 0 || !p.query_offsets);
}

int64_t launch_short_attention(const AttentionArgs& a, heddle_cuda_job& job) {
  const AttentionProblem& p = a.problem;
  const bool ragged = p.query_offsets != nullptr;
  ShortShape shape;
  shape.search = ragged && !all_short(p);
  const int64_t most = p.group() * (ragged ? p.longest : p.queries);  // rows of a sequence, unless they are searched
  shape.each = shape.search ? 0 : ceil_div(most, kShortRows);
  shape.rows = static_cast<int32_t>(shape.search || most > kShortRows ? kShortRows : ceil_div(most, 16) * 16);
  shape.items = p.key_heads * (shape.search ? row_blocks(p, kShortRows) : p.sequences() * shape.each);
  shape.aligned = aligned_rows(p);
  shape.aligned_out = aligned_output(a);
  if (shape.items > INT32_MAX || p.queries * p.group() > UINT32_MAX - kShortRows) return kUnsupported;
  const int64_t keys = shape.search ? kShortKeys : ragged ? p.longest : p.keys;
  const bool narrow = p.head_dim <= 64 && p.value_dim <= 64;
  if (p.type == DType::kBFloat16) {
    return narrow ? launch_short_width<DType::kBFloat16, 64>(a, shape, keys, job)
                  : launch_short_width<DType::kBFloat16, 128>(a, shape, keys, job);
  }
  return narrow ? launch_short_width<DType::kFloat16, 64>(a, shape, keys, job)
                : launch_short_width<DType::kFloat16, 128>(a, shape, keys, job);
}

}  // namespace heddle
