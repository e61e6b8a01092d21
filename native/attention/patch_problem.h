// What patch_embed() is given, on the CPU and on the device; patch_embed.h has the definition.
#pragma once
#include <cstdint>

#include "core/dtype.h"

namespace heddle {

struct PatchProblem {
  const void* video = nullptr;
  DType type = DType::kFloat32;  // uint8, fp32 or bf16
  int64_t batch = 0, channels = 0;
  int64_t batch_stride = 0, channel_stride = 0;  // in elements
  int64_t pixel_stride[3] = {};                  // of time, height, width
  int64_t grid[3] = {}, size[3] = {}, step[3] = {};
  int64_t start = 0;           // element of the first tubelet's first pixel
  bool channels_last = false;  // order of k: time, height, width, channel; else channel, time, height, width
  const float *scale = nullptr, *shift = nullptr;  // [channels]
  const int32_t* indices = nullptr;                // kept tokens of the grid, ascending within a batch entry; or none
  const int32_t* batch_offsets = nullptr;          // [batch + 1], with indices
  const float* bias = nullptr;                     // [dim]
  void* out = nullptr;
  DType out_type = DType::kFloat32;
  int64_t out_rows = 0, out_first = 0;  // without indices: rows of out per batch entry, and the first one to write

  HEDDLE_BOTH int64_t tokens() const { return grid[0] * grid[1] * grid[2]; }
  // Element of a token's first pixel.
  HEDDLE_BOTH int64_t first_pixel(int64_t b, int64_t token) const {
    const int64_t x = token % grid[2], y = token / grid[2] % grid[1], t = token / (grid[2] * grid[1]);
    return start + b * batch_stride + t * step[0] * pixel_stride[0] + y * step[1] * pixel_stride[1] +
           x * step[2] * pixel_stride[2];
  }
};

// On the device the weights are a matrix [columns, k] as it comes: fp32, bf16 or fp16.
struct PatchEmbedDeviceArgs {
  PatchProblem problem;
  const void* weight = nullptr;
  DType weight_type = DType::kFloat32;
  int64_t columns = 0, k = 0;
  int64_t rows = 0;  // tokens to compute
};

}  // namespace heddle
