// Tubelet embedding of video: a 3-D convolution without padding whose kernels become tokens (ViViT; Arnab et al. 2021).
//
//   token (t, y, x) = W [pixel(b, c, offset + (t, y, x) stride + d) scale[c] + shift[c]  for c, d in the tubelet] + bias
//
// A block of rows is gathered, widened and normalised into memory of the thread, then multiplied as gemm/linear.h says:
// the unfolded video never exists, and a token's bits are those of linear() on its unfolded row, whatever is computed
// beside it. With `indices` only those tokens are computed.
//
// Cost: 2 k dim operations per token, k = channels times the tubelet's volume; gathering is 1 load and 1 store per k.
#pragma once
#include <memory>

#include "attention/patch_problem.h"
#include "nn/fused_linear.h"

namespace heddle {

struct PatchEmbedArgs {
  PatchProblem problem;
  std::shared_ptr<PackedMatrix> weight;  // [dim, k]
  // With indices and fp32 results: rows to write (none: in order) and what is added to them, as in fused_linear.h.
  const float* add[2] = {nullptr, nullptr};
  const int32_t* add_index[2] = {nullptr, nullptr};
  const int32_t* to = nullptr;
};

Status patch_embed(const PatchEmbedArgs& args, const Exec& exec);

}  // namespace heddle
