// Norms and clipped sums of a low-rank adapter y = s B A x beside a frozen matrix; A [rank, d], B [p, rank].
//
// Two linear layers of rank inputs or outputs: with u_t = s A x_t and v_t = s Bᵀ G_t,
//   dB = sum_t G_t u_tᵀ [p, rank]    dA = sum_t v_t x_tᵀ [rank, d]
// so nothing of p x d exists. u and v are formed first (2 rank floats per row read: rank / d of what was given), the
// rest is the linear kernels with their bounds; cost 4 rows rank (p + d) operations plus that of the norms.
#pragma once
#include "privacy/per_sample_squared_norms.h"

namespace heddle {

struct LoraLayer {
  RowLayer rows;  // inputs: x; no bias
  RowSource a, b;
  int64_t rank = 0;
  float scale = 1.0f;
};

struct LoraNormsArgs {
  LoraLayer layer;
  NormMethod method = NormMethod::kByLength;  // of each of the two
  float* out = nullptr;                       // [samples]
};
struct LoraClippedArgs {
  LoraLayer layer;
  const float* factors = nullptr;  // [samples]
  float* a = nullptr;              // [rank, d]
  float* b = nullptr;              // [p, rank]
};

Status lora_squared_norms(const LoraNormsArgs& args, const Exec& exec);
Status lora_clipped_gradients(const LoraClippedArgs& args, const Exec& exec);

}  // namespace heddle
