// What the ops that are made of attention_backward() share on the device.
#pragma once
#include "attention/attention_backward.h"
#include "cuda/job.h"

namespace heddle {

// Launches attention_backward() on the job's stream; `a` has device pointers.
int64_t launch_attention_backward_on(const AttentionBackwardArgs& a, heddle_cuda_job& job);

// Head sizes that the matrix kernels serve.
inline bool backward_on_matrix(const AttentionProblem& p) {
  return p.type != DType::kFloat32 && p.head_dim <= 256 && p.value_dim <= 256;
}

// Gradients of q, k and v, after the pre-pass has written `terms`: on the matrix cores, by type and head size so that
// they compile side by side, and exact.
struct RowTerms;
int64_t launch_backward_bf16(const AttentionBackwardArgs& a, const RowTerms* terms, heddle_cuda_job& job);
int64_t launch_backward_bf16_128(const AttentionBackwardArgs& a, const RowTerms* terms, heddle_cuda_job& job);
int64_t launch_backward_bf16_256(const AttentionBackwardArgs& a, const RowTerms* terms, heddle_cuda_job& job);
int64_t launch_backward_f16(const AttentionBackwardArgs& a, const RowTerms* terms, heddle_cuda_job& job);
int64_t launch_backward_f16_128(const AttentionBackwardArgs& a, const RowTerms* terms, heddle_cuda_job& job);
int64_t launch_backward_f16_256(const AttentionBackwardArgs& a, const RowTerms* terms, heddle_cuda_job& job);
int64_t launch_backward_exact(const AttentionBackwardArgs& a, const RowTerms* terms, heddle_cuda_job& job);
// The bias's gradient where pairs share its elements.
int64_t launch_backward_bias(const AttentionBackwardArgs& a, const RowTerms* terms, heddle_cuda_job& job);

}  // namespace heddle
