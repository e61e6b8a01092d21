// attention_backward() on the device; definition and promises in attention_backward.h.
//
// A pre-pass takes each row's log-sum-exp and the sum of upstream times output. Then blocks that own keys compute dk and
// dv, and blocks that own queries compute dq: 7 products per pair where 5 would do, because q.k and g.v are formed twice.
// What saves them costs what heddle promises: dq by float atomics is not deterministic; waiting for a turn to add to it
// is waiting for other blocks; and partial sums of dq per block of keys grow with sequence squared. So each gradient has
// one block that writes it, its sums run in the order of the sequence, and a row's bits depend on its own sequence alone.
// Grouped queries: the block that owns a key adds over all heads of its group, row by row.
//
// `matrix` (attention_backward_matrix.cuh) serves bf16 and fp16 with head sizes up to 256; `exact` is the reference-grade
// one, fp32 throughout, for all else. Precision of `matrix`: products and sums in fp32; p and ds are rounded to the input
// type once for their second product, so fp16 wants upstream gradients whose ds stays between 6e-8 and 65504 (the loss
// scaling of mixed precision).
//
// Floor, of 14 pairs head_dim operations (7 with causal): on an H100 mma.sync reaches about 60 % of 990 TFLOP/s, so one
// head of 8,192 queries and keys with D = 128 takes 0.2 ms at best, 0.1 ms causal, against 0.01 ms for its memory.
// Next come shared memory and instruction slots. With 16 lines a warp, the first products take 0.75 ldmatrix.x4 per
// mma and the second 0.5; with 32 lines, where registers allow them (D <= 64), 0.5 and 0.25. Beside them stand about 8
// instructions per pair, which is why 2^x is the approximate one, a streamed line is found once a warp, and its row's
// terms are asked for a tile ahead. Not measured on a GPU yet.
#include "attention/attention_backward_launch.h"
#include "attention/attention_backward_rows.cuh"
#include "attention/attention_launch.h"

namespace heddle {
namespace {

constexpr int kTermRows = 8;

// A warp a row.
template <DType T>
__global__ void __launch_bounds__(kTermRows* kWarp) attention_backward_terms_kernel(AttentionBackwardArgs a, RowTerms* terms) {
  const AttentionProblem& p = a.problem;
  BlockRows rows;
  if (!find_rows(p, kTermRows, blockIdx.x, blockIdx.y, &rows)) return;
  const Sequence& s = rows.sequence;
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  const int64_t row = rows.first + threadIdx.x / kWarp, group = p.group();
  if (row >= rows.count) return;
  const int64_t position = row / group, head = rows.key_head * group + row % group;
  const bool prefix = p.is_prefix(position);
  const int64_t g = a.upstream_at(s, position, head);
  const int64_t o = prefix ? p.prefix_at(s, p.query_heads, head) * p.value_dim : p.output_at(s, position, head);
  float sum = 0.0f;
  for (int i = lane; i < p.value_dim; i += kWarp) {
    const float out = prefix ? a.prefix_output[o + i] : load_as_float<T>(a.output, o + i);
    sum = fmaf(load_as_float<T>(a.upstream, g + i), out, sum);
  }
  sum = warp_sum(sum);
  if (lane != 0) return;
  const float weight = prefix ? a.prefix_weight : 1.0f;
  const float lse = prefix ? a.prefix_lse[p.prefix_at(s, p.query_heads, head)] : a.log_sum_exp[p.lse_at(s, position, head)];
  RowTerms t = {lse * kLog2OfE - (prefix ? log2f(weight) : 0.0f), sum};
  if (lse == kNegInf) {
    t = p.uniform_empty ? RowTerms{kNegInf, weight / static_cast<float>(s.keys)} : RowTerms{-kNegInf, 0.0f};
  }
  terms[terms_at(p, s, position, head)] = t;
}

}  // namespace

int64_t launch_attention_backward_on(const AttentionBackwardArgs& args, heddle_cuda_job& job) {
  AttentionBackwardArgs a = args;
  const AttentionProblem& p = a.problem;
  const int64_t elements = a.bias_grad ? bias_elements(p) : 0;
  if (elements > 0) cudaMemsetAsync(a.bias_grad, 0, static_cast<size_t>(elements) * sizeof(float), job.stream);
  if (p.sequences() == 0 || p.key_heads == 0) return job.launched();
  if (row_blocks(p, kTermRows) > INT32_MAX || key_blocks(p, kTermRows) > INT32_MAX || p.key_heads > 65535) {
    return kUnsupported;
  }
  const int64_t count = terms_count(p);
  auto* terms = job.scratch<RowTerms>(count > 0 ? count : 1);
  if (!terms) return kNoMemory;
  int64_t status = kOk;
  if (count > 0) {
    const dim3 grid(static_cast<unsigned>(row_blocks(p, kTermRows)), static_cast<unsigned>(p.key_heads));
    status = with_float_type(p.type, [&](auto type) {
      HEDDLE_LAUNCH((attention_backward_terms_kernel<decltype(type)::value>), grid, dim3(kTermRows * kWarp), 0, job.stream,
                    a, terms);
      return job.launched();
    });
    if (status == kOk && elements > 0 && shares_bias(p)) {
      status = launch_backward_bias(a, terms, job);
      a.bias_grad = nullptr;
    }
  }
  if (status != kOk) return status;
  if (!backward_on_matrix(p)) return launch_backward_exact(a, terms, job);
  const int32_t width = attention_width(p);
  if (p.type == DType::kBFloat16) {
    if (width <= 64) return launch_backward_bf16(a, terms, job);
    return width <= 128 ? launch_backward_bf16_128(a, terms, job) : launch_backward_bf16_256(a, terms, job);
  }
  if (width <= 64) return launch_backward_f16(a, terms, job);
  return width <= 128 ? launch_backward_f16_128(a, terms, job) : launch_backward_f16_256(a, terms, job);
}

HEDDLE_CUDA_OP(attention_backward, AttentionBackwardArgs) { return launch_attention_backward_on(a, job); }

}  // namespace heddle
