// See attention_short.cuh.
#include "attention/attention_short.cuh"

namespace heddle {

template int64_t launch_short_width<DType::kBFloat16, 128>(const AttentionArgs&, const ShortShape&, int64_t, heddle_cuda_job&);

}  // namespace heddle
