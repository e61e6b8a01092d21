// Squared norm of every sample's gradient of one layer, without the gradients.
//
//   linear, ghost        sum_{t,s} ((A Aᵀ)_ts + bias) (G Gᵀ)_ts, t <= s only, block by block
//   linear, instantiate  the squares of Gᵀ A, block by block, + the squares of sum_t G_t for the bias
//   embedding            sum over distinct ids v of |sum_{t: a_t = v} G_t|^2
//   layer-, rms-norm     |sum_t x_t * G_t|^2 (+ |sum_t G_t|^2); group-norm the same per channel
// No array of T x T, of p x d or of B x parameters exists: scratch is 2 MiB per thread, plus the row list.
//
// Padded positions are dropped from the row list, so they are never read. A sample's result depends on its own rows
// alone: bitwise the same in any batch and on any threads. A NaN or infinity that is read makes the norm NaN or
// +Inf; so do finite values whose squares overflow fp32. Blocks in fp32 (kernels.h), their sums in double: relative
// error against float64 <= 1e-5 (about 1e-7 where the gradient does not cancel).
#pragma once
#include "privacy/kernels.h"

namespace heddle {

// Rows [samples * positions, n] beside each other; what linear, embedding and per-feature scales have in common.
struct RowLayer {
  RowSource inputs;        // activations [rows, inputs] or normalised inputs [rows, outputs]
  RowSource grad_outputs;  // [rows, outputs]
  const int32_t* indices = nullptr;  // [rows]; embedding
  const uint8_t* mask = nullptr;     // [rows], 0: padding
  int64_t samples = 0, positions = 0, input_count = 0, output_count = 0;
  int64_t padding_index = -1;
  bool bias = false;
};

// Which linear formula; by length: ghost where 2 T^2 <= p d for the T rows of one gradient.
enum class NormMethod : int32_t { kInstantiate = 0, kGhost = 1, kByLength = 2 };

struct NormsArgs {
  RowLayer layer;
  NormMethod method = NormMethod::kInstantiate;
  float* out = nullptr;  // [samples]
};

Status linear_squared_norms(const NormsArgs& args, const Exec& exec);
Status embedding_squared_norms(const NormsArgs& args, const Exec& exec);
Status scale_squared_norms(const NormsArgs& args, const Exec& exec);
// inputs and grad_outputs [samples * positions, output_count]: positions are channels here; mask [samples, output_count]
Status channel_squared_norms(const NormsArgs& args, const Exec& exec);

// The same in double, for layers that are made of several; sums[sample] is overwritten.
Status linear_norm_sums(const RowLayer& layer, NormMethod method, const Exec& exec, double* sums);
Status embedding_norm_sums(const RowLayer& layer, const Exec& exec, double* sums);
// One gradient for each run rows[begin[i]] .. rows[begin[i + 1]]: sums[i], `runs` of them.
Status run_norm_sums(const RowLayer& layer, const int64_t* rows, const int64_t* begin, int64_t runs, NormMethod method,
                     const Exec& exec, double* sums);

}  // namespace heddle
