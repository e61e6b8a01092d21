// Convolutions with 1 to 3 axes for training: forward, and the gradient with respect to the input. (The gradient of
// the weights is privacy/convolution.h's.)
//
// Per sample and group of channels, out [p][T] = W [p][d] U [d][T] + bias, where U is the unfolded input, d = inputs /
// groups times taps, T output places. U never exists as a whole: an operand of d x rows places is read from the
// zero-padded sample at offset(tap) + offset(place), and multiplied with the packed W. The input's gradient is
// W^T G, added back at the same offsets, tile after tile.
//
// Precision: fp32, one chain of fused multiply-adds per output in ascending (channel, tap); the input's gradient adds
// those chains over places in ascending order. Relative error against float64 <= 5e-6. A sample's bits do not depend
// on the batch or the threads. Scratch per thread: one padded sample, one operand.
#pragma once
#include "core/thread_pool.h"

namespace heddle {

struct Convolution {
  int64_t samples = 0, in_channels = 0, out_channels = 0, groups = 1;
  int32_t size[3], out[3], kernel[3], stride[3], padding[3], dilation[3];  // padded in front with extents of 1
};

struct ConvolutionArgs {
  Convolution shape;
  const float* weight = nullptr;  // [out_channels, in_channels / groups, kernel]
  const float* bias = nullptr;    // forward: [out_channels] or none
  const float* x = nullptr;       // [samples, in_channels, size]; backward: dy [samples, out_channels, out]
  float* out = nullptr;           // [samples, out_channels, out]; backward: dx [samples, in_channels, size]
};

// kOk, kCancelled, kNoMemory.
Status convolution(const ConvolutionArgs& args, const Exec& exec);
Status convolution_input_gradient(const ConvolutionArgs& args, const Exec& exec);

}  // namespace heddle
