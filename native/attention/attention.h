// Exact attention in blocks: output = softmax(logits) v, without a score matrix.
//
// Definition, for query i, key j of a sequence, head h (key head h / group):
//   z = scale q_i.k_j;  z = softcap tanh(z / softcap);  z += bias - alibi_h |i + keys - queries - j|
//   visible: -left <= j - (i + keys - queries) <= right, or equal block ids >= 0; and mask, and block mask
//   p = exp(z - max) over visible keys;  output = sum(p v) / (sum(p) + exp(sink - max));  lse = max + log(...)
// A row without visible keys (and without a sink) gives 0 or the mean of v, and lse = -Inf.
//
// Precision: q k in fp32 (one FMA chain in the order of d), softmax in fp32 with exp2 of relative error 2e-7, p v in
// fp32 (one chain per key panel, then one addition per panel). bf16 and fp16 are widened when packed. The scale enters
// as one FMA inside the exponent, so logits of +-1e4 lose nothing to a scaled copy of q. Bounds against float64
// (norm-wise): fp32 5e-6; bf16 and fp16 one rounding of the output.
//
// Batch invariance: key panels start at fixed multiples inside the sequence, a chain runs over a panel in key
// order, and a key that a row does not see contributes fma(0, v, sum) = sum. So neither the rows beside it, nor the
// block it falls in, nor skipped tiles change a row. Keys of weight 0 never bring in a non-finite v: a panel
// with a non-finite v takes a loop that skips them.
//
// Design. A unit is (sequence, key head, up to 1,024 rows = query positions x group). It packs one panel of keys and
// values (at most 512 KiB, L2) and runs all its rows over it, R at a time: scores R x panel stay in L1. Only
// sub-panels of 32 keys that some row of the R sees are touched. O accumulates in memory once per panel.
//
// Lessons, measured on a Xeon with two 512-bit ports:
// - Every 512-bit operation, max and exp included, takes one of the two FMA ports. At D = 64 sixteen scores cost 128 FMA
//   and the softmax 10 more operations; vreduceps and vscalefps (one operation each) replace seven of the portable exp2.
// - vdpbf16ps runs once in two cycles on Intel, half the products per cycle of fp32 FMA: a bf16 kernel on it was 1.8
//   times slower than widening, and rounds p to bf16 besides.
// - Panels of 256 to 512 keys are equally fast; 128 lose 4 %. Software prefetch of the next panel, in bursts or spread over
//   the micro-kernels, gained nothing.
// - Sequences that fit one panel have a way of their own: short-inl.h.
// - Packing decides short sequences: a switch on the element type per vector, and transposes through the stack because
//   a loop was not unrolled, cost a third of the time at S = 64.
#pragma once
#include "attention/problem.h"
#include "simd/dispatch.h"

namespace heddle {

struct AttentionArgs {
  AttentionProblem problem;
  void* output = nullptr;          // [batch, queries, query_heads, value_dim], in the type of q
  float* log_sum_exp = nullptr;    // [batch, query_heads, queries]
  float* prefix_output = nullptr;  // [batch, inner, query_heads, value_dim]
  float* prefix_lse = nullptr;     // [batch, inner, query_heads]
  const AttentionPlan* plan = nullptr;
};

// kOk, kCancelled or kNoMemory. attention() plans, attention_units() computes.
Status attention(const AttentionArgs& args, const Exec& exec);
HEDDLE_DECLARE_OP(attention_units, AttentionArgs)

}  // namespace heddle
