// Gradients of attention() by q, k, v and bias, from the output and the log-sum-exp that the forward saved.
//
// Definition (logits z, weights p = exp(z - lse), both as in attention.h; upstream g):
//   delta_i = g_i.o_i;  dz_ij = p_ij (g_i.v_j - delta_i);  dbias = dz, summed over the dims it is broadcast along
//   ds = scale (1 - tanh^2) dz;  dq_i = sum_j ds_ij k_j;  dk_j = sum_i ds_ij q_i;  dv_j = sum_i p_ij g_i
// Empty rows give no gradient, or g / keys to every v of their sequence where they are the mean. Sinks, slopes and
// masks are constants.
//
// Precision: fp32 sums for every type; dq adds one chain per 128 keys, dk and dv one chain per block of 112 rows.
// Norm-wise error against float64, given the same output and log-sum-exp: 2e-5 for fp32; bf16 and fp16 one rounding.
//
// Determinism: a unit is one (sequence, key head). It alone writes its dk and dv, and adds to its dq panel after panel
// in key order: no atomics, no sum that depends on threads or on other sequences. Where units are few, the panels of a
// unit run side by side, each a block of rows behind the one before it: the same sums in the same order. Units that
// share a broadcast bias run one after the other, on one thread.
//
// Design: five products, of which two are recomputed forward products. Of a panel of keys K^T, V^T, K and the sums of
// dk and dv stay in L2; blocks of rows pass over it. A cell is a block's rows by 32 keys: P and g v of all its groups of
// rows while K^T and V^T of these keys are in L1, weights and slopes tile by tile, then dv and dk of the same keys from
// the cell; after 4 cells dq. So P never leaves L1 and L2, is needed in one layout ([row][key]: dq broadcasts along a
// row's keys, dk and dv along a key's rows), and neither it nor q nor g is transposed. Rows are packed once.
//
// Floor, in cycles per 16 elements of P at head size 128 on AVX-512, 2 FMA a cycle: products 320; exp and slopes 7
// (14 instructions on 2 ports); sums through memory once per 112 rows and 128 keys 3; what the tiles of 14 rows and 32 keys
// compute beyond a causal triangle of 2048 rows 5: 95 % of the peak. Measured (Emerald Rapids, one core, fp32, 8 heads):
// products 89 to 91 % of the peak in each of the five kinds, all of it 78 %, of which
//   exp and slopes 2.5 %; reading q, k, v, g, o and writing dq, dk, dv once 12 %.
// The latter is rows of 512 bytes that lie 4 KiB apart: with one head, contiguous, it is 7.5 %; huge pages take a quarter off
// the reading.
// Prefetching does not help, in bursts or one line every 2, 4 or 8 steps of a tile: what the packing gains the products
// lose. Nor do panels of 512 keys, chains of 256 keys for dq, or fetching a tile's next rows into L1.
#pragma once
#include "attention/problem.h"
#include "simd/dispatch.h"

namespace heddle {

// Keys of a panel: K twice, V and both sums take at most 1 MiB of L2. It depends on the head dims alone.
inline int backward_panel_keys(int dim, int value_dim) {
  const int n = (1024 << 10) / 4 / (3 * dim + 2 * value_dim) / 128 * 128;
  return n < 128 ? 128 : n > 512 ? 512 : n;
}

// Whether a unit's rows of q and of the upstream stay packed from the first panel to the last.
inline bool keeps_rows(const AttentionProblem& p, int64_t rows, int64_t keys) {
  return rows <= 16384 && keys > backward_panel_keys(p.head_dim, p.value_dim);
}

// Log-sum-exp and delta of a unit's rows in whole cache lines, their sums, and themselves packed in whole blocks.
inline int64_t backward_row_floats(const AttentionProblem& p, int64_t rows, int64_t keys) {
  const int64_t qk = (p.head_dim + 31) / 32 * 32, vo = (p.value_dim + 31) / 32 * 32;
  return (rows + 15) / 16 * 32 + rows * qk + (keeps_rows(p, rows, keys) ? (rows + 111) * (qk + vo) : 0);
}

// The row blocks that each panel of each unit is done with. Code outside the vector regions.
class PanelProgress {
 public:
  PanelProgress() = default;
  PanelProgress(const PanelProgress&) = delete;
  PanelProgress& operator=(const PanelProgress&) = delete;
  ~PanelProgress();
  bool reset(int64_t panels);
  void set(int64_t panel, int64_t blocks);
  // Waits for `blocks` of a panel that a thread has taken; false when the job is cancelled meanwhile.
  bool wait(int64_t panel, int64_t blocks, const Exec& exec) const;

 private:
  std::atomic<int64_t>* done_ = nullptr;
};

// How the work is handed to threads: in units, or, where these are few, in panels of units. The results do not depend
// on it.
struct BackwardPlan {
  bool join_batch = false, join_heads = false;  // units that add to the same bias gradient are one after the other
  int64_t panels = 0;                           // of a unit, when handed out one by one
  int64_t unit_floats = 0;
  AlignedBuffer<float> rows;                    // of all units, when panels share them
  PanelProgress progress;
};

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
  BackwardPlan* plan = nullptr;  // set by attention_backward()

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
Status attention_backward(const AttentionBackwardArgs& args, const Exec& exec);

HEDDLE_DECLARE_OP(attention_backward_units, AttentionBackwardArgs)

}  // namespace heddle
