// The matrix kernels of attention() for bf16.
#include "attention/attention_matrix.cuh"

namespace heddle {

int64_t launch_attention_bf16(const AttentionArgs& a, heddle_cuda_job& job) { return launch_matrix_attention<DType::kBFloat16>(a, job); }

}  // namespace heddle
