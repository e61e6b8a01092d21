// The matrix kernels of attention_backward() for f16 and head sizes from 129 to 256.
#include "attention/attention_backward_matrix.cuh"

namespace heddle {

int64_t launch_backward_f16_256(const AttentionBackwardArgs& a, const RowTerms* terms, heddle_cuda_job& job) {
  return launch_backward_warps<DType::kFloat16, 256, 4>(a, terms, job);
}

}  // namespace heddle
