// The matrix kernels of attention_backward() for f16 and head sizes up to 64.
#include "attention/attention_backward_matrix.cuh"

namespace heddle {

int64_t launch_backward_f16(const AttentionBackwardArgs& a, const RowTerms* terms, heddle_cuda_job& job) {
  return launch_backward_narrow<DType::kFloat16>(a, terms, job);
}

}  // namespace heddle
