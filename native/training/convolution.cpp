#include "training/convolution.h"

#include <algorithm>
#include <atomic>
#include <cstring>
#include <new>
#include <vector>

#include "gemm/packed.h"

namespace heddle {
namespace {

// Everything that all samples share.
struct Plan {
  int64_t places = 0, taps = 0, inputs = 0, outputs = 0;  // inputs, outputs: d and p of one group
  int64_t padded[3] = {}, plane = 0, padded_plane = 0;
  int64_t max_rows = 0, tiles = 0;
  std::vector<int32_t> tap;    // [d] offset in the padded group
  std::vector<int32_t> place;  // [T] offset in the padded plane
  std::vector<PackedMatrix> weights;

  int64_t first_place(int64_t tile) const { return places * tile / tiles; }
};

Status make_plan(const ConvolutionArgs& a, bool transposed, const Exec& exec, Plan& plan) try {
  const Convolution& c = a.shape;
  plan.places = int64_t{c.out[0]} * c.out[1] * c.out[2];
  plan.taps = int64_t{c.kernel[0]} * c.kernel[1] * c.kernel[2];
  plan.plane = int64_t{c.size[0]} * c.size[1] * c.size[2];
  plan.inputs = c.in_channels / c.groups * plan.taps;
  plan.outputs = c.out_channels / c.groups;
  for (int i = 0; i < 3; ++i) plan.padded[i] = int64_t{c.size[i]} + 2 * int64_t{c.padding[i]};
  plan.padded_plane = plan.padded[0] * plan.padded[1] * plan.padded[2];
  plan.max_rows = tile_kernels(exec.isa, PackType::kFloat32).max_rows;
  plan.tiles = (plan.places + plan.max_rows - 1) / plan.max_rows;
  plan.tap.resize(static_cast<size_t>(plan.inputs));
  plan.place.resize(static_cast<size_t>(plan.places));
  int64_t i = 0;
  for (int64_t channel = 0; channel < c.in_channels / c.groups; ++channel) {
    for (int64_t k0 = 0; k0 < c.kernel[0]; ++k0) {
      for (int64_t k1 = 0; k1 < c.kernel[1]; ++k1) {
        for (int64_t k2 = 0; k2 < c.kernel[2]; ++k2) {
          const int64_t at = (k0 * c.dilation[0] * plan.padded[1] + k1 * c.dilation[1]) * plan.padded[2] + k2 * c.dilation[2];
          plan.tap[static_cast<size_t>(i++)] = static_cast<int32_t>(channel * plan.padded_plane + at);
        }
      }
    }
  }
  i = 0;
  for (int64_t o0 = 0; o0 < c.out[0]; ++o0) {
    for (int64_t o1 = 0; o1 < c.out[1]; ++o1) {
      for (int64_t o2 = 0; o2 < c.out[2]; ++o2) {
        const int64_t at = (o0 * c.stride[0] * plan.padded[1] + o1 * c.stride[1]) * plan.padded[2] + o2 * c.stride[2];
        plan.place[static_cast<size_t>(i++)] = static_cast<int32_t>(at);
      }
    }
  }
  plan.weights = std::vector<PackedMatrix>(static_cast<size_t>(c.groups));
  for (int64_t g = 0; g < c.groups; ++g) {
    MatrixSource source;
    source.data = a.weight + g * plan.outputs * plan.inputs;
    source.n_stride = transposed ? 1 : plan.inputs;
    source.k_stride = transposed ? plan.inputs : 1;
    const int64_t n = transposed ? plan.inputs : plan.outputs, k = transposed ? plan.outputs : plan.inputs;
    const Status status =
        pack_matrix(plan.weights[static_cast<size_t>(g)], PackType::kFloat32, source, MatrixSource(), n, k, PackOptions(), exec);
    if (status != kOk) return status;
  }
  return kOk;
} catch (const std::bad_alloc&) {
  return kNoMemory;
}

// Calls f(from, to) for every line of one channel: offsets in the plane and in the padded plane.
template <class F>
void each_line(const Convolution& c, const Plan& plan, F&& f) {
  for (int64_t i0 = 0; i0 < c.size[0]; ++i0) {
    for (int64_t i1 = 0; i1 < c.size[1]; ++i1) {
      f((i0 * c.size[1] + i1) * c.size[2],
        ((i0 + c.padding[0]) * plan.padded[1] + i1 + c.padding[1]) * plan.padded[2] + c.padding[2]);
    }
  }
}

// Scratch of one thread: padded channels of a sample, then the operand of a tile.
struct Scratch {
  float* sample;
  float* operand;
  bool get(const Convolution& c, const Plan& plan, int64_t depth) {
    const int64_t floats = c.in_channels * plan.padded_plane;
    sample = static_cast<float*>(Workspace::local().get(static_cast<size_t>(floats + depth * plan.max_rows + kPanel) * sizeof(float)));
    operand = sample + floats;
    return sample != nullptr;
  }
};

template <int kRows>
void gather(const float* from, const std::vector<int32_t>& tap, const int32_t* place, float* out) {
  for (const int32_t at : tap) {
    const float* x = from + at;
    for (int r = 0; r < kRows; ++r) out[r] = x[place[r]];
    out += kRows;
  }
}

// The operand [d][rows] of the unfolded input.
void unfold_tile(const float* from, const Plan& plan, const int32_t* place, int64_t rows, float* out) {
  switch (rows) {
    case 14: return gather<14>(from, plan.tap, place, out);
    case 13: return gather<13>(from, plan.tap, place, out);
    case 12: return gather<12>(from, plan.tap, place, out);
    case 6: return gather<6>(from, plan.tap, place, out);
    default: break;
  }
  for (const int32_t at : plan.tap) {
    for (int64_t r = 0; r < rows; ++r) *out++ = from[at + place[r]];
  }
}

int64_t sample_grain(const Plan& plan) { return 1 + 65536 / (1 + plan.places * plan.inputs); }

}  // namespace

Status convolution(const ConvolutionArgs& a, const Exec& exec) {
  const Convolution& c = a.shape;
  Plan plan;
  const Status status = make_plan(a, false, exec, plan);
  if (status != kOk) return status;
  const TileKernels& kernels = tile_kernels(exec.isa, PackType::kFloat32);
  std::atomic<bool> failed{false};
  const bool done = parallel_for(exec, c.samples, sample_grain(plan), [&](int64_t begin, int64_t end) {
    Scratch s;
    if (!s.get(c, plan, plan.inputs)) return failed.store(true);
    alignas(64) float block[kMaxTileRows * kPanel];
    std::fill(s.sample, s.sample + c.in_channels * plan.padded_plane, 0.0f);
    for (int64_t i = begin; i < end; ++i) {
      for (int64_t channel = 0; channel < c.in_channels; ++channel) {
        const float* from = a.x + (i * c.in_channels + channel) * plan.plane;
        float* to = s.sample + channel * plan.padded_plane;
        each_line(c, plan, [&](int64_t at, int64_t into) { std::memcpy(to + into, from + at, static_cast<size_t>(c.size[2]) * sizeof(float)); });
      }
      for (int64_t g = 0; g < c.groups; ++g) {
        const PackedMatrix& w = plan.weights[static_cast<size_t>(g)];
        const float* group = s.sample + g * (c.in_channels / c.groups) * plan.padded_plane;
        for (int64_t tile = 0; tile < plan.tiles; ++tile) {
          const int64_t first = plan.first_place(tile), rows = plan.first_place(tile + 1) - first;
          unfold_tile(group, plan, plan.place.data() + first, rows, s.operand);
          for (int64_t p = 0; p < w.panels; ++p) {
            TileCall t;
            fill_tile(t, Operand::kFloat32, w, p, reinterpret_cast<const char*>(s.operand), static_cast<int>(rows));
            t.c = block;
            kernels.tile[rows](t);
            const int64_t columns = std::min<int64_t>(kPanel, plan.outputs - p * kPanel);
            const int64_t channel = g * plan.outputs + p * kPanel;
            float* out = a.out + (i * c.out_channels + channel) * plan.places + first;
            for (int64_t n = 0; n < columns; ++n, out += plan.places) {
              const float bias = a.bias ? a.bias[channel + n] : 0.0f;
              for (int64_t r = 0; r < rows; ++r) out[r] = block[r * kPanel + n] + bias;
            }
          }
        }
      }
    }
  });
  return failed.load() ? kNoMemory : done ? kOk : kCancelled;
}

Status convolution_input_gradient(const ConvolutionArgs& a, const Exec& exec) {
  const Convolution& c = a.shape;
  Plan plan;
  const Status status = make_plan(a, true, exec, plan);
  if (status != kOk) return status;
  const TileKernels& kernels = tile_kernels(exec.isa, PackType::kFloat32);
  std::atomic<bool> failed{false};
  const bool done = parallel_for(exec, c.samples, sample_grain(plan), [&](int64_t begin, int64_t end) {
    Scratch s;
    if (!s.get(c, plan, plan.outputs)) return failed.store(true);
    alignas(64) float block[kMaxTileRows * kPanel];
    for (int64_t i = begin; i < end; ++i) {
      std::fill(s.sample, s.sample + c.in_channels * plan.padded_plane, 0.0f);
      for (int64_t g = 0; g < c.groups; ++g) {
        const PackedMatrix& w = plan.weights[static_cast<size_t>(g)];
        float* group = s.sample + g * (c.in_channels / c.groups) * plan.padded_plane;
        for (int64_t tile = 0; tile < plan.tiles; ++tile) {
          const int64_t first = plan.first_place(tile), rows = plan.first_place(tile + 1) - first;
          const float* from = a.x + (i * c.out_channels + g * plan.outputs) * plan.places + first;
          float* to = s.operand;
          for (int64_t n = 0; n < plan.outputs; ++n, from += plan.places, to += rows) {
            for (int64_t r = 0; r < rows; ++r) to[r] = from[r];
          }
          for (int64_t p = 0; p < w.panels; ++p) {
            TileCall t;
            fill_tile(t, Operand::kFloat32, w, p, reinterpret_cast<const char*>(s.operand), static_cast<int>(rows));
            t.c = block;
            kernels.tile[rows](t);
            const int64_t columns = std::min<int64_t>(kPanel, plan.inputs - p * kPanel);
            const int32_t* tap = plan.tap.data() + p * kPanel;
            for (int64_t r = 0; r < rows; ++r) {
              float* x = group + plan.place[static_cast<size_t>(first + r)];
              for (int64_t n = 0; n < columns; ++n) x[tap[n]] += block[r * kPanel + n];
            }
          }
        }
      }
      for (int64_t channel = 0; channel < c.in_channels; ++channel) {
        float* to = a.out + (i * c.in_channels + channel) * plan.plane;
        const float* from = s.sample + channel * plan.padded_plane;
        each_line(c, plan, [&](int64_t at, int64_t padded) { std::memcpy(to + at, from + padded, static_cast<size_t>(c.size[2]) * sizeof(float)); });
      }
    }
  });
  return failed.load() ? kNoMemory : done ? kOk : kCancelled;
}

}  // namespace heddle
