// The matrix kernels of attention_backward() for bf16 and head sizes from 129 to 256.
#include "attention/attention_backward_matrix.cuh"

namespace heddle {

int64_t launch_backward_bf16_256(const AttentionBackwardArgs& a, const RowTerms* terms, heddle_cuda_job& job) {
  return launch_backward_warps<DType::kBFloat16, 256, 4>(a, terms, job);
}

}  // namespace heddle
