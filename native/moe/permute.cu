// permute on the device: a warp copies a row in the widest words that its size and addresses allow. Bound by moving
// the rows: reads and writes routes x row_bytes.
#include "moe/permute.h"

#include "cuda/job.h"

namespace heddle {
namespace {

constexpr int kWarps = 8;

template <class Word>
__global__ void __launch_bounds__(kWarps* kWarp) permute_kernel(PermuteArgs a, unsigned long long* bad) {
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  const int64_t r = int64_t{blockIdx.x} * kWarps + static_cast<int>(threadIdx.x) / kWarp;
  if (r >= a.routes) return;
  const int32_t route = a.order[r];
  if (route < 0 || route >= a.tokens * a.k) {
    if (lane == 0) report_bad_value(bad, r);
    return;
  }
  const int64_t words = a.row_bytes / static_cast<int64_t>(sizeof(Word));
  const Word* from = static_cast<const Word*>(a.x) + route / a.k * words;
  Word* to = static_cast<Word*>(a.out) + r * words;
#pragma unroll 4
  for (int64_t i = lane; i < words; i += kWarp) to[i] = from[i];
}

template <class Word>
int64_t launch(const PermuteArgs& a, heddle_cuda_job& job, unsigned long long* bad) {
  HEDDLE_LAUNCH((permute_kernel<Word>), dim3(static_cast<unsigned>(ceil_div(a.routes, kWarps))), dim3(kWarps * kWarp), 0,
                job.stream, a, bad);
  return job.launched();
}

}  // namespace

HEDDLE_CUDA_OP(permute, PermuteArgs) {
  if (a.routes == 0) return kOk;
  unsigned long long* bad = job.status();
  if (!bad) return kNoMemory;
  if (is_aligned(16, {a.x, a.out}, a.row_bytes)) return launch<uint4>(a, job, bad);
  if (is_aligned(4, {a.x, a.out}, a.row_bytes)) return launch<uint32_t>(a, job, bad);
  return launch<uint16_t>(a, job, bad);
}

}  // namespace heddle
