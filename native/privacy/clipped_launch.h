// Clipped sums on the device that other layers are made of (clipped_gradients.cu); `a` has device pointers.
#pragma once
#include "cuda/job.h"
#include "privacy/clipped_gradients.h"

namespace heddle {

int64_t launch_linear_clipped(const ClippedArgs& a, heddle_cuda_job& job);
int64_t launch_embedding_clipped(const ClippedArgs& a, heddle_cuda_job& job);

}  // namespace heddle
