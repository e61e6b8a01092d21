// Which rows of a layer are read, in the order (sample, position).
#pragma once
#include <algorithm>
#include <new>
#include <vector>

#include "privacy/per_sample_squared_norms.h"

namespace heddle {

struct RowList {
  std::vector<int64_t> rows;
  std::vector<int64_t> begin;  // [samples + 1]: first entry of each sample
  std::vector<float> scale;    // with factors: of each entry

  // Drops padding and, with factors, the samples whose factor is 0: they are never read, so a NaN in one of them
  // stays where it is. False without memory.
  bool build(const RowLayer& l, const float* factors) try {
    rows.reserve(static_cast<size_t>(l.samples * l.positions));
    begin.reserve(static_cast<size_t>(l.samples) + 1);
    for (int64_t i = 0; i < l.samples; ++i) {
      begin.push_back(count());
      if (factors && factors[i] == 0.0f) continue;
      for (int64_t r = i * l.positions; r < (i + 1) * l.positions; ++r) {
        if (l.mask && !l.mask[r]) continue;
        rows.push_back(r);
        if (factors) scale.push_back(factors[i]);
      }
    }
    begin.push_back(count());
    return true;
  } catch (const std::bad_alloc&) {
    return false;
  }
  int64_t count() const { return static_cast<int64_t>(rows.size()); }
  const int64_t* sample(int64_t i) const { return rows.data() + begin[static_cast<size_t>(i)]; }
  int64_t length(int64_t i) const { return begin[static_cast<size_t>(i) + 1] - begin[static_cast<size_t>(i)]; }
};

// Sorts rows by id, those of one id in ascending order; rows of the padding id are dropped.
inline void sort_by_id(const RowLayer& l, std::vector<int64_t>& rows) {
  rows.erase(std::remove_if(rows.begin(), rows.end(), [&](int64_t r) { return l.indices[r] == l.padding_index; }),
             rows.end());
  std::sort(rows.begin(), rows.end(), [&](int64_t a, int64_t b) {
    return l.indices[a] != l.indices[b] ? l.indices[a] < l.indices[b] : a < b;
  });
}

// End of the run of equal ids that starts at `i`.
inline size_t run_end(const RowLayer& l, const std::vector<int64_t>& rows, size_t i) {
  const int32_t id = l.indices[rows[i]];
  while (i < rows.size() && l.indices[rows[i]] == id) ++i;
  return i;
}

}  // namespace heddle
