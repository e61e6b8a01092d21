// Packed matrices on the device: the layout that device_layout.cpp writes and the products of device_product.cuh read, and
// linear there.
//
// A matrix's image:
//   codes   [tiles][steps][code_bytes]   what the matrix instructions take as their operand A, lane by lane
//   scales  int8 [tiles][16] floats; int4, float8 [tiles][groups][16] floats; MXFP4 [tiles][groups][16] e8m0 bytes
//   points  int4 with zero points: [tiles][groups][16] bytes
//   bias    [tiles][16] floats, zeros without biases
// A tile is 16 outputs; of a pair (gate and up), 8 of gate and the same 8 of up, so that one thread holds both of a
// column. k is padded to 64 with zeros. A step is 16 bytes per lane and fragment:
//   float32   16 k: [16 k][16 outputs] floats
//   bfloat16  32 k: two fragments of m16n8k16 (cuda/matrix.cuh), [lane][register][2]
//   int8      64 k: two fragments of m16n8k32, [lane][register][4]
//   int4      64 k: words h * 2 + register / 2 of a lane for fragment h; byte e holds value e of the even register (low
//             nibble) and of the odd one (high nibble), as signed codes q - 8
//   MXFP4     64 k: the same words; nibble e of the lower half is value e of the even register, the upper half's the odd's
//   float8    32 k: the same words for fragments of m16n8k16; byte 2e + register % 2 is value e
// Rows as operand B: [steps][row_step_bytes]. float32, bfloat16, int8: 64 bytes of values (int8: the row's scale apart);
// int4, MXFP4: 64 bytes of int8, then two scales and two sums (floats) of the step's one or two groups; float8: three
// bfloat16 parts of 64 bytes, whose sum is the fp32 value exactly.
#pragma once
#include <memory>
#include <vector>

#include "gemm/activation.h"
#include "gemm/packed.h"

namespace heddle {

// By PackType: float32, bfloat16, int8, int4, MXFP4, float8.
constexpr int64_t kImageStep[] = {16, 32, 64, 64, 64, 32};
constexpr int64_t kImageCodeBytes[] = {1024, 1024, 1024, 512, 512, 512};
constexpr int64_t kImageRowBytes[] = {64, 64, 64, 80, 80, 192};
constexpr int64_t kImagePad = 64;

struct MatrixImage {
  int64_t tiles, steps, groups;         // groups: scales per output; 0 without scales
  int64_t codes, scales, points, bias;  // bytes from the start of what holds the image
};

// The next image in a block of which *at bytes are taken.
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

// Writes the image of a packed matrix (of a pair with `pair`) into `to`. first, second: biases of the two halves of a
// pair's tiles, or of all 16 outputs; may be empty. False: cancelled.
bool layout_image(const MatrixImage& image, const PackedMatrix& m, bool pair, const std::vector<float>& first,
                  const std::vector<float>& second, char* to, const Exec& exec);

// A matrix of its own, y = x W^T, and its bytes.
inline MatrixImage linear_image(PackType type, int64_t outputs, int64_t k, int64_t group, bool points, int64_t* bytes) {
  *bytes = 0;
  return matrix_image(type, (outputs + 15) / 16, k, group, points, bytes);
}
int64_t matrix_image_bytes(const PackedMatrix& m);

struct LayoutMatrixArgs {
  std::shared_ptr<PackedMatrix> matrix;
  char* out = nullptr;  // matrix_image_bytes
};
Status layout_matrix(const LayoutMatrixArgs& args, const Exec& exec);

struct DeviceMatrix {
  const char* data = nullptr;
  PackType type = PackType::kFloat32;
  int32_t points = 0;
  int64_t group = 0, outputs = 0, k = 0;
};

// Fields as in LinearArgs; pointers are the device's.
struct LinearDeviceArgs {
  DeviceMatrix weight;
  const void* x = nullptr;
  DType type = DType::kFloat32;
  int64_t rows = 0;
  const float* bias = nullptr;
  LinearActivation activation = LinearActivation::kNone;
  void* out = nullptr;
  DType out_type = DType::kFloat32;
};

}  // namespace heddle
