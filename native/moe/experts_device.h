// Expert weights on the device, and expertsForward there. An expert's image is one block of image_of(...).bytes: the image
// (gemm/device_matrix.h) of up (gate and up together), and then that of down. The intermediate size is padded to 64.
#pragma once
#include "gemm/device_matrix.h"
#include "moe/experts.h"

namespace heddle {

struct ExpertImage {
  MatrixImage up, down;
  int64_t padded;  // columns of h, a multiple of 64
  int64_t bytes;
};

inline ExpertImage image_of(PackType type, bool gated, bool points, int64_t group, int64_t hidden, int64_t intermediate) {
  ExpertImage e{};
  e.padded = round_up_to(intermediate, kImagePad);
  e.up = matrix_image(type, e.padded / (gated ? 8 : 16), hidden, group, points, &e.bytes);
  e.down = matrix_image(type, round_up_to(hidden, 16) / 16, intermediate, group, points, &e.bytes);
  return e;
}

// Of an expert that is packed; all have the same.
inline ExpertImage image_of(const ExpertBank& b, size_t expert) {
  const bool points = expert < b.experts.size() && b.experts[expert].down.zero_points;
  return image_of(b.type, b.gated, points, b.gate_up_shape.group, b.hidden, b.intermediate);
}

// Writes one packed expert's image to `out`, image_of(bank, expert).bytes.
struct LayoutExpertArgs {
  std::shared_ptr<ExpertBank> bank;
  int64_t expert = 0;
  char* out = nullptr;
};
Status layout_expert(const LayoutExpertArgs& args, const Exec& exec);

// A bank on the device: the images of its experts one after the other.
struct DeviceBank {
  const char* data = nullptr;
  PackType type = PackType::kFloat32;
  Activation activation = Activation::kSiLU;
  float alpha = 1.702f, limit = 7.0f;
  int32_t gated = 1, points = 0;
  int64_t group = 0, experts = 0, hidden = 0, intermediate = 0;
};

// Fields as in ExpertsForwardArgs; pointers are the device's.
struct ExpertsDeviceArgs {
  DeviceBank bank, shared;  // shared.data may be null
  const float* shared_gate = nullptr;
  const void* x = nullptr;
  DType type = DType::kFloat32;
  int64_t tokens = 0, k = 0;
  const int32_t* indices = nullptr;
  const float* weights = nullptr;
  void* out = nullptr;
  DType out_type = DType::kFloat32;
};

}  // namespace heddle
