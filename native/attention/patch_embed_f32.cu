// See patch_embed.cu.
#include "attention/patch_product.cuh"

namespace heddle {

template int64_t launch_patches<DType::kFloat32>(const PatchEmbedDeviceArgs&, heddle_cuda_job&);

}  // namespace heddle
