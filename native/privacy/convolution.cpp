#include "privacy/convolution.h"

#include <atomic>
#include <cstring>
#include <new>
#include <numeric>
#include <vector>

#include "core/workspace.h"
#include "privacy/clipped_gradients.h"
#include "privacy/compact.h"
#include "privacy/product.h"

namespace heddle {
namespace {

struct Sizes {
  explicit Sizes(const ConvLayer& l) {
    const ConvGeometry& s = l.shape;
    places = int64_t{s.out[0]} * s.out[1] * s.out[2];
    plane = int64_t{s.size[0]} * s.size[1] * s.size[2];
    taps = int64_t{s.kernel[0]} * s.kernel[1] * s.kernel[2];
    inputs = l.in_channels / l.groups * taps;
    outputs = l.out_channels / l.groups;
  }
  int64_t places, plane, taps, inputs, outputs;  // inputs, outputs: d and p of one group
};

template <class Read>
void unfold_row(const ConvGeometry& s, int64_t tap, float* out, const Read& read) {
  const int64_t k2 = tap % s.kernel[2], k1 = tap / s.kernel[2] % s.kernel[1], k0 = tap / s.kernel[2] / s.kernel[1];
  const int64_t x2 = k2 * s.dilation[2] - s.padding[2];
  // Places [from, to) read inside the input; what lies outside is padding.
  const int64_t step = s.stride[2];
  const int64_t from = std::min<int64_t>(s.out[2], x2 < 0 ? (-x2 + step - 1) / step : 0);
  const int64_t inside = s.size[2] - x2 > 0 ? (s.size[2] - x2 + step - 1) / step : 0;
  const int64_t to = std::max(from, std::min<int64_t>(s.out[2], inside));
  for (int64_t o0 = 0; o0 < s.out[0]; ++o0) {
    const int64_t i0 = o0 * s.stride[0] - s.padding[0] + k0 * s.dilation[0];
    for (int64_t o1 = 0; o1 < s.out[1]; ++o1, out += s.out[2]) {
      const int64_t i1 = o1 * s.stride[1] - s.padding[1] + k1 * s.dilation[1];
      if (i0 < 0 || i0 >= s.size[0] || i1 < 0 || i1 >= s.size[1]) {
        std::fill(out, out + s.out[2], 0.0f);
        continue;
      }
      const int64_t line = (i0 * s.size[1] + i1) * s.size[2] + x2;
      std::fill(out, out + from, 0.0f);
      if (step == 1) {
        for (int64_t o2 = from; o2 < to; ++o2) out[o2] = read(line + o2);
      } else {
        for (int64_t o2 = from; o2 < to; ++o2) out[o2] = read(line + o2 * step);
      }
      std::fill(out + to, out + s.out[2], 0.0f);
    }
  }
}

// The output places of one sample that are read.
struct Places {
  bool get(const ConvLayer& l, const Sizes& z, int64_t sample) try {
    count = z.places, masked = l.mask != nullptr;
    if (!masked) return true;
    unpadded(l.mask, sample, z.places, list);
    count = static_cast<int64_t>(list.size());
    return true;
  } catch (const std::bad_alloc&) {
    return false;
  }
  bool masked = false;
  int64_t count = 0;
  std::vector<int64_t> list;
};

// Rows [first, first + count) of one sample's and group's U, one value for each of `places`. `out` also has room for
// the padded ones of one row.
void unfold(const ConvLayer& l, const Sizes& z, const Places& places, int64_t sample, int64_t group, int64_t first,
            int64_t count, float* out) {
  for (int64_t r = first; r < first + count; ++r, out += places.count) {
    const int64_t channel = sample * l.in_channels + group * (l.in_channels / l.groups) + r / z.taps;
    const int64_t at = channel * z.plane;
    if (l.input_type == DType::kFloat32) {
      const float* x = static_cast<const float*>(l.input) + at;
      unfold_row(l.shape, r % z.taps, out, [x](int64_t i) { return x[i]; });
    } else {
      const uint16_t* x = static_cast<const uint16_t*>(l.input) + at;
      if (l.input_type == DType::kBFloat16) unfold_row(l.shape, r % z.taps, out, [x](int64_t i) { return bf16_to_float(x[i]); });
      else unfold_row(l.shape, r % z.taps, out, [x](int64_t i) { return f16_to_float(x[i]); });
    }
    if (places.masked) {
      for (int64_t i = 0; i < places.count; ++i) out[i] = out[places.list[static_cast<size_t>(i)]];
    }
  }
}

// Gradient rows [first, first + count) of one sample and group, without padded places in `copy`.
RowSource gradients(const ConvLayer& l, const Sizes& z, const Places& places, int64_t sample, int64_t group,
                    int64_t first, int64_t count, float* copy) {
  const int64_t row = sample * l.out_channels + group * z.outputs + first;
  const RowSource all = {l.grad_outputs, l.grad_type, z.places};
  if (!places.masked) {
    return {static_cast<const char*>(l.grad_outputs) + row * z.places * dtype_size(l.grad_type), l.grad_type, z.places};
  }
  for (int64_t r = 0; r < count; ++r) gather_row(all, row + r, places.list, copy + r * places.count);
  return {copy, DType::kFloat32, places.count};
}

bool identity(std::vector<int64_t>& list, int64_t count) try {
  list.resize(static_cast<size_t>(count));
  std::iota(list.begin(), list.end(), int64_t{0});
  return true;
} catch (const std::bad_alloc&) {
  return false;
}

// Ghost norm: x runs over places, y over rows of U and of G. Bias: (U Uᵀ + 1).
double ghost_norm(const PrivacyKernels& k, const ChunkScratch& s, const Sizes& z, int64_t places, const RowSource& u,
                  const RowSource& g, const int64_t* list, bool bias) {
  double total = 0;
  for (int64_t x1 = 0; x1 < places; x1 += kChunk) {
    for (int64_t x0 = 0; x0 <= x1; x0 += kChunk) {
      ChunkProduct a;
      a.p.source = u, a.p.rows = list, a.q = a.p;
      a.x0 = x0, a.n0 = std::min<int64_t>(kChunk, places - x0);
      a.x1 = x1, a.n1 = std::min<int64_t>(kChunk, places - x1);
      a.depth = z.inputs, a.symmetric = x0 == x1;
      ChunkProduct b = a;
      b.p.source = b.q.source = g, b.depth = z.outputs;
      a.run(k, s, true, s.first, nullptr, &b);
      b.run(k, s, true, s.second, nullptr, nullptr);
      const double d = chunk_dot(k, s.first, s.second, bias ? 1.0f : 0.0f, a.n0, a.n1, a.symmetric);
      total += a.symmetric ? d : 2 * d;
    }
  }
  return total < 0 ? 0 : total;
}

// x runs over rows of G, x' over rows of U, y over places.
ChunkProduct weight_chunk(int64_t places, const RowSource& u, const RowSource& g, const int64_t* list) {
  ChunkProduct c;
  c.p.source = g, c.q.source = u;
  c.p.rows = c.q.rows = list;
  c.p.by_rows = c.q.by_rows = false;
  c.depth = places;
  return c;
}

double gradient_norm(const PrivacyKernels& k, const ChunkScratch& s, const Sizes& z, int64_t places, const RowSource& u,
                     const RowSource& g, const int64_t* list, bool bias) {
  double total = 0;
  alignas(64) float sums[kChunk];
  for (int64_t x0 = 0; x0 < z.outputs; x0 += kChunk) {
    for (int64_t x1 = 0; x1 < z.inputs; x1 += kChunk) {
      ChunkProduct c = weight_chunk(places, u, g, list);
      c.x0 = x0, c.n0 = std::min<int64_t>(kChunk, z.outputs - x0);
      c.x1 = x1, c.n1 = std::min<int64_t>(kChunk, z.inputs - x1);
      const bool with = bias && x1 == 0;
      c.run(k, s, true, s.first, with ? sums : nullptr, nullptr);
      total += chunk_dot(k, s.first, s.first, 0.0f, c.n0, c.n1, false);
      for (int64_t r = 0; with && r < c.n0; ++r) total += static_cast<double>(sums[r]) * sums[r];
    }
  }
  return total;
}

}  // namespace

Status conv_squared_norms(const ConvNormsArgs& args, const Exec& exec) {
  const ConvLayer& l = args.layer;
  const Sizes z(l);
  const PrivacyKernels& k = privacy_kernels(exec.isa);
  std::vector<int64_t> list;
  std::vector<double> part;
  if (!identity(list, std::max(z.inputs, z.outputs))) return kNoMemory;
  try {
    part.assign(static_cast<size_t>(l.samples * l.groups), 0.0);
  } catch (const std::bad_alloc&) {
    return kNoMemory;
  }
  std::atomic<bool> failed{false};
  const bool done = parallel_for(exec, l.samples * l.groups, 1, [&](int64_t begin, int64_t end) {
    ChunkScratch s;
    Places places;
    const int64_t rows = z.inputs + (l.mask ? z.outputs : 0);
    auto* u = static_cast<float*>(Workspace::local().get(static_cast<size_t>(rows * z.places) * sizeof(float)));
    if (!u || !s.get()) return failed.store(true);
    for (int64_t task = begin; task < end; ++task) {
      const int64_t sample = task / l.groups, group = task % l.groups;
      if (!places.get(l, z, sample)) return failed.store(true);
      unfold(l, z, places, sample, group, 0, z.inputs, u);
      const RowSource us = {u, DType::kFloat32, places.count};
      const RowSource gs = gradients(l, z, places, sample, group, 0, z.outputs, u + z.inputs * z.places);
      part[static_cast<size_t>(task)] = args.method == NormMethod::kGhost
                                            ? ghost_norm(k, s, z, places.count, us, gs, list.data(), l.bias)
                                            : gradient_norm(k, s, z, places.count, us, gs, list.data(), l.bias);
    }
  });
  for (int64_t i = 0; i < l.samples; ++i) {
    double sum = 0;
    for (int64_t g = 0; g < l.groups; ++g) sum += part[static_cast<size_t>(i * l.groups + g)];
    args.out[i] = static_cast<float>(sum);
  }
  return failed.load() ? kNoMemory : done ? kOk : kCancelled;
}

Status conv_clipped_gradients(const ConvClippedArgs& args, const Exec& exec) {
  const ConvLayer& l = args.layer;
  const Sizes z(l);
  const PrivacyKernels& k = privacy_kernels(exec.isa);
  std::vector<int64_t> list;
  if (!identity(list, std::max(z.outputs, int64_t{kChunk}))) return kNoMemory;
  const int64_t rows = (z.outputs + kTall - 1) / kTall, columns = (z.inputs + kChunk - 1) / kChunk;
  std::atomic<bool> failed{false};
  const bool done = parallel_for(exec, l.groups * rows * columns, 1, [&](int64_t begin, int64_t end) {
    ChunkScratch s;
    Places places;
    const int64_t held = kChunk + (l.mask ? kTall : 0);
    auto* u = static_cast<float*>(Workspace::local().get(static_cast<size_t>(held * z.places) * sizeof(float)));
    if (!u || !s.get()) return failed.store(true);
    alignas(64) float sums[kTall];
    for (int64_t task = begin; task < end; ++task) {
      const int64_t group = task / (rows * columns), x0 = task / columns % rows * kTall, x1 = task % columns * kChunk;
      const int64_t n0 = std::min<int64_t>(kTall, z.outputs - x0), n1 = std::min<int64_t>(kChunk, z.inputs - x1);
      const bool bias = args.bias && x1 == 0;
      bool first = true;
      for (int64_t i = 0; i < l.samples && !exec.cancelled(); ++i) {
        if (args.factors[i] == 0.0f) continue;
        if (!places.get(l, z, i)) return failed.store(true);
        unfold(l, z, places, i, group, x1, n1, u);
        const RowSource gs = gradients(l, z, places, i, group, x0, n0, u + kChunk * z.places);
        ChunkProduct c = weight_chunk(places.count, {u, DType::kFloat32, places.count}, gs, list.data());
        c.x0 = 0, c.n0 = n0, c.x1 = 0, c.n1 = n1;  // both sources begin at the chunk's first row
        c.p.factor = args.factors[i];
        c.run(k, s, first, s.first, bias ? sums : nullptr, nullptr);
        first = false;
      }
      if (first || exec.cancelled()) continue;
      const int64_t channel = group * z.outputs + x0;
      add_chunk(s.first, n0, n1, args.weight + channel * z.inputs + x1, z.inputs);
      for (int64_t r = 0; bias && r < n0; ++r) args.bias[channel + r] += sums[r];
    }
  });
  return failed.load() ? kNoMemory : done && !exec.cancelled() ? kOk : kCancelled;
}

}  // namespace heddle
