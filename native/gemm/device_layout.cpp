// Packed matrices in the device's layout (device_matrix.h): runs once per matrix, so it is written for reading.
#include <cstring>

#include "gemm/device_matrix.h"

namespace heddle {
namespace {

// One output of a packed matrix.
struct Output {
  const PackedMatrix& m;
  int64_t panel;
  int column;
  bool inside;

  int64_t unit(int64_t k) const { return (panel * m.steps + k / pack_unit(m.type)) * kStepBytes; }
  bool has(int64_t k) const { return inside && k < m.steps * pack_unit(m.type); }
  float f32(int64_t k) const {
    float v = 0.0f;
    if (has(k)) std::memcpy(&v, m.data.as<char>() + unit(k) + column * 4, 4);
    return v;
  }
  uint16_t bf16(int64_t k) const {
    uint16_t v = 0;
    if (has(k)) std::memcpy(&v, m.data.as<char>() + unit(k) + column * 4 + k % 2 * 2, 2);
    return v;
  }
  uint8_t byte(int64_t k) const {
    return has(k) ? m.data.as<uint8_t>()[unit(k) + column * 4 + k % 4] : uint8_t{0};
  }
  // `empty`: the code that stands for 0.
  int nibble(int64_t k, int empty) const {
    return has(k) ? m.data.as<uint8_t>()[unit(k) + column * 4 + k % 4] >> (k % 8 < 4 ? 0 : 4) & 15 : empty;
  }
  int64_t slot(int64_t group) const { return (panel * m.groups() + group) * kPanel + column; }
  bool has_group(int64_t group) const { return inside && group < m.groups(); }
};

// Output r of 16 of a tile. A pair's tile holds 8 columns of gate, then the same of up.
Output output_of(const PackedMatrix& m, bool pair, int64_t tile, int r) {
  const int64_t j = pair ? tile * 8 + r % 8 : tile * 16 + r;
  const int64_t width = pair ? kHalfPanel : kPanel;
  const int column = static_cast<int>(j % width) + (pair && r >= 8 ? kHalfPanel : 0);
  return {m, j / width, column, j / width < m.panels};
}

// Calls put(fragment, lane, register, element, output, k) for what a step holds, k counted in the step.
template <class Put>
void for_fragments(int k_per_fragment, const Output* outputs, const Put& put) {
  const int run = k_per_fragment / 8;  // consecutive k in a register
  for (int h = 0; h < 2; ++h) {
    for (int lane = 0; lane < 32; ++lane) {
      for (int r = 0; r < 4; ++r) {
        const Output& o = outputs[lane / 4 + r % 2 * 8];
        const int k = h * k_per_fragment + r / 2 * k_per_fragment / 2 + lane % 4 * run;
        for (int e = 0; e < run; ++e) put(h, lane, r, e, o, k + e);
      }
    }
  }
}

void layout_step(PackType type, const Output* outputs, int64_t first, char* to) {
  auto* bytes = reinterpret_cast<uint8_t*>(to);
  switch (type) {
    case PackType::kFloat32:
      for (int k = 0; k < 16; ++k) {
        for (int r = 0; r < 16; ++r) {
          const float v = outputs[r].f32(first + k);
          std::memcpy(to + (k * 16 + r) * 4, &v, 4);
        }
      }
      return;
    case PackType::kBFloat16:
      for_fragments(16, outputs, [&](int h, int lane, int r, int e, const Output& o, int k) {
        const uint16_t v = o.bf16(first + k);
        std::memcpy(to + (((h * 32 + lane) * 4 + r) * 2 + e) * 2, &v, 2);
      });
      return;
    case PackType::kInt8:
      for_fragments(32, outputs, [&](int h, int lane, int r, int e, const Output& o, int k) {
        bytes[((h * 32 + lane) * 4 + r) * 4 + e] = o.byte(first + k);
      });
      return;
    case PackType::kInt4:
      for_fragments(32, outputs, [&](int h, int lane, int r, int e, const Output& o, int k) {
        const int code = o.nibble(first + k, 8) ^ 8;  // q - 8 in two's complement
        bytes[(lane * 4 + h * 2 + r / 2) * 4 + e] |= static_cast<uint8_t>(code << (r % 2 * 4));
      });
      return;
    case PackType::kMxfp4:
      for_fragments(32, outputs, [&](int h, int lane, int r, int e, const Output& o, int k) {
        const int code = o.nibble(first + k, 0);
        bytes[(lane * 4 + h * 2 + r / 2) * 4 + r % 2 * 2 + e / 2] |= static_cast<uint8_t>(code << (e % 2 * 4));
      });
      return;
    case PackType::kFloat8:
      for_fragments(16, outputs, [&](int h, int lane, int r, int e, const Output& o, int k) {
        bytes[(lane * 4 + h * 2 + r / 2) * 4 + e * 2 + r % 2] = o.byte(first + k);
      });
      return;
  }
}

void layout_scales(const MatrixImage& image, const Output& o, int64_t tile, int r, char* to) {
  for (int64_t g = 0; g < image.groups; ++g) {
    const int64_t i = (tile * image.groups + g) * 16 + r;
    if (o.m.type == PackType::kMxfp4) {
      to[image.scales + i] = static_cast<char>(o.has_group(g) ? o.m.exponent.as<uint8_t>()[o.slot(g)] : 127);
      continue;
    }
    const float scale = o.has_group(g) ? o.m.scale.as<float>()[o.slot(g)] : 0.0f;
    std::memcpy(to + image.scales + i * 4, &scale, 4);
    if (o.m.zero_points) to[image.points + i] = static_cast<char>(o.has_group(g) ? o.m.point.as<uint8_t>()[o.slot(g)] : 8);
  }
}

}  // namespace

bool layout_image(const MatrixImage& image, const PackedMatrix& m, bool pair, const std::vector<float>& first,
                  const std::vector<float>& second, char* to, const Exec& exec) {
  const auto type = static_cast<size_t>(m.type);
  return parallel_for(exec, image.tiles, 4, [&](int64_t begin, int64_t end) {
    for (int64_t tile = begin; tile < end; ++tile) {
      const Output o[16] = {
          output_of(m, pair, tile, 0),  output_of(m, pair, tile, 1),  output_of(m, pair, tile, 2),
          output_of(m, pair, tile, 3),  output_of(m, pair, tile, 4),  output_of(m, pair, tile, 5),
          output_of(m, pair, tile, 6),  output_of(m, pair, tile, 7),  output_of(m, pair, tile, 8),
          output_of(m, pair, tile, 9),  output_of(m, pair, tile, 10), output_of(m, pair, tile, 11),
          output_of(m, pair, tile, 12), output_of(m, pair, tile, 13), output_of(m, pair, tile, 14),
          output_of(m, pair, tile, 15)};
      char* codes = to + image.codes + tile * image.steps * kImageCodeBytes[type];
      std::memset(codes, 0, static_cast<size_t>(image.steps * kImageCodeBytes[type]));
      for (int64_t s = 0; s < image.steps; ++s) {
        layout_step(m.type, o, s * kImageStep[type], codes + s * kImageCodeBytes[type]);
      }
      for (int r = 0; r < 16; ++r) {
        layout_scales(image, o[r], tile, r, to);
        const std::vector<float>& bias = pair && r >= 8 ? second : first;
        const auto j = static_cast<size_t>(pair ? tile * 8 + r % 8 : tile * 16 + r);
        const float b = j < bias.size() ? bias[j] : 0.0f;
        std::memcpy(to + image.bias + (tile * 16 + r) * 4, &b, 4);
      }
    }
  });
}

int64_t matrix_image_bytes(const PackedMatrix& m) {
  int64_t bytes;
  linear_image(m.type, m.columns, m.k, m.group, m.zero_points, &bytes);
  return bytes;
}

Status layout_matrix(const LayoutMatrixArgs& a, const Exec& exec) {
  const PackedMatrix& m = *a.matrix;
  int64_t bytes;
  const MatrixImage image = linear_image(m.type, m.columns, m.k, m.group, m.zero_points, &bytes);
  return layout_image(image, m, false, {}, {}, a.out, exec) ? kOk : kCancelled;
}

}  // namespace heddle
