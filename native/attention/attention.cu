// attention() on the device; definition and promises in attention.h.
//
// Two kernels, and one for sequences of up to 64 keys in attention_short.cuh. `exact` (attention_exact.cu) is the
// reference-grade one, for every type, head size and stride: fp32 throughout, a warp a row, 32 keys at a time with one
// key per lane for q.k and one value column per lane for p v. `matrix` (attention_matrix.cuh) serves bf16 and fp16 with
// head sizes up to 256 on the matrix cores: a warp has 16 rows, the block's four warps share tiles of keys and values in
// shared memory; values arrive while q.k runs and the next keys while p v runs. Logits, maxima and sums are fp32; p is
// rounded to the input type for its product (one rounding of 2^-9 in bf16, averaged over the keys).
//
// A row's bits depend on its own sequence alone: tiles start at fixed multiples inside it, and a tile that a row does
// not see multiplies its sums by 1 and adds 0. A tile with masked keys whose values are not finite takes a loop that
// skips weights of 0. Not measured on a GPU yet.
#include "attention/attention_launch.h"
#include "attention/attention_rows.cuh"

namespace heddle {

int64_t launch_attention_on(const AttentionArgs& a, heddle_cuda_job& job) {
  const AttentionProblem& p = a.problem;
  if (p.sequences() == 0 || p.queries == 0 || p.query_heads == 0) return kOk;
  if (row_blocks(p, kExactRows) > INT32_MAX || p.key_heads > 65535) return kUnsupported;
  if (all_short(p)) return launch_short_attention(a, job);
  // Ragged sequences of which some may be short: each kernel leaves the other's alone.
  if (p.query_offsets && serves_short(p)) {
    const int64_t status = launch_short_attention(a, job);
    if (status != kOk) return status;
  }
  if (p.type == DType::kFloat32 || attention_width(p) > 256) return launch_attention_exact(a, job);
  return p.type == DType::kBFloat16 ? launch_attention_bf16(a, job) : launch_attention_f16(a, job);
}

HEDDLE_CUDA_OP(attention, AttentionArgs) { return launch_attention_on(a, job); }

}  // namespace heddle
