// The driver of experts_backward.h: sorting, scratch and phases. Everything per element is in the stages.
#include "moe/experts_backward.h"

#include <algorithm>

namespace heddle {

#define HEDDLE_STAGES(isa)                    \
  namespace isa {                             \
  const BackwardStages& backward_stages();    \
  }
#if defined(__x86_64__) || defined(_M_X64)
HEDDLE_STAGES(avx512)
HEDDLE_STAGES(avx2)
#endif
#if defined(__aarch64__) || defined(_M_ARM64)
HEDDLE_STAGES(neon)
#endif
HEDDLE_STAGES(scalar)

const BackwardStages& backward_stages(Isa isa) {
  switch (isa) {
#if defined(__x86_64__) || defined(_M_X64)
    case Isa::kAvx512: return avx512::backward_stages();
    case Isa::kAvx2: return avx2::backward_stages();
#endif
#if defined(__aarch64__) || defined(_M_ARM64)
    case Isa::kNeon: return neon::backward_stages();
#endif
    default: return scalar::backward_stages();
  }
}

namespace {

struct Tile {
  int64_t begin;  // first sorted row
  int32_t expert, rows;
};

// The routes sorted by expert, ascending within one.
struct Routes {
  std::vector<int64_t> offset;     // [experts + 1]: first sorted row
  std::vector<int32_t> token;      // [rows]
  std::vector<int64_t> route;      // [rows]: t * k + j
  std::vector<float> weight;       // [rows]
  std::vector<int64_t> position;   // [tokens * k]: sorted row, -1 without one
  std::vector<Tile> tiles;
  std::vector<int64_t> first_tile;  // [experts + 1]
  int64_t rows = 0;
};

void sort_routes(Routes& s, const ExpertsBackwardArgs& a, int max_rows) {
  const size_t experts = a.sources.size();
  const int64_t routes = a.tokens * a.k;
  s.offset.assign(experts + 1, 0);
  for (int64_t r = 0; r < routes; ++r) {
    if (a.indices[r] >= 0) ++s.offset[static_cast<size_t>(a.indices[r]) + 1];
  }
  for (size_t e = 0; e < experts; ++e) s.offset[e + 1] += s.offset[e];
  s.rows = s.offset[experts];
  const size_t rows = static_cast<size_t>(s.rows);
  s.token.resize(rows), s.route.resize(rows), s.weight.resize(rows);
  s.position.assign(static_cast<size_t>(routes), -1);
  std::vector<int64_t> next(s.offset.begin(), s.offset.end() - 1);
  for (int64_t r = 0; r < routes; ++r) {
    if (a.indices[r] < 0) continue;
    const int64_t row = next[static_cast<size_t>(a.indices[r])]++;
    s.token[static_cast<size_t>(row)] = static_cast<int32_t>(r / a.k);
    s.route[static_cast<size_t>(row)] = r;
    s.weight[static_cast<size_t>(row)] = a.weights[r];
    s.position[static_cast<size_t>(r)] = row;
  }
  s.first_tile.push_back(0);
  for (size_t e = 0; e < experts; ++e) {
    const int64_t n = s.offset[e + 1] - s.offset[e], count = (n + max_rows - 1) / max_rows;
    for (int64_t i = 0; i < count; ++i) {
      const int64_t from = n * i / count, to = n * (i + 1) / count;
      s.tiles.push_back({s.offset[e] + from, static_cast<int32_t>(e), static_cast<int32_t>(to - from)});
    }
    s.first_tile.push_back(static_cast<int64_t>(s.tiles.size()));
  }
}

MatrixSource transposed(const MatrixSource& s) { return {s.data, s.type, s.k_stride, s.n_stride}; }

// Extents of a product with k inputs; no data, panels are packed by the tasks.
void shape_for(PackedMatrix& m, PackType type, int64_t k) {
  m.type = type;
  m.k = k;
  m.steps = (k + pack_unit(type) - 1) / pack_unit(type);
}

void multiply(const TileKernels& kernels, const void* operand, int rows, const char* panel, int64_t steps, float* c,
              bool accumulate) {
  TileCall t{};
  t.a = operand;
  t.b = panel;
  t.steps = steps;
  t.c = c;
  t.accumulate = accumulate;
  kernels.tile[rows](t);
}

int64_t panels_of(int64_t n) { return (n + kPanel - 1) / kPanel; }

constexpr int64_t kTileFloats = kMaxTileRows * kPanel;

class Backward {
 public:
  Backward(const ExpertsBackwardArgs& args, const Exec& e)
      : a(args), exec(e), stages(backward_stages(e.isa)), kernels(tile_kernels(e.isa, args.pack)),
        float_kernels(tile_kernels(e.isa, PackType::kFloat32)), kind(operand_kind(e.isa, args.pack)),
        d(args.hidden), f(args.intermediate), experts(static_cast<int64_t>(args.sources.size())) {}

  Status run() {
    sort_routes(s, a, kernels.max_rows);
    shape_for(by_d, a.pack, d);
    shape_for(by_f, a.pack, f);
    d_row = operand_row_bytes(kind, by_d);
    f_row = operand_row_bytes(kind, by_f);
    stride = panels_of(f) * kPanel;
    const int64_t first = std::max(d_row, 4 * d), second = std::max({d_row, 2 * f_row, 8 * f});
    const int64_t parts = panels_of(f) + 1;
    const int64_t bytes = s.rows * (first + second + (a.gated ? 3 : 2) * stride * 4 + parts * 4);
    if (!scratch.reset(static_cast<size_t>(bytes))) return kNoMemory;
    x_rows = scratch.as<char>();
    y_rows = x_rows + s.rows * first;
    x_step = first, y_step = second;
    h = reinterpret_cast<float*>(y_rows + s.rows * second);
    du = h + s.rows * stride;
    part = du + s.rows * stride;
    dg = part + s.rows * parts;  // last: ungated layers have none
    part_stride = parts;

    using Phase = bool (Backward::*)();
    for (Phase phase : {&Backward::pack_inputs, &Backward::recompute, &Backward::pack_hidden, &Backward::grad_routes,
                        &Backward::combine, &Backward::pack_weight_operands, &Backward::grad_gate_up, &Backward::grad_down}) {
      const bool done = (this->*phase)();
      if (failed.load()) return kNoMemory;
      if (!done) return kCancelled;
    }
    return kOk;
  }

 private:
  // Scratch of this thread for one task.
  float* local(int64_t bytes) {
    void* p = Workspace::local().get(static_cast<size_t>(bytes));
    if (!p) failed.store(true);
    return static_cast<float*>(p);
  }
  bool for_tiles(int64_t floats, void (Backward::*body)(const Tile&, float*)) {
    return parallel_for(exec, static_cast<int64_t>(s.tiles.size()), 1 + 4096 / stride, [&](int64_t begin, int64_t end) {
      float* rows = local(floats * 4);
      for (int64_t i = begin; rows && i < end; ++i) (this->*body)(s.tiles[static_cast<size_t>(i)], rows);
    });
  }
  // One task per expert and panel.
  bool for_panels(int64_t panels, int64_t bytes, void (Backward::*body)(size_t expert, int64_t panel, char* memory)) {
    return parallel_for(exec, experts * panels, 1 + 65536 / bytes, [&](int64_t begin, int64_t end) {
      char* memory = reinterpret_cast<char*>(local(bytes));
      for (int64_t i = begin; memory && i < end; ++i) (this->*body)(static_cast<size_t>(i / panels), i % panels, memory);
    });
  }
  int64_t rows_of(size_t e) const { return s.offset[e + 1] - s.offset[e]; }

  // 1.
  bool pack_inputs() { return for_tiles(kMaxTileRows * by_d.steps * pack_unit(a.pack), &Backward::pack_input_tile); }
  void pack_input_tile(const Tile& t, float* rows) {
    const float* bias = a.sources[static_cast<size_t>(t.expert)].down_bias;
    const int32_t* token = s.token.data() + t.begin;
    float dot[kMaxTileRows] = {};
    stages.pack_tokens(a.x, a.type, token, t.rows, by_d, kind, nullptr, nullptr, rows, x_rows + t.begin * x_step);
    stages.pack_tokens(a.grad_output, a.grad_type, token, t.rows, by_d, kind, bias, dot, rows, y_rows + t.begin * y_step);
    for (int m = 0; m < t.rows; ++m) part[(t.begin + m + 1) * part_stride - 1] = dot[m];
  }

  // 2.
  bool recompute() { return for_panels(panels_of(f), 3 * (by_d.steps * kStepBytes + kTileFloats * 4), &Backward::recompute_panel); }
  void recompute_panel(size_t e, int64_t p, char* memory) {
    if (rows_of(e) == 0) return;
    const ExpertSource& source = a.sources[e];
    const int64_t bytes = by_d.steps * kStepBytes;
    char *gate = memory, *up = gate + bytes, *down = up + bytes;
    float *g = reinterpret_cast<float*>(down + bytes), *u = g + kTileFloats, *dh = u + kTileFloats;
    if (a.gated) stages.pack_panel(a.pack, source.gate, nullptr, p * kPanel, f, d, gate);
    stages.pack_panel(a.pack, source.up, nullptr, p * kPanel, f, d, up);
    stages.pack_panel(a.pack, transposed(source.down), nullptr, p * kPanel, f, d, down);
    for (int64_t i = s.first_tile[e]; i < s.first_tile[e + 1]; ++i) {
      const Tile& t = s.tiles[static_cast<size_t>(i)];
      const char *x = x_rows + t.begin * x_step, *y = y_rows + t.begin * y_step;
      if (a.gated) multiply(kernels, x, t.rows, gate, by_d.steps, g, false);
      multiply(kernels, x, t.rows, up, by_d.steps, u, false);
      multiply(kernels, y, t.rows, down, by_d.steps, dh, false);
      const int64_t at = t.begin * stride;
      stages.differentiate(a, source, p * kPanel, g, u, dh, s.weight.data() + t.begin, t.rows, h + at,
                           a.gated ? dg + at : nullptr, du + at, stride, part + t.begin * part_stride + p, part_stride);
    }
  }

  // 3. y_rows is free: the operands of dg, then of du.
  bool pack_hidden() {
    std::fill_n(a.grad_weights, a.tokens * a.k, 0.0f);
    return for_tiles(1, &Backward::pack_hidden_tile);
  }
  void pack_hidden_tile(const Tile& t, float*) {
    char* out = y_rows + t.begin * y_step;
    if (a.gated) stages.pack_rows(by_f, kind, dg + t.begin * stride, stride, t.rows, out);
    stages.pack_rows(by_f, kind, du + t.begin * stride, stride, t.rows, out + t.rows * f_row);
    for (int64_t r = t.begin; r < t.begin + t.rows; ++r) {
      float sum = 0;
      for (int64_t p = 0; p < part_stride; ++p) sum += part[r * part_stride + p];
      a.grad_weights[s.route[static_cast<size_t>(r)]] = sum;
    }
  }

  // 4. x_rows is free: dx of each route, [d] floats each x_step bytes.
  bool grad_routes() { return for_panels(panels_of(d), 2 * by_f.steps * kStepBytes + kTileFloats * 4, &Backward::grad_routes_panel); }
  void grad_routes_panel(size_t e, int64_t p, char* memory) {
    if (rows_of(e) == 0) return;
    const int64_t bytes = by_f.steps * kStepBytes;
    char *gate = memory, *up = gate + bytes;
    float* c = reinterpret_cast<float*>(up + bytes);
    if (a.gated) stages.pack_panel(a.pack, transposed(a.sources[e].gate), nullptr, p * kPanel, d, f, gate);
    stages.pack_panel(a.pack, transposed(a.sources[e].up), nullptr, p * kPanel, d, f, up);
    for (int64_t i = s.first_tile[e]; i < s.first_tile[e + 1]; ++i) {
      const Tile& t = s.tiles[static_cast<size_t>(i)];
      const char* in = y_rows + t.begin * y_step;
      if (a.gated) multiply(kernels, in, t.rows, gate, by_f.steps, c, false);
      multiply(kernels, in + t.rows * f_row, t.rows, up, by_f.steps, c, a.gated);
      stages.write(c, t.rows, d - p * kPanel, route_dx(t.begin) + p * kPanel, x_step / 4, 1);
    }
  }
  float* route_dx(int64_t row) const { return reinterpret_cast<float*>(x_rows + row * x_step); }

  // 5.
  bool combine() {
    const ExpertStages& forward = expert_stages(exec.isa);
    const size_t slots = static_cast<size_t>(a.k) + 1;  // never 0
    return parallel_for(exec, a.tokens, 1 + 65536 / (d * (a.k + 1)), [&](int64_t begin, int64_t end) {
      auto* row = reinterpret_cast<const float**>(local(static_cast<int64_t>(slots * (sizeof(float*) + sizeof(float)))));
      if (!row) return;
      float* one = reinterpret_cast<float*>(row + slots);
      std::fill_n(one, slots, 1.0f);
      for (int64_t t = begin; t < end; ++t) {
        int64_t count = 0;
        for (int64_t j = 0; j < a.k; ++j) {
          const int64_t r = s.position[static_cast<size_t>(t * a.k + j)];
          if (r >= 0) row[count++] = route_dx(r);
        }
        forward.combine(row, one, count, d, a.grad_x, DType::kFloat32, t * d);
      }
    });
  }

  // 6. Both regions are free: of an expert with n routes, tiles of columns, each [n][columns].
  bool pack_weight_operands() {
    const int64_t panels = panels_of(std::max(d, f));
    return parallel_for(exec, experts * panels, 1 + 512 / (longest() + 1), [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) pack_weight_operand_panel(static_cast<size_t>(i / panels), i % panels);
    });
  }
  void pack_weight_operand_panel(size_t e, int64_t p) {
    const int64_t begin = s.offset[e], n = rows_of(e);
    const ExpertGradient& out = a.gradients[e];
    float *y = reinterpret_cast<float*>(x_rows + begin * x_step), *hidden = reinterpret_cast<float*>(y_rows + begin * y_step);
    columns_of_panel(d, p, [&](int64_t c, int count) {
      stages.pack_columns(a.grad_output, a.grad_type, d, s.token.data() + begin, s.weight.data() + begin, c, count, n, y + c * n,
                          out.down_bias ? out.down_bias + c : nullptr, 1);
    });
    columns_of_panel(f, p, [&](int64_t c, int count) {
      const int64_t b = c * a.bias_stride;
      if (a.gated) {
        stages.pack_columns(dg + begin * stride, DType::kFloat32, stride, nullptr, nullptr, c, count, n, hidden + c * n,
                            out.gate_bias ? out.gate_bias + b : nullptr, a.bias_stride);
      }
      stages.pack_columns(du + begin * stride, DType::kFloat32, stride, nullptr, nullptr, c, count, n, hidden + (f + c) * n,
                          out.up_bias ? out.up_bias + b : nullptr, a.bias_stride);
    });
  }
  // The column tiles that panel `p` of `width` columns is responsible for: those that begin in it.
  template <class Body>
  void columns_of_panel(int64_t width, int64_t p, const Body& body) const {
    const int64_t rows = float_kernels.max_rows;
    const int64_t end = std::min(width, (p + 1) * kPanel);
    for (int64_t c = (p * kPanel + rows - 1) / rows * rows; c < end; c += rows) {
      body(c, static_cast<int>(std::min(rows, width - c)));
    }
  }

  // 7.
  int64_t longest() const {
    int64_t n = 0;
    for (size_t e = 0; e + 1 < s.offset.size(); ++e) n = std::max(n, rows_of(e));
    return n;
  }
  bool grad_gate_up() { return for_panels(panels_of(d), longest() * kStepBytes + kTileFloats * 4, &Backward::grad_gate_up_panel); }
  void grad_gate_up_panel(size_t e, int64_t p, char* memory) {
    const int64_t begin = s.offset[e], n = rows_of(e);
    const MatrixSource x{a.x, a.type, 1, d};
    float* c = reinterpret_cast<float*>(memory);
    char* panel = memory + kTileFloats * 4;
    stages.pack_panel(PackType::kFloat32, x, s.token.data() + begin, p * kPanel, d, n, panel);
    const float* hidden = reinterpret_cast<float*>(y_rows + begin * y_step);
    if (a.gated) product_rows(hidden, f, n, panel, c, a.gradients[e].gate, a.sources[e].up, p, d);
    product_rows(hidden + f * n, f, n, panel, c, a.gradients[e].up, a.sources[e].up, p, d);
  }
  bool grad_down() { return for_panels(panels_of(f), longest() * kStepBytes + kTileFloats * 4, &Backward::grad_down_panel); }
  void grad_down_panel(size_t e, int64_t p, char* memory) {
    const int64_t begin = s.offset[e], n = rows_of(e);
    const MatrixSource hidden{h + begin * stride, DType::kFloat32, 1, stride};
    float* c = reinterpret_cast<float*>(memory);
    char* panel = memory + kTileFloats * 4;
    stages.pack_panel(PackType::kFloat32, hidden, nullptr, p * kPanel, f, n, panel);
    const float* y = reinterpret_cast<float*>(x_rows + begin * x_step);
    product_rows(y, d, n, panel, c, a.gradients[e].down, a.sources[e].down, p, f);
  }
  // out[0..width)[panel p of k columns] = operands^T panel, laid out as `like`. n = 0 writes zeros.
  void product_rows(const float* operands, int64_t width, int64_t n, const char* panel, float* c, float* out,
                    const MatrixSource& like, int64_t p, int64_t k) const {
    for (int64_t w = 0; w < width; w += float_kernels.max_rows) {
      const int count = static_cast<int>(std::min<int64_t>(float_kernels.max_rows, width - w));
      multiply(float_kernels, operands + w * n, count, panel, n, c, false);
      stages.write(c, count, k - p * kPanel, out + w * like.n_stride + p * kPanel * like.k_stride, like.n_stride, like.k_stride);
    }
  }

  const ExpertsBackwardArgs& a;
  const Exec& exec;
  const BackwardStages& stages;
  const TileKernels &kernels, &float_kernels;
  const Operand kind;
  const int64_t d, f, experts;
  Routes s;
  PackedMatrix by_d, by_f;
  HugeBuffer scratch;
  int64_t d_row = 0, f_row = 0, x_step = 0, y_step = 0;  // bytes
  int64_t stride = 0, part_stride = 0;                   // floats
  char *x_rows = nullptr, *y_rows = nullptr;
  float *h = nullptr, *dg = nullptr, *du = nullptr, *part = nullptr;
  std::atomic<bool> failed{false};
};

}  // namespace

Status experts_backward(const ExpertsBackwardArgs& a, const Exec& exec) {
  const int64_t experts = static_cast<int64_t>(a.sources.size());
  for (int64_t r = 0; r < a.tokens * a.k; ++r) {
    if (a.indices[r] < -1 || a.indices[r] >= experts) return bad_value(r);
  }
  try {
    Backward backward(a, exec);
    return backward.run();
  } catch (const std::bad_alloc&) {
    return kNoMemory;
  }
}

}  // namespace heddle
