// The matrix kernels of attention_backward() for bf16 and head sizes from 65 to 128.
#include "attention/attention_backward_matrix.cuh"

namespace heddle {

int64_t launch_backward_bf16_128(const AttentionBackwardArgs& a, const RowTerms* terms, heddle_cuda_job& job) {
  return launch_backward_warps<DType::kBFloat16, 128, 4>(a, terms, job);
}

}  // namespace heddle
