// See layer_device.h.
#include "moe/layer_device.h"

#include "cuda/job.h"

extern "C" {
HEDDLE_CUDA_API int64_t heddle_cuda_linear(const void* args, heddle_cuda_job* job);
HEDDLE_CUDA_API int64_t heddle_cuda_route_top_k(const void* args, heddle_cuda_job* job);
HEDDLE_CUDA_API int64_t heddle_cuda_experts_forward(const void* args, heddle_cuda_job* job);
}

namespace heddle {

HEDDLE_CUDA_OP(moe_layer, MoELayerArgs) {
  int64_t status = heddle_cuda_linear(&a.router, &job);
  if (status == kOk) status = heddle_cuda_route_top_k(&a.route, &job);
  if (status == kOk && a.gate.weight.data) status = heddle_cuda_linear(&a.gate, &job);
  return status == kOk ? heddle_cuda_experts_forward(&a.experts, &job) : status;
}

}  // namespace heddle
