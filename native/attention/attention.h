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
// Design. A unit is (sequence, key head, up to 2,048 rows = query positions x group: half of L2). It packs one panel of
// keys and values (at most 512 KiB, L2) and runs all its rows over it, R at a time; a sub-panel of 32 keys becomes
// weights while its R x 32 scores are in L1 (panel_rows-inl.h). Only sub-panels that some row of the R sees are touched. O
// accumulates in memory once per panel.
//
// Lessons, measured on a Xeon with two 512-bit ports:
// - The floor. Every 512-bit operation but loads, stores and register copies takes one of the two FMA ports. Sixteen
//   scores of a row cost 2 D FMA and 9 operations of softmax: 1 FMA for scale and shift, vreduceps, 5 FMA of the
//   polynomial, vscalefps (one slot each, measured; vrndscaleps takes two) and the sum. So at most 93.4 % of the FMA peak
//   at D = 64 and 96.6 % at D = 128; a max per score, which the lazy shift saves, is a tenth operation. Other slots are
//   free: the tiles load 0.57 vectors per FMA, and run at 99 % of the peak with K and V in L2.
// - Reached with S = 4096 on 2 threads: 85 to 87 % (D = 64) and 87 to 89 % (D = 128), causal 81 and 84 %. The rest, in % of
//   the time at D = 64: packing K and V 3, q 0.7, stores to the output 0.9, and between phases of a row group 3.
// - Packing waits for memory: rows lie a token apart, each on a page of its own, with 16 lines in flight. It is paid per
//   unit, so units of half of L2 (2,048 rows for 1,024) gained 1.5 %. Prefetching the next panel, a key per
//   sub-panel, halved the time of packing and lost as much in the tiles, whose prefetches wait for page walks. 2 MiB pages
//   under the scratch gained nothing.
// - Groups of equal height (1,024 rows as 74 groups of 13 and 14, not 73 of 14 and one of 2), no sums to clear, and ranges
//   of two rows instead of all where a panel is wholly visible: 1 %. Blocks of a multiple of 14 rows instead made the last
//   unit shorter and cost 2 threads more than they gained.
// - Units are ordered by block, all heads of the last block first: heads in turn left a long unit of a causal problem to
//   the end.
// - vdpbf16ps runs once in two cycles on Intel, half the products per cycle of fp32 FMA: a bf16 kernel on it was 1.8
//   times slower than widening, and rounds p to bf16 besides.
// - Panels of 256 to 512 keys are equally fast; 128 lose 4 %.
// - Sequences that fit one panel (short-inl.h) need no sums that are cleared, scaled and read back, no transposed q, and
//   one reciprocal per row: a vector division costs 16 cycles, and four of them per row were a fifth of S = 64.
//   Hot in cache that is 1.1 to 1.45 times faster; from memory the gain is what overlaps with the arithmetic. Prefetches
//   of the next unit in a burst per row group stalled as much as the loads they replace; one line per step of a score
//   tile does not.
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
