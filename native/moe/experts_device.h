// Expert weights on the device, and expertsForward there: the layout that experts_layout.cpp writes and experts.cu reads.
//
// An expert's image is one block of image_of(...).bytes, for up (gate and up together) and then down:
//   codes   [tiles][steps][code_bytes]   what the matrix instructions take as their operand A, lane by lane
//   scales  int8 [tiles][16] floats; int4, float8 [tiles][groups][16] floats; MXFP4 [tiles][groups][16] e8m0 bytes
//   points  int4 with zero points: [tiles][groups][16] bytes
//   bias    [tiles][16] floats, zeros without biases
// A tile is 16 outputs: of gated layers 8 of gate and the same 8 of up, so that one thread holds both of a column. k and
// the intermediate size are padded to 64 with zeros. A step is 16 bytes per lane and fragment:
//   float32   16 k: [16 k][16 outputs] floats
//   bfloat16  32 k: two fragments of m16n8k16 (cuda/matrix.cuh), [lane][register][2]
//   int8      64 k: two fragments of m16n8k32, [lane][register][4]
//   int4      64 k: words h * 2 + register / 2 of a lane for fragment h; byte e holds value e of the even register (low
//             nibble) and of the odd one (high nibble), as signed codes q - 8
//   MXFP4     64 k: the same words; nibble e of the lower half is value e of the even register, the upper half's the odd's
//   float8    32 k: the same words for fragments of m16n8k16; byte 2e + register % 2 is value e
// Rows of x and h as operand B: [steps][row_step_bytes]. float32, bfloat16, int8: 64 bytes of values (int8: the row's scale
// apart); int4, MXFP4: 64 bytes of int8, then two scales and two sums (floats) of the step's one or two groups; float8:
// three bfloat16 parts of 64 bytes, whose sum is the fp32 value exactly.
#pragma once
#include "moe/experts.h"

namespace heddle {

// By PackType: float32, bfloat16, int8, int4, MXFP4, float8.
constexpr int64_t kImageStep[] = {16, 32, 64, 64, 64, 32};
constexpr int64_t kImageCodeBytes[] = {1024, 1024, 1024, 512, 512, 512};
constexpr int64_t kImageRowBytes[] = {64, 64, 64, 80, 80, 192};
constexpr int64_t kImagePad = 64;

struct MatrixImage {
  int64_t tiles, steps, groups;         // groups: scales per output; 0 without scales
  int64_t codes, scales, points, bias;  // bytes from the start of the expert
};
struct ExpertImage {
  MatrixImage up, down;
  int64_t padded;  // columns of h, a multiple of 64
  int64_t bytes;
};

inline MatrixImage matrix_image(PackType type, int64_t tiles, int64_t k, int64_t group, bool points, int64_t* at) {
  const auto i = static_cast<size_t>(type);
  const int64_t depth = round_up_to(k, kImagePad);
  if (type == PackType::kFloat8) group = kBlock;
  MatrixImage m{};
  m.tiles = tiles;
  m.steps = depth / kImageStep[i];
  const bool grouped = type == PackType::kInt4 || type == PackType::kMxfp4 || type == PackType::kFloat8;
  m.groups = grouped ? (depth + group - 1) / group : type == PackType::kInt8 ? 1 : 0;
  auto take = [&](int64_t bytes) {
    const int64_t from = *at;
    *at += round_up_to(bytes, 256);
    return from;
  };
  m.codes = take(tiles * m.steps * kImageCodeBytes[i]);
  m.scales = take(tiles * m.groups * 16 * (type == PackType::kMxfp4 ? 1 : 4));
  m.points = take(points ? tiles * m.groups * 16 : 0);
  m.bias = take(tiles * 64);
  return m;
}

inline ExpertImage image_of(PackType type, bool gated, bool points, int64_t group, int64_t hidden, int64_t intermediate) {
  ExpertImage e{};
  e.padded = round_up_to(intermediate, kImagePad);
  e.up = matrix_image(type, e.padded / (gated ? 8 : 16), hidden, group, points, &e.bytes);
  e.down = matrix_image(type, round_up_to(hidden, 16) / 16, intermediate, group, points, &e.bytes);
  return e;
}

// Of a bank whose experts are packed.
inline ExpertImage image_of(const ExpertBank& b) {
  const bool points = !b.experts.empty() && b.experts[0].down.zero_points;
  return image_of(b.type, b.gated, points, b.gate_up_shape.group, b.hidden, b.intermediate);
}

// Writes one packed expert's image to `out`, image_of(bank).bytes.
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
