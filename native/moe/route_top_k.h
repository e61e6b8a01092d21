// Token-choice routing: scores, optional bias and group limit, top-k, weights.
//
// Definition (per token; l = logits in fp32, NaN counts as -Inf, masked experts do not exist):
//   s = softmax(l) | sigmoid(l) | sqrt(softplus(l))           c = s + selection_bias
//   groups: score = max or sum of the top 2 of c; only the best `group_keep` groups stay
//   ids = top-k of c, ties to the lower id
//   w = s[ids] or softmax(l[ids]);  normalize: w /= max(sum(w) + epsilon, floor);  w *= scale
// A row whose largest logit is +Inf shares probability 1 equally among its +Inf experts; a row of only -Inf is
// uniform. With fewer than k experts left, the surplus ids are -1 with weight 0. A sum of 0 gives weights 0.
//
// Precision: everything in fp32. Where c is a monotone function of l (no bias, no top-2 groups) selection
// compares the logits themselves, so saturated scores never create false ties. Relative error of a weight
// against float64: <= 1e-6, for softmax plus 2^-24 (max(l) - l): the difference is rounded before the exponential.
// Each row is computed alone: bitwise the same in any batch and on any threads.
//
// Cost: reads 4 (or 2) E bytes and writes 8 k bytes per token. Selection keeps the order-preserving integer
// image of c in registers for E <= 64 and removes the maximum k times (23 cycles of latency each, hidden by
// running ahead into the next row); removing *all* equal keys at once takes the index off the critical path.
// Larger E keeps one maximum per lane and rescans only the winner's column of E/W keys.
// With `normalize` and no epsilon the full softmax is never needed: only k exponentials are taken.
#pragma once
#include "core/dtype.h"
#include "simd/dispatch.h"

namespace heddle {

enum class RouterScore : int32_t { kSoftmax = 0, kSigmoid = 1, kSqrtSoftplus = 2 };

struct RouterOptions {
  RouterScore score = RouterScore::kSoftmax;
  bool over_selected = false;  // softmax over the selected logits only
  bool normalize = false;
  float epsilon = 0.0f;  // added to the sum
  float floor = 0.0f;    // lower bound of the sum
  float scale = 1.0f;
};

struct RouteTopKArgs {
  const void* logits = nullptr;  // [tokens, experts], fp32 | bf16 | fp16
  DType type = DType::kFloat32;
  int64_t tokens = 0;
  int32_t experts = 0, k = 0;
  RouterOptions router;
  const float* selection_bias = nullptr;  // [experts]
  int32_t group_count = 0, group_keep = 0;
  bool group_top2 = false;
  const uint8_t* mask = nullptr;  // 1 = may be selected; [experts] (mask_stride 0) or [tokens, experts]
  int64_t mask_stride = 0;
  const int32_t* given = nullptr;  // [tokens, k]: routing replay, only the weights are computed
  int32_t* indices = nullptr;      // [tokens, k]
  float* weights = nullptr;        // [tokens, k]
};

constexpr int32_t kMaxExperts = 4096;

// kOk, kCancelled, or bad_value(route) for a given id outside [-1, experts).
HEDDLE_DECLARE_OP(route_top_k, RouteTopKArgs)

}  // namespace heddle
