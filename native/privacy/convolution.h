// Squared norms and clipped sums of convolutions (1 to 3 axes, groups, stride, padding, dilation).
//
// Per sample and group of channels a convolution is a linear layer on the unfolded input U [d][T]: d = inputs / groups
// times taps, T output places. One sample's unfolding (in a clipped sum: at most 256 of its rows) lies in thread
// scratch, without the padded places; the rest is chunk products, as in per_sample_squared_norms.h and clipped_gradients.h, with the same bounds.
#pragma once
#include "privacy/per_sample_squared_norms.h"

namespace heddle {

// Axes are padded in front with extents of 1 to three.
struct ConvGeometry {
  int32_t size[3], out[3], kernel[3], stride[3], padding[3], dilation[3];
};

struct ConvLayer {
  ConvGeometry shape;
  const void* input = nullptr;         // [samples, in_channels, size]
  const void* grad_outputs = nullptr;  // [samples, out_channels, out]
  DType input_type = DType::kFloat32, grad_type = DType::kFloat32;
  const uint8_t* mask = nullptr;       // [samples, out], 0: padding
  int64_t samples = 0, in_channels = 0, out_channels = 0, groups = 1;
  bool bias = false;
};

struct ConvNormsArgs {
  ConvLayer layer;
  NormMethod method = NormMethod::kInstantiate;
  float* out = nullptr;  // [samples]
};
struct ConvClippedArgs {
  ConvLayer layer;
  const float* factors = nullptr;  // [samples]
  float* weight = nullptr;         // [out_channels, in_channels / groups, kernel]
  float* bias = nullptr;           // [out_channels]
};

Status conv_squared_norms(const ConvNormsArgs& args, const Exec& exec);
Status conv_clipped_gradients(const ConvClippedArgs& args, const Exec& exec);

}  // namespace heddle
