// Auxiliary losses of a router, with their gradient by the logits.
//
// Over the T' tokens that `mask` keeps, p[t] = the scores of token t (softmax, sigmoid, sqrt-softplus, or the given
// numbers themselves), divided by their sum where `normalize`:
//   load balancing   E sum_e f[e] mean_t p[t, e],  f[e] = count[e] / (k T')  or  count[e] / T'  (`per_token`)
//   z                mean_t logsumexp(l[t])^2
//   importance       var_e(I) / mean_e(I)^2,  I[e] = sum_t p[t, e]      population variance
//   load             var_e(count) / mean_e(count)^2                     population variance; no gradient
// each times `coefficient`. Counts are constants of the gradient. Ids of -1 are not counted. No token left, or a
// mean of 0, gives 0. Logits are read as in route_top_k.h (NaN as -Inf); given scores have NaN as 0.
//
// Precision: scores in fp32 (blocked sums), every sum over tokens in double by blocks of kLossRows tokens, the
// blocks added in order: relative error <= 1e-6 and nothing depends on the threads. One exception: the gradient of
// an importance that is balanced already is a difference of rounded sums, with a relative error of about 1e-9 over
// the coefficient of variation (4e-7 at 0.003, 3e-6 at 0.0003). Load balancing and importance share one backward: dL/dp is one vector c for all tokens, and dl = p (c - p.c) for softmax; the mean of c is
// taken off first, which changes nothing but the cancellation.
// Cost: one read of the logits forward; one more, and a write of 4 E bytes a token, for the gradient.
#pragma once
#include "moe/route_top_k.h"

namespace heddle {

constexpr int64_t kLossRows = 64;

enum class LossKind : int32_t { kLoadBalancing = 0, kZ = 1, kImportance = 2, kLoad = 3 };

struct RouterLossArgs {
  LossKind kind = LossKind::kLoadBalancing;
  const void* logits = nullptr;  // [tokens, experts], fp32 | bf16 | fp16; none for kLoad
  DType type = DType::kFloat32;
  int64_t tokens = 0;
  int32_t experts = 0;
  int32_t score = 0;  // RouterScore, or kScoreGiven
  bool normalize = false;
  const uint8_t* mask = nullptr;     // [tokens], 0 = padding
  const int32_t* indices = nullptr;  // [tokens, k], for kLoadBalancing and kLoad
  int32_t k = 0;
  bool per_token = false;
  double coefficient = 1.0;
  double* value = nullptr;    // [1]
  float* gradient = nullptr;  // [tokens, experts] or none
};

constexpr int32_t kScoreGiven = 3;

// One pass over the tokens in blocks of kLossRows.
struct RouterLossPass {
  RouterLossArgs args;
  bool backward = false;
  double* partial = nullptr;       // forward: [blocks, experts] sums of p; [blocks] sums of lse^2 for kZ
  const float* by_score = nullptr;  // backward: dL/dp [experts, padded with 0 to a multiple of 16]
  double z_factor = 0.0;           // kZ: dL/dlse = z_factor * lse
};

// kOk, kCancelled, kNoMemory, or bad_value(route) for an id outside [-1, experts).
Status router_loss(const RouterLossArgs& args, const Exec& exec);

HEDDLE_DECLARE_OP(router_loss_pass, RouterLossPass)

}  // namespace heddle
