// Gathers the rows of the tokens into expert order: out[r] = x[order[r] / k].
//
// Plain C++: whole rows are copied by memcpy, which is already the widest copy there is. Moves 2 R d elements.
#pragma once
#include "core/status.h"
#include "core/thread_pool.h"

namespace heddle {

struct PermuteArgs {
  const void* x = nullptr;  // [tokens, row_bytes]
  int64_t tokens = 0, row_bytes = 0;
  int32_t k = 0;
  const int32_t* order = nullptr;  // [routes], each in [0, tokens * k)
  int64_t routes = 0;
  void* out = nullptr;  // [routes, row_bytes]
};

// kOk, kCancelled, or bad_value(r) for an order[r] out of range.
Status permute(const PermuteArgs& args, const Exec& exec);

}  // namespace heddle
