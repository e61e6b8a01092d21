// Rows by index: out[r] = x[index[r]], or the fill row (zeros without one) where the index is -1.
//
// Packing kept tokens, putting them back and bringing them into another order are all this. Plain C++: whole rows are
// copied by memcpy, which is already the widest copy there is. Reads and writes each row once.
#pragma once
#include "core/status.h"
#include "core/thread_pool.h"

namespace heddle {

struct GatherRowsArgs {
  const void* x = nullptr;  // [rows, row_bytes]
  int64_t rows = 0, row_bytes = 0;
  const int32_t* index = nullptr;  // [count], each in [-1, rows)
  int64_t count = 0;
  const void* fill = nullptr;  // [row_bytes] or none
  void* out = nullptr;         // [count, row_bytes]
};

// kOk, kCancelled, or bad_value(r) for an index[r] out of range.
Status gather_rows(const GatherRowsArgs& args, const Exec& exec);

}  // namespace heddle
