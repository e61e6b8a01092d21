// How the kernel of short sequences is launched: one file per type and width, since nvcc takes long for each.
#pragma once
#include "attention/attention_launch.h"

namespace heddle {

constexpr int kShortRows = 64;

// What the launch knows; one warp's shared memory is [rows + 2 Keys][Width + 8] elements, then logits where formed.
struct ShortShape {
  int64_t items = 0, each = 0;  // (sequence, part of its rows, key head); parts of a sequence
  int32_t rows = 0;             // query rows that there is room for, a multiple of 16
  int32_t warp_bytes = 0;
  bool search = false;  // lengths are not known: items are found by find_rows
  bool aligned = false, aligned_out = false;
};

// For sequences of up to `keys` keys; width: the larger of head_dim and value_dim, rounded up to 64 or 128.
template <DType T, int Width>
int64_t launch_short_width(const AttentionArgs& a, const ShortShape& shape, int64_t keys, heddle_cuda_job& job);

}  // namespace heddle
