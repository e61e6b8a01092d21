// Max and average pooling over two axes, and their gradients. Plain loops: the input is read once per window element,
// from the first-level cache.
//
// max: the first largest element of the window inside the input (padding does not take part; a NaN wins, as in
// PyTorch); `index` is its place in the plane, and the gradient goes there. average: sum over the window divided by the
// whole window, padding counted as zeros (PyTorch's default).
// Gradients are added in the order of the output's places.
#pragma once
#include "core/thread_pool.h"

namespace heddle {

struct PoolingArgs {
  bool average = false;
  int64_t planes = 0;  // samples times channels
  int32_t size[2], out_size[2], kernel[2], stride[2], padding[2];
  const float* x = nullptr;  // [planes, size]; backward: dy [planes, out_size]
  float* out = nullptr;      // [planes, out_size]; backward: dx [planes, size]
  int32_t* index = nullptr;  // max: [planes, out_size]
};

Status pooling(const PoolingArgs& args, const Exec& exec);
Status pooling_backward(const PoolingArgs& args, const Exec& exec);

}  // namespace heddle
