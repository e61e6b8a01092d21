// Norms and clipped sums of one matrix W [vocabulary, width] used twice: embedding x_t = W[a_t], head logits_s = W h_s.
//
//   gradient  sum_t e_{a_t} Eᵀ_t + sum_s L_s h_sᵀ       E: gradients of the embedding's output, L: of the logits
//   norm^2    n_emb^2 + n_head^2 + 2 sum_{t,s} L_s[a_t] <E_t, h_s>
// The cross sum is a matrix product E hᵀ, chunk by chunk, times gathered logit gradients; blocks in fp32, sums in
// double. Adding the two norms alone would be wrong by the cross term, in either direction. Cost beside the head's
// norm: 2 T^2 width operations and T^2 gathers per sample.
#pragma once
#include "privacy/per_sample_squared_norms.h"

namespace heddle {

struct TiedLayer {
  RowSource grad_embeddings, hidden, grad_logits;
  const int32_t* indices = nullptr;  // [samples, positions]
  const uint8_t* mask = nullptr;     // [samples, positions], 0: padding
  int64_t samples = 0, positions = 0, width = 0, vocabulary = 0;
  int64_t padding_index = -1;  // the embedding's; the head has a gradient there

  RowLayer head() const {
    RowLayer l;
    l.inputs = hidden, l.grad_outputs = grad_logits, l.mask = mask;
    l.samples = samples, l.positions = positions, l.input_count = width, l.output_count = vocabulary;
    return l;
  }
  RowLayer embedding() const {
    RowLayer l;
    l.grad_outputs = grad_embeddings, l.indices = indices, l.mask = mask, l.padding_index = padding_index;
    l.samples = samples, l.positions = positions, l.output_count = width;
    return l;
  }
};

struct TiedNormsArgs {
  TiedLayer layer;
  NormMethod method = NormMethod::kGhost;  // of the head
  float* out = nullptr;                    // [samples]
};
struct TiedClippedArgs {
  TiedLayer layer;
  const float* factors = nullptr;  // [samples]
  float* weight = nullptr;         // [vocabulary, width]
};

Status tied_squared_norms(const TiedNormsArgs& args, const Exec& exec);
Status tied_clipped_gradients(const TiedClippedArgs& args, const Exec& exec);

}  // namespace heddle
