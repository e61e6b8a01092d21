// Gradients of attention() by q, k, v and bias, from the output and the log-sum-exp that the forward saved.
//
// Definition (logits z, weights p = exp(z - lse), both as in attention.h; upstream g):
//   delta_i = g_i.o_i;  dz_ij = p_ij (g_i.v_j - delta_i);  dbias = dz, summed over the dims it is broadcast along
//   ds = scale (1 - tanh^2) dz;  dq_i = sum_j ds_ij k_j;  dk_j = sum_i ds_ij q_i;  dv_j = sum_i p_ij g_i
// Empty rows give no gradient, or g / keys to every v of their sequence where they are the mean. Sinks, slopes and
// masks are constants.
//
// Precision: fp32 sums for every type; dq adds one chain per key panel, dk and dv one chain per row block. Norm-wise
// error against float64, given the same output and log-sum-exp: 2e-5 for fp32; bf16 and fp16 one rounding.
//
// Determinism: a unit is one (sequence, key head). It alone writes its dk and dv, and adds to its dq panel after panel
// in key order: no atomics, no sum that depends on threads or on other sequences. Units that share a broadcast bias run
// one after the other. The price: one sequence with one key head uses one thread.
//
// Design: five products per tile, of which two are recomputed forward products. P and dS of 4 R rows x one panel stay
// in L2, so that dk and dv take chains of 4 R terms before their sums go through memory.
#pragma once
#include "attention/problem.h"
#include "simd/dispatch.h"

namespace heddle {

struct AttentionBackwardArgs {
  AttentionProblem problem;
  const void *upstream = nullptr, *output = nullptr;  // [batch, queries, query_heads, value_dim], in the type of q
  const float* log_sum_exp = nullptr;                 // [batch, query_heads, queries]
  void *query_grad = nullptr, *key_grad = nullptr, *value_grad = nullptr;  // contiguous, in the type of q
  float* bias_grad = nullptr;                         // contiguous, zeroed, with the strides of the bias
  int32_t first_head = 0, heads = 0;  // of this problem in upstream and gradients, which have `heads`; 0 = all
  // Of the prefix: its upstream [batch, query_heads, value_dim] for the sum of its outputs times prefix_weight, its
  // results, and its gradients [batch, inner, heads, dim].
  const void* prefix_upstream = nullptr;
  float prefix_weight = 1.0f;
  const float *prefix_output = nullptr, *prefix_lse = nullptr;
  float *prefix_query_grad = nullptr, *prefix_key_grad = nullptr, *prefix_value_grad = nullptr;

  // First element of a row in a contiguous tensor of `dim` per query head; of the prefix: in [batch, inner, heads, dim].
  HEDDLE_BOTH int64_t row_at(const Sequence& s, int64_t position, int64_t head, int64_t dim) const {
    const int64_t token = problem.is_prefix(position) ? problem.prefix_at(s, 1, 0) : problem.query_token_at(s, position);
    return (token * (heads ? heads : problem.query_heads) + first_head + head) * dim;
  }
  // The same per key head.
  HEDDLE_BOTH int64_t key_row_at(const Sequence& s, int64_t position, int64_t key_head, int64_t dim) const {
    const int64_t group = problem.group() ? problem.group() : 1;
    const int64_t token = problem.is_prefix(position) ? problem.prefix_at(s, 1, 0) : problem.key_token_at(s, position);
    return (token * (heads ? heads / group : problem.key_heads) + first_head / group + key_head) * dim;
  }
  // Of a row in the upstream, counted from the patches' also for the prefix.
  HEDDLE_BOTH int64_t upstream_at(const Sequence& s, int64_t position, int64_t head) const {
    if (!problem.is_prefix(position)) return row_at(s, position, head, problem.value_dim);
    const int64_t between = (static_cast<const char*>(prefix_upstream) - static_cast<const char*>(upstream)) /
                            (problem.type == DType::kFloat32 ? 4 : 2);
    return between + (s.batch * problem.query_heads + head) * problem.value_dim;
  }
};

// kOk, kCancelled or kNoMemory.
HEDDLE_DECLARE_OP(attention_backward, AttentionBackwardArgs)

}  // namespace heddle
