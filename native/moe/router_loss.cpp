#include "moe/router_loss.h"

#include <algorithm>

#include "core/workspace.h"

namespace heddle {
namespace {

// Population variance over squared mean of n numbers, and optionally the derivative by each.
double variation(const double* x, int64_t n, double* derivative) {
  double mean = 0.0, variance = 0.0;
  for (int64_t i = 0; i < n; ++i) mean += x[i];
  mean /= static_cast<double>(n);
  for (int64_t i = 0; i < n; ++i) variance += (x[i] - mean) * (x[i] - mean);
  variance /= static_cast<double>(n);
  const double square = mean * mean;
  for (int64_t i = 0; derivative && i < n; ++i) {
    const double by_variance = 2.0 * (x[i] - mean) / static_cast<double>(n);
    const double by_mean = -2.0 * variance / (static_cast<double>(n) * mean);
    derivative[i] = square == 0.0 ? 0.0 : (by_variance + by_mean) / square;
  }
  return square == 0.0 ? 0.0 : variance / square;
}

Status count_routes(const RouterLossArgs& a, double* count) {
  for (int64_t i = 0; i < a.tokens * a.k; ++i) {
    const int32_t id = a.indices[i];
    if (id < -1 || id >= a.experts) return bad_value(i);
    if (id >= 0 && (!a.mask || a.mask[i / a.k])) count[id] += 1.0;
  }
  return kOk;
}

}  // namespace

Status router_loss(const RouterLossArgs& a, const Exec& exec) {
  const int64_t experts = a.experts;
  const auto padded = static_cast<size_t>((experts + 15) / 16 * 16);
  const int64_t blocks = (a.tokens + kLossRows - 1) / kLossRows;
  double kept = static_cast<double>(a.tokens);
  if (a.mask) kept = static_cast<double>(a.tokens - std::count(a.mask, a.mask + a.tokens, 0));
  AlignedBuffer<double> count(padded), sum(padded), derivative(padded);
  AlignedBuffer<float> by_score(padded);
  if (!count || !sum || !derivative || !by_score) return kNoMemory;
  std::fill_n(count.data(), padded, 0.0);
  if (a.indices) {
    if (const Status status = count_routes(a, count.data()); status != kOk) return status;
  }
  if (a.kind == LossKind::kLoad) {
    *a.value = a.coefficient * variation(count.data(), experts, nullptr);
    return kOk;
  }

  const bool z = a.kind == LossKind::kZ;
  AlignedBuffer<double> partial(static_cast<size_t>(z ? blocks : blocks * experts));
  if (!partial) return kNoMemory;
  RouterLossPass pass;
  pass.args = a;
  pass.partial = partial.data();
  if (!z) pass.args.gradient = nullptr;  // that is the second pass
  if (kept > 0.0) pass.z_factor = 2.0 * a.coefficient / kept;
  if (const Status status = router_loss_pass(pass, exec); status != kOk) return status;
  const int64_t width = z ? 1 : experts;
  for (int64_t e = 0; e < width; ++e) {
    sum[e] = 0.0;
    for (int64_t b = 0; b < blocks; ++b) sum[e] += partial[b * width + e];
  }
  if (z) {
    *a.value = kept == 0.0 ? 0.0 : a.coefficient * sum[0] / kept;
    return kOk;
  }

  double value = 0.0;
  if (a.kind == LossKind::kImportance) {
    value = variation(sum.data(), experts, derivative.data());
  } else if (kept > 0.0) {
    const double routes = a.per_token ? kept : kept * a.k;
    for (int64_t e = 0; e < experts; ++e) {
      derivative[e] = static_cast<double>(experts) * (count[e] / routes) / kept;
      value += derivative[e] * sum[e];
    }
  } else {
    std::fill_n(derivative.data(), experts, 0.0);
  }
  *a.value = a.coefficient * value;
  if (!a.gradient) return kOk;

  // A constant in dL/dp has no effect where the scores of a token sum to 1.
  double shift = 0.0;
  if (a.normalize || a.score == static_cast<int32_t>(RouterScore::kSoftmax)) {
    for (int64_t e = 0; e < experts; ++e) shift += derivative[e] / static_cast<double>(experts);
  }
  std::fill_n(by_score.data(), padded, 0.0f);
  for (int64_t e = 0; e < experts; ++e) by_score[e] = static_cast<float>(a.coefficient * (derivative[e] - shift));
  pass.args.gradient = a.gradient;
  pass.backward = true;
  pass.by_score = by_score.data();
  return router_loss_pass(pass, exec);
}

}  // namespace heddle
