#include "moe/permute.h"

#include <cstring>

namespace heddle {

Status permute(const PermuteArgs& a, const Exec& exec) {
  const int64_t limit = a.tokens * a.k;
  for (int64_t r = 0; r < a.routes; ++r) {
    if (a.order[r] < 0 || a.order[r] >= limit) return bad_value(r);
  }
  if (a.row_bytes == 0) return kOk;
  const auto* x = static_cast<const unsigned char*>(a.x);
  auto* out = static_cast<unsigned char*>(a.out);
  const int64_t grain = 1 + (int64_t{1} << 17) / a.row_bytes;
  const bool done = parallel_for(exec, a.routes, grain, [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r) {
      const int64_t token = a.order[r] / a.k;
      std::memcpy(out + r * a.row_bytes, x + token * a.row_bytes, static_cast<size_t>(a.row_bytes));
    }
  });
  return done ? kOk : kCancelled;
}

}  // namespace heddle
