#include "privacy/experts.h"

#include <algorithm>
#include <new>
#include <vector>

#include "privacy/clipped_gradients.h"

namespace heddle {
namespace {

bool is_read(const ExpertsLayer& l, int64_t row) {
  return (!l.rows.mask || l.rows.mask[row]) && l.sample_of[row] >= 0 && l.expert_of[row] >= 0;
}

}  // namespace

Status experts_squared_norms(const ExpertsNormsArgs& args, const Exec& exec) try {
  const ExpertsLayer& l = args.layer;
  std::vector<int64_t> rows, begin, sample;
  for (int64_t n = 0; n < l.rows.positions; ++n) {
    if (is_read(l, n)) rows.push_back(n);
  }
  auto key = [&](int64_t n) { return int64_t{l.sample_of[n]} * l.experts + l.expert_of[n]; };
  std::sort(rows.begin(), rows.end(), [&](int64_t a, int64_t b) { return key(a) != key(b) ? key(a) < key(b) : a < b; });
  for (size_t i = 0; i < rows.size(); ++i) {
    if (i > 0 && key(rows[i]) == key(rows[i - 1])) continue;
    begin.push_back(static_cast<int64_t>(i));
    sample.push_back(l.sample_of[rows[i]]);
  }
  begin.push_back(static_cast<int64_t>(rows.size()));
  const auto runs = static_cast<int64_t>(sample.size());
  std::vector<double> sums(sample.size()), total(static_cast<size_t>(l.rows.samples), 0.0);
  const Status status = run_norm_sums(l.rows, rows.data(), begin.data(), runs, args.method, exec, sums.data());
  if (status != kOk) return status;
  for (size_t i = 0; i < sums.size(); ++i) total[static_cast<size_t>(sample[i])] += sums[i];
  for (size_t i = 0; i < total.size(); ++i) args.out[i] = static_cast<float>(total[i]);
  return kOk;
} catch (const std::bad_alloc&) {
  return kNoMemory;
}

Status experts_clipped_gradients(const ExpertsClippedArgs& args, const Exec& exec) try {
  const ExpertsLayer& l = args.layer;
  auto is_used = [&](int64_t n) { return is_read(l, n) && args.factors[l.sample_of[n]] != 0.0f; };
  std::vector<int64_t> begin(static_cast<size_t>(l.experts) + 1, 0);
  for (int64_t n = 0; n < l.rows.positions; ++n) {
    if (is_used(n)) ++begin[static_cast<size_t>(l.expert_of[n]) + 1];
  }
  for (size_t e = 1; e < begin.size(); ++e) begin[e] += begin[e - 1];
  std::vector<int64_t> rows(static_cast<size_t>(begin.back())), next(begin.begin(), begin.end() - 1);
  std::vector<float> scale(rows.size());
  for (int64_t n = 0; n < l.rows.positions; ++n) {
    if (!is_used(n)) continue;
    const auto at = static_cast<size_t>(next[static_cast<size_t>(l.expert_of[n])]++);
    rows[at] = n, scale[at] = args.factors[l.sample_of[n]];
  }
  return add_products(l.rows, rows.data(), scale.data(), begin.data(), l.experts, args.weight, args.bias, exec);
} catch (const std::bad_alloc&) {
  return kNoMemory;
}

}  // namespace heddle
