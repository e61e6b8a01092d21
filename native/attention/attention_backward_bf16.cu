// The matrix kernels of attention_backward() for bf16 and head sizes up to 64.
#include "attention/attention_backward_matrix.cuh"

namespace heddle {

int64_t launch_backward_bf16(const AttentionBackwardArgs& a, const RowTerms* terms, heddle_cuda_job& job) {
  return launch_backward_narrow<DType::kBFloat16>(a, terms, job);
}

}  // namespace heddle
