// Backward of the weights of route_top_k by its logits; the selection is held fixed.
//
// Definition (per token; ids, s, w as in route_top_k.h; g = gradient by w, ignored beside an id of -1):
//   normalize: D = max(sum(s[ids]) + epsilon, floor);  ds = scale / D (g - sum(g s) / D), or scale g / D where the
//   floor decided D (it has no gradient); otherwise ds = scale g. D = 0 gives zeros.
//   softmax: dl[e] = s[e] (ds[e] - sum(ds s));  sigmoid: ds s (1 - s);  sqrt-softplus: ds sigmoid(l) / (2 s)
//   softmax over the selected (or normalised without epsilon and floor, which is the same): dl = scale w (g - sum(g w))
// Ids that occur twice add up. Selected logits that are all -Inf get no gradient.
//
// Precision: exponentials in fp32, the k selected terms in double; the sum over all experts keeps the unselected
// ones apart, so that 1 - s of a dominating expert does not cancel. Relative error against float64: <= 1e-6.
// Cost: reads 4 (or 2) E bytes and writes 4 E bytes a token.
#pragma once
#include "moe/route_top_k.h"

namespace heddle {

struct RouteBackwardArgs {
  const float* grad_weights = nullptr;  // [tokens, k]
  const void* logits = nullptr;         // [tokens, experts], fp32 | bf16 | fp16
  DType type = DType::kFloat32;
  int64_t tokens = 0;
  int32_t experts = 0, k = 0;
  RouterOptions router;
  const uint8_t* mask = nullptr;  // as in RouteTopKArgs
  int64_t mask_stride = 0;
  const int32_t* indices = nullptr;  // [tokens, k]
  float* grad_logits = nullptr;      // [tokens, experts]
};

// kOk, kCancelled, or bad_value(route) for an id outside [-1, experts).
HEDDLE_DECLARE_OP(route_top_k_backward, RouteBackwardArgs)

}  // namespace heddle
