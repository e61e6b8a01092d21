// out += sum_i factor_i * gradient_i for every parameter of one layer: book-keeping, without any gradient_i.
//
//   linear     weight[p, d] += sum_r c_r G[r, p] A[r, d], bias[p] += sum_r c_r G[r, p]; r runs over (sample, position)
//   embedding  weight[a_r] += c_r G[r]
//   layer-, rms-norm  weight += sum_r c_r G[r] * x[r], bias += sum_r c_r G[r]; group-norm the same per channel
//
//   experts    the linear sum over the rows that went to each expert
//
// The factor multiplies rows of G while they are packed: that is all that clipping costs. Rows of padding and of
// samples with factor 0 are left out of the row list and never read.
//
// fp32, in blocks of kDepth rows of the list in ascending order (kernels.h), then one addition to `out`: the bits
// depend on neither threads nor chunk sizes. Relative error against float64 <= 2e-5.
#pragma once
#include "privacy/per_sample_squared_norms.h"

namespace heddle {

struct ClippedArgs {
  RowLayer layer;
  const float* factors = nullptr;  // [samples]
  float* weight = nullptr;
  float* bias = nullptr;
};

Status linear_clipped_gradients(const ClippedArgs& args, const Exec& exec);
Status embedding_clipped_gradients(const ClippedArgs& args, const Exec& exec);
Status scale_clipped_gradients(const ClippedArgs& args, const Exec& exec);
Status channel_clipped_gradients(const ClippedArgs& args, const Exec& exec);

// For each of `runs` lists rows[begin[i]] .. rows[begin[i + 1]], with one scale per entry: weight i += sum of
// scale G[row] A[row], bias i += sum of scale G[row]. `bias` may be null.
Status add_products(const RowLayer& layer, const int64_t* rows, const float* scale, const int64_t* begin, int64_t runs,
                    float* weight, float* bias, const Exec& exec);

// out[r][c] += the chunk's element; blocks as ChunkProduct leaves them.
void add_chunk(const float* blocks, int64_t n0, int64_t n1, float* out, int64_t stride);

}  // namespace heddle
