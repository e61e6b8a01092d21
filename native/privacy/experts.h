// Norms and clipped sums of one linear layer per expert, W [experts, p, d]; the rows of a batch are spread over them.
//
// Row n belongs to sample sample_of[n] and went to expert expert_of[n]; -1 in either: dropped, never read.
//   norm^2 of a sample  sum_e |sum of G_n A_nᵀ over its rows at expert e|^2, each by the formula that its own number of
//                       rows makes cheaper (kByLength), so that it does not depend on the batch
//   weight e            sum of c G_n A_nᵀ over all rows at expert e, in ascending n
// The rest is the linear kernels with their bounds.
#pragma once
#include "privacy/per_sample_squared_norms.h"

namespace heddle {

struct ExpertsLayer {
  RowLayer rows;  // positions: rows; samples: of the batch
  const int32_t* sample_of = nullptr;
  const int32_t* expert_of = nullptr;
  int64_t experts = 0;
};

struct ExpertsNormsArgs {
  ExpertsLayer layer;
  NormMethod method = NormMethod::kByLength;
  float* out = nullptr;  // [samples]
};
struct ExpertsClippedArgs {
  ExpertsLayer layer;
  const float* factors = nullptr;  // [samples]
  float* weight = nullptr;         // [experts, p, d]
  float* bias = nullptr;           // [experts, p]
};

Status experts_squared_norms(const ExpertsNormsArgs& args, const Exec& exec);
Status experts_clipped_gradients(const ExpertsClippedArgs& args, const Exec& exec);

}  // namespace heddle
