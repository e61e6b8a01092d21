#include "moe/route_sinkhorn.h"

#include <algorithm>
#include <cmath>

#include "core/workspace.h"

namespace heddle {

Status route_sinkhorn(const SinkhornArgs& a, const Exec& exec) {
  const int64_t experts = a.experts;
  const int64_t blocks = (a.tokens + kSinkhornRows - 1) / kSinkhornRows;
  SinkhornPass pass;
  pass.args = a;
  pass.stride = (a.experts + 15) / 16 * 16;
  const auto stride = static_cast<size_t>(pass.stride);
  const bool scaling = a.max_iterations > 0 && a.tokens > 0;
  AlignedBuffer<float> right(stride), log_right(stride), cost;
  AlignedBuffer<double> exact_right(static_cast<size_t>(experts)), partial;
  if (!right || !log_right || !exact_right) return kNoMemory;
  if (scaling) {
    if (static_cast<uint64_t>(a.tokens) > SIZE_MAX / sizeof(float) / stride) return kNoMemory;
    if (!cost.reset(static_cast<size_t>(a.tokens) * stride)) return kNoMemory;
    if (!partial.reset(static_cast<size_t>(blocks * experts))) return kNoMemory;
  }
  std::fill_n(right.data(), stride, 0.0f);
  std::fill_n(log_right.data(), stride, 0.0f);
  std::fill_n(right.data(), experts, 1.0f);
  std::fill_n(exact_right.data(), experts, 1.0);
  pass.cost = cost.data();
  pass.right = right.data();
  pass.log_right = log_right.data();
  pass.partial = partial.data();

  int32_t iterations = 0;
  bool converged = !scaling;
  if (scaling) {
    pass.phase = SinkhornPhase::kExp;
    if (const Status status = sinkhorn_pass(pass, exec); status != kOk) return status;
    pass.phase = SinkhornPhase::kScale;
    while (!converged && iterations < a.max_iterations) {
      if (const Status status = sinkhorn_pass(pass, exec); status != kOk) return status;
      ++iterations;
      double change = 0.0;
      for (int64_t e = 0; e < experts; ++e) {
        double sum = 0.0;
        for (int64_t b = 0; b < blocks; ++b) sum += partial[b * experts + e];
        const double fresh = 1.0 / (static_cast<double>(experts) * (sum + a.epsilon));
        change += std::fabs(exact_right[e] - fresh);
        exact_right[e] = fresh;
        right[e] = static_cast<float>(fresh);
      }
      converged = change / static_cast<double>(experts) <= a.tolerance;
    }
    for (int64_t e = 0; e < experts; ++e) log_right[e] = static_cast<float>(std::log(exact_right[e]));
  }
  a.report[0] = iterations;
  a.report[1] = converged ? 1 : 0;
  pass.phase = SinkhornPhase::kSelect;
  return sinkhorn_pass(pass, exec);
}

}  // namespace heddle
