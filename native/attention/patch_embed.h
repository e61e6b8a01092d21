// Tubelet embedding of video: a 3-D convolution without padding whose kernels become tokens (ViViT; Arnab et al. 2021).
//
//   token (t, y, x) = W [pixel(b, c, offset + (t, y, x) stride + d) scale[c] + shift[c]  for c, d in the tubelet] + bias
//
// A block of rows is gathered, widened and normalised into memory of the thread, then multiplied as gemm/linear.h says:
// the unfolded video never exists, and a token's bits are those of linear() on its unfolded row, whatever is computed
// beside it. With `indices` only those tokens are computed.
//
// Cost: 2 k dim operations per token, k = channels times the tubelet's volume; gathering is 1 load and 1 store per k.
#pragma once
#include <memory>

#include "nn/fused_linear.h"

namespace heddle {

struct PatchEmbedArgs {
  std::shared_ptr<PackedMatrix> weight;  // [dim, k]
  const void* video = nullptr;
  DType type = DType::kFloat32;  // uint8, fp32 or bf16
  int64_t batch = 0, channels = 0;
  int64_t batch_stride = 0, channel_stride = 0;  // in elements
  int64_t pixel_stride[3] = {};                  // of time, height, width
  int64_t grid[3] = {}, size[3] = {}, step[3] = {};
  int64_t start = 0;          // element of the first tubelet's first pixel
  bool channels_last = false;  // order of k: time, height, width, channel; else channel, time, height, width
  const float *scale = nullptr, *shift = nullptr;  // [channels]
  const int32_t* indices = nullptr;                // kept tokens of the grid, ascending within a batch entry; or none
  const int32_t* batch_offsets = nullptr;          // [batch + 1], with indices
  const float* bias = nullptr;                     // [dim]
  void* out = nullptr;
  DType out_type = DType::kFloat32;
  int64_t out_rows = 0, out_first = 0;  // without indices: rows of out per batch entry, and the first one to write
  // With indices and fp32 results: rows to write (none: in order) and what is added to them, as in fused_linear.h.
  const float* add[2] = {nullptr, nullptr};
  const int32_t* add_index[2] = {nullptr, nullptr};
  const int32_t* to = nullptr;
};

Status patch_embed(const PatchEmbedArgs& args, const Exec& exec);

}  // namespace heddle
