// See decode_part.cuh.
#include "attention/decode_part.cuh"

namespace heddle {

template int64_t launch_decode_parts<CacheType::kInt4>(DecodeLaunch&, heddle_cuda_job&);

}  // namespace heddle
