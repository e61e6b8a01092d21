// Packing: scalar work that runs once per weight, parallel over panels.
#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstring>

#include "gemm/packed.h"
#include "gemm/quantize.h"

namespace heddle {
namespace {

// Column c of panel p: which source, and which of its rows; nullptr beyond the matrix.
struct Column {
  const MatrixSource* source;
  int64_t row;
  bool second;
};

Column column_of(const MatrixSource& first, const MatrixSource& second, int64_t n, int64_t p, int c) {
  if (second.data == nullptr) {
    const int64_t row = p * kPanel + c;
    return {row < n ? &first : nullptr, row, false};
  }
  const int64_t row = p * kHalfPanel + c % kHalfPanel;
  return {row < n ? (c < kHalfPanel ? &first : &second) : nullptr, row, c >= kHalfPanel};
}

// k values [k0, k0 + n) of a column as floats, zero beyond k or without a source. The type is decided once a run.
void read_run(const Column& c, int64_t k0, int64_t n, int64_t k, float* out) {
  const int64_t inside = c.source ? (k - k0 < n ? k - k0 : n) : 0;
  for (int64_t i = inside < 0 ? 0 : inside; i < n; ++i) out[i] = 0.0f;
  if (inside <= 0) return;
  const MatrixSource& s = *c.source;
  const int64_t base = c.row * s.n_stride + k0 * s.k_stride;
  if (s.type == DType::kFloat32) {
    const float* f = static_cast<const float*>(s.data) + base;
    for (int64_t i = 0; i < inside; ++i) out[i] = f[i * s.k_stride];
  } else if (s.type == DType::kBFloat16) {
    const uint16_t* h = static_cast<const uint16_t*>(s.data) + base;
    for (int64_t i = 0; i < inside; ++i) out[i] = bf16_to_float(h[i * s.k_stride]);
  } else {  // the rarer ones: fp16, float8 with scales, MXFP4 blocks
    for (int64_t i = 0; i < inside; ++i) out[i] = s.at(c.row, k0 + i);
  }
}

// k values packed at a time: 32 columns of them (2 KiB) stay in L1 while they are dealt out.
constexpr int64_t kRun = 16;

void pack_f32(const Column* columns, int64_t k, char* out) {
  float* f = reinterpret_cast<float*>(out);
  for (int64_t k0 = 0; k0 < k; k0 += kRun) {
    const int64_t n = k - k0 < kRun ? k - k0 : kRun;
    for (int c = 0; c < kPanel; ++c) {
      float run[kRun];
      read_run(columns[c], k0, n, k, run);
      for (int64_t i = 0; i < n; ++i) f[(k0 + i) * kPanel + c] = run[i];
    }
  }
}

void pack_bf16(const Column* columns, int64_t k, int64_t steps, char* out) {
  uint16_t* h = reinterpret_cast<uint16_t*>(out);
  for (int64_t k0 = 0; k0 < steps * 2; k0 += kRun) {
    const int64_t n = steps * 2 - k0 < kRun ? steps * 2 - k0 : kRun;
    for (int c = 0; c < kPanel; ++c) {
      float run[kRun];
      read_run(columns[c], k0, n, k, run);
      for (int64_t i = 0; i < n; ++i) h[(((k0 + i) >> 1) * kPanel + c) * 2 + ((k0 + i) & 1)] = float_to_bf16(run[i]);
    }
  }
}

// Codes and exponents of one column as the checkpoint has them: no value is rounded, not even -0.
void copy_mxfp4_column(PackedMatrix& m, int64_t p, int c, const Column& column) {
  unsigned char* data = m.data.as<unsigned char>() + p * m.steps * kStepBytes + c * 4;
  uint8_t* exponent = m.exponent.as<uint8_t>() + p * m.groups() * kPanel + c;
  if (!column.source) {
    for (int64_t g = 0; g < m.groups(); ++g) exponent[g * kPanel] = 127;
    return;
  }
  const MatrixSource& s = *column.source;
  const auto* in = static_cast<const uint8_t*>(s.data) + column.row * s.n_stride;
  for (int64_t g = 0; g < m.groups(); ++g) exponent[g * kPanel] = s.exponent[column.row * (s.n_stride / 16) + g];
  auto code = [](const uint8_t* b, int i) { return b[i / 2] >> (i % 2 * 4) & 15; };
  for (int64_t step = 0; step < m.steps; ++step, in += 4, data += kStepBytes) {
    for (int i = 0; i < 4; ++i) data[i] = static_cast<unsigned char>(code(in, i) | code(in, i + 4) << 4);
  }
}

// E4M3 codes as they come, with the scales of their blocks.
void copy_f8_column(PackedMatrix& m, int64_t p, int c, const Column& column, int64_t k) {
  unsigned char* data = m.data.as<unsigned char>() + p * m.steps * kStepBytes;
  float* scale = m.scale.as<float>() + p * m.groups() * kPanel + c;
  for (int64_t g = 0; g < m.groups(); ++g) {
    scale[g * kPanel] = column.source ? column.source->scale_at(column.row, g * kBlock) : 0.0f;
  }
  if (!column.source) return;
  const MatrixSource& s = *column.source;
  for (int64_t i = 0; i < k; ++i) {
    data[(i / 4 * kPanel + c) * 4 + i % 4] =
        static_cast<const uint8_t*>(s.data)[column.row * s.n_stride + i * s.k_stride];
  }
}

// max|w| / 448 of every block of 128 x 128, row-major.
bool block_scales(const MatrixSource& s, int64_t n, int64_t k, const Exec& exec, float* out) {
  const int64_t across = (k + kBlock - 1) / kBlock;
  return parallel_for(exec, (n + kBlock - 1) / kBlock, 1, [&](int64_t begin, int64_t end) {
    for (int64_t r = begin * kBlock; r < std::min(end * kBlock, n); ++r) {
      float* row = out + r / kBlock * across;
      for (int64_t b = 0; b < across; ++b) {
        float amax = r % kBlock == 0 ? 0.0f : row[b];
        for (int64_t i = b * kBlock; i < std::min((b + 1) * kBlock, k); ++i) amax = std::fmax(amax, std::fabs(s.at(r, i)));
        row[b] = amax;
      }
      if (r % kBlock == kBlock - 1 || r == n - 1) {
        for (int64_t b = 0; b < across; ++b) row[b] /= 448.0f;
      }
    }
  });
}

bool has_scale(PackType type) {
  return type == PackType::kInt8 || type == PackType::kInt4 || type == PackType::kFloat8;
}

bool allocate(PackedMatrix& out) {
  const size_t scales = static_cast<size_t>(out.panels * out.groups() * kPanel);
  if (!out.data.reset(static_cast<size_t>(out.panels * out.steps * kStepBytes))) return false;
  if (has_scale(out.type) && !out.scale.reset(scales * sizeof(float))) return false;
  if (out.type == PackType::kInt8 && !out.zero.reset(scales * sizeof(int32_t))) return false;
  if (out.zero_points && !out.point.reset(scales)) return false;
  return out.type != PackType::kMxfp4 || out.exponent.reset(scales);
}

}  // namespace

void shape_matrix(PackedMatrix& out, PackType type, bool pair, int64_t n, int64_t k, const PackOptions& options) {
  out.type = type;
  out.k = k;
  out.columns = pair ? 2 * n : n;
  out.panels = pair ? round_up_to(n, kHalfPanel) / kHalfPanel : round_up_to(n, kPanel) / kPanel;
  out.steps = round_up_to(k, pack_unit(type)) / pack_unit(type);
  const bool four_bits = type == PackType::kInt4 || type == PackType::kMxfp4;
  out.group = four_bits ? options.group : type == PackType::kFloat8 ? kBlock : 0;
  out.zero_points = type == PackType::kInt4 && !options.symmetric;
}

int64_t packed_bytes(const PackedMatrix& m) {
  const int64_t scales = m.panels * m.groups() * kPanel;
  int64_t n = m.panels * m.steps * kStepBytes;
  if (has_scale(m.type)) n += scales * static_cast<int64_t>(sizeof(float));
  if (m.type == PackType::kInt8) n += scales * static_cast<int64_t>(sizeof(int32_t));
  if (m.zero_points || m.type == PackType::kMxfp4) n += scales;
  return n;
}

Status pack_matrix(PackedMatrix& out, PackType type, const MatrixSource& first, const MatrixSource& second, int64_t n,
                   int64_t k, const PackOptions& options, const Exec& exec) {
  const bool pair = second.data != nullptr;
  shape_matrix(out, type, pair, n, k, options);
  if (!allocate(out)) return kNoMemory;

  const bool copy = type == PackType::kFloat8 && first.type == DType::kFloat8E4M3;
  const int64_t across = (k + kBlock - 1) / kBlock, blocks = (n + kBlock - 1) / kBlock * across;
  HugeBuffer scales;
  if (type == PackType::kFloat8 && !copy) {
    if (!scales.reset(static_cast<size_t>((pair ? 2 : 1) * blocks) * sizeof(float))) return kNoMemory;
    if (!block_scales(first, n, k, exec, scales.as<float>())) return kCancelled;
    if (pair && !block_scales(second, n, k, exec, scales.as<float>() + blocks)) return kCancelled;
  }

  std::atomic<bool> failed{false};
  std::atomic<int64_t> bad{INT64_MAX};  // smallest index of a value that the type cannot hold
  const int64_t padded = out.steps * pack_unit(type);
  const bool done = parallel_for(exec, out.panels, 1, [&](int64_t begin, int64_t end) {
    for (int64_t p = begin; p < end; ++p) {
      Column columns[kPanel];
      for (int c = 0; c < kPanel; ++c) columns[c] = column_of(first, second, n, p, c);
      char* data = out.data.as<char>() + p * out.steps * kStepBytes;
      if (type == PackType::kFloat32) {
        pack_f32(columns, k, data);
        continue;
      }
      if (type == PackType::kBFloat16) {
        pack_bf16(columns, k, out.steps, data);
        continue;
      }
      std::memset(data, 0, static_cast<size_t>(out.steps * kStepBytes));
      auto* w = static_cast<float*>(Workspace::local().get(static_cast<size_t>(padded) * sizeof(float)));
      if (!w) return failed.store(true);
      for (int c = 0; c < kPanel; ++c) {
        const Column& column = columns[c];
        if (type == PackType::kMxfp4 && first.exponent) {
          copy_mxfp4_column(out, p, c, column);
          continue;
        }
        read_run(column, 0, padded, k, w);
        int64_t i = 0;
        while (i < padded && std::isfinite(w[i])) ++i;
        if (i < padded) {
          const int64_t index = (column.second ? n * k : 0) + column.row * k + i;
          int64_t seen = bad.load();
          while (index < seen && !bad.compare_exchange_weak(seen, index)) {
          }
        } else if (copy) {
          copy_f8_column(out, p, c, column, k);
        } else {
          quantize_column(out, p, c, w, options, [&](int64_t g) {
            const int64_t block = (column.second ? blocks : 0) + column.row / kBlock * across + g;
            return column.source ? scales.as<float>()[block] : 0.0f;
          });
        }
      }
    }
  });
  if (failed.load()) return kNoMemory;
  if (!done) return kCancelled;
  return bad.load() == INT64_MAX ? kOk : bad_value(bad.load());
}

}  // namespace heddle
