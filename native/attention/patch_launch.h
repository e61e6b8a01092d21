// How patch_embed() is launched on the device: one file per type of weights, since nvcc takes long for each.
#pragma once
#include "attention/patch_problem.h"
#include "cuda/job.h"

namespace heddle {

constexpr int kPatchOutputs = 128;  // of a tile

template <DType W>
int64_t launch_patches(const PatchEmbedDeviceArgs& a, heddle_cuda_job& job);

}  // namespace heddle
