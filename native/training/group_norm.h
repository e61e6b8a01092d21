// Group normalisation (Wu and He 2018) for training: the forward keeps what per-sample clipping and the backward need.
//
// x [samples, channels, spatial] is cut into groups of channels / groups channels; a row is one sample's group.
//   x^ = (x - mean) rstd, rstd = 1 / sqrt(mean((x - mean)^2) + epsilon)
//   y  = weight_c x^ + bias_c
//   dx = rstd (h - mean(h) - x^ mean(h x^)), h = weight_c dy
//
// Precision: fp32 lanes in blocks of 4096 elements, blocks added in double; relative error <= 2e-6.
// Cost: memory; a row is read three times, from cache as long as it fits.
#pragma once
#include "simd/dispatch.h"

namespace heddle {

struct GroupNormArgs {
  int64_t samples = 0, channels = 0, spatial = 1, groups = 1;
  float epsilon = 1e-5f;
  const float* x = nullptr;       // backward: dy
  const float* weight = nullptr;  // [channels]
  const float* bias = nullptr;    // [channels] or none
  float* out = nullptr;           // y; backward: dx
  float* normalized = nullptr;    // x^, read by the backward
  float* rstd = nullptr;          // [samples, groups], read by the backward
};

HEDDLE_DECLARE_OP(group_norm, GroupNormArgs)
HEDDLE_DECLARE_OP(group_norm_backward, GroupNormArgs)

}  // namespace heddle
