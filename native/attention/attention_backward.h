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
};

// kOk, kCancelled or kNoMemory.
HEDDLE_DECLARE_OP(attention_backward, AttentionBackwardArgs)

}  // namespace heddle
