#include "nn/gather_rows.h"

#include <cstring>

namespace heddle {

Status gather_rows(const GatherRowsArgs& a, const Exec& exec) {
  for (int64_t r = 0; r < a.count; ++r) {
    if (a.index[r] < -1 || a.index[r] >= a.rows) return bad_value(r);
  }
  if (a.row_bytes == 0) return kOk;
  const auto* x = static_cast<const unsigned char*>(a.x);
  auto* out = static_cast<unsigned char*>(a.out);
  const size_t bytes = static_cast<size_t>(a.row_bytes);
  const int64_t grain = 1 + (int64_t{1} << 17) / a.row_bytes;
  const bool done = parallel_for(exec, a.count, grain, [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r) {
      const int64_t from = a.index[r];
      unsigned char* to = out + r * a.row_bytes;
      if (from >= 0) std::memcpy(to, x + from * a.row_bytes, bytes);
      else if (a.fill) std::memcpy(to, a.fill, bytes);
      else std::memset(to, 0, bytes);
    }
  });
  return done ? kOk : kCancelled;
}

}  // namespace heddle
