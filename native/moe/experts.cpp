// The driver of experts.h: sorting, scratch and phases. Everything that touches data per element is in the stages.
#include "moe/experts.h"

#include <algorithm>
#include <cstring>

namespace heddle {
namespace {

struct Tile {
  int32_t expert;
  int32_t rows;
  int64_t begin;  // first row of the sorted routes
};

// The routes of one bank, sorted by expert and cut into tiles.
struct Plan {
  std::vector<int32_t> token;      // [rows]: token of each sorted row
  std::vector<int64_t> position;   // [tokens * k]: sorted row of each route, -1 without one
  std::vector<Tile> tiles;
  struct Group {                   // one active expert
    int32_t expert;
    int64_t first_tile, tile_count;
  };
  std::vector<Group> groups;
  int64_t rows = 0;
};

// Tiles of nearly equal height: 15 rows at max_rows 14 become 8 + 7.
void cut_tiles(Plan& p, int32_t expert, int64_t begin, int64_t rows, int max_rows) {
  const int64_t count = (rows + max_rows - 1) / max_rows;
  p.groups.push_back({expert, static_cast<int64_t>(p.tiles.size()), count});
  for (int64_t i = 0; i < count; ++i) {
    const int64_t from = rows * i / count, to = rows * (i + 1) / count;
    p.tiles.push_back({expert, static_cast<int32_t>(to - from), begin + from});
  }
}

void plan_routes(Plan& p, const int32_t* indices, int64_t tokens, int64_t k, int64_t experts, int max_rows) {
  std::vector<int64_t> offset(static_cast<size_t>(experts) + 1, 0);
  const int64_t routes = tokens * k;
  for (int64_t r = 0; r < routes; ++r) {
    if (indices[r] >= 0) ++offset[static_cast<size_t>(indices[r]) + 1];
  }
  for (int64_t e = 0; e < experts; ++e) offset[e + 1] += offset[e];
  p.rows = offset[experts];
  p.token.resize(static_cast<size_t>(p.rows));
  p.position.assign(static_cast<size_t>(routes), -1);
  for (int64_t e = 0; e < experts; ++e) {
    if (offset[e + 1] > offset[e]) cut_tiles(p, static_cast<int32_t>(e), offset[e], offset[e + 1] - offset[e], max_rows);
  }
  for (int64_t t = 0, r = 0; t < tokens; ++t) {
    for (int64_t j = 0; j < k; ++j, ++r) {
      if (indices[r] < 0) continue;
      const int64_t row = offset[indices[r]]++;
      p.token[row] = static_cast<int32_t>(t);
      p.position[r] = row;
    }
  }
}

void plan_all(Plan& p, int64_t tokens, int max_rows) {
  p.rows = tokens;
  p.token.resize(static_cast<size_t>(tokens));
  p.position.resize(static_cast<size_t>(tokens));
  for (int64_t t = 0; t < tokens; ++t) p.token[t] = static_cast<int32_t>(t), p.position[t] = t;
  if (tokens > 0) cut_tiles(p, 0, 0, tokens, max_rows);
}

// Above this, a panel is consumed in k-blocks so that it stays in L2 while the tiles of an expert pass over it.
constexpr int64_t kPanelBytes = int64_t{768} << 10;

struct Layout {
  Operand kind;
  int64_t x_row, h_row, y_row;  // bytes per route in each region
  int64_t h_stride;             // floats
};

// Runs all tiles of one expert through panel `p` of `m` and hands each result to done(tile, c).
template <class Done>
void run_panel(const PackedMatrix& m, const TileKernels& kernels, Operand kind, const Plan& plan, const Plan::Group& group,
               int64_t p, const char* next_panel, const char* operands, int64_t row_bytes, float* c, const Done& done) {
  const bool float_type = m.type == PackType::kFloat32 || m.type == PackType::kBFloat16;
  int64_t block = m.steps;
  if (float_type && group.tile_count > 1) {
    const int64_t blocks = (m.steps * kStepBytes + kPanelBytes - 1) / kPanelBytes;
    block = (m.steps + blocks - 1) / blocks;
  }
  for (int64_t s0 = 0; s0 < m.steps; s0 += block) {
    const int64_t steps = std::min(block, m.steps - s0);
    const bool last = s0 + steps == m.steps;
    const char* next = last ? next_panel : m.panel(p) + (s0 + steps) * kStepBytes;
    for (int64_t i = 0; i < group.tile_count; ++i) {
      const Tile& tile = plan.tiles[static_cast<size_t>(group.first_tile + i)];
      const char* a = operands + tile.begin * row_bytes;
      float* out = block < m.steps ? c + (tile.begin - plan.tiles[static_cast<size_t>(group.first_tile)].begin) * kPanel : c;
      TileCall t;
      fill_tile(t, kind, m, p, a, tile.rows);
      if (s0 > 0) {  // a later k-block (float types only)
        t.a = a + s0 * tile.rows * (kind == Operand::kFloat32Pair ? 8 : 4);
        t.b = m.panel(p) + s0 * kStepBytes;
      }
      t.steps = steps;
      t.c = out;
      t.accumulate = s0 > 0;
      if (next && group.tile_count > 1) {
        t.prefetch_stride = kStepBytes / group.tile_count;
        t.prefetch = next + i * t.prefetch_stride * steps;
      }
      kernels.tile[tile.rows](t);
      if (last) done(tile, out);
    }
  }
}

int64_t accumulator_floats(const Plan& plan, const PackedMatrix& m) {
  int64_t rows = kMaxTileRows;
  if (m.steps * kStepBytes > kPanelBytes) {
    for (const Plan::Group& g : plan.groups) {
      const Tile& last = plan.tiles[static_cast<size_t>(g.first_tile + g.tile_count - 1)];
      rows = std::max(rows, last.begin + last.rows - plan.tiles[static_cast<size_t>(g.first_tile)].begin);
    }
  }
  return rows * kPanel;
}

// Phases 1 to 4 for one bank: y [rows, d] at `y`, h and operands in `scratch`.
Status run_bank(const ExpertsForwardArgs& a, const ExpertBank& bank, const Plan& plan, const Layout& l, char* xy, char* h,
                const Exec& exec) {
  const TileKernels& kernels = tile_kernels(exec.isa, bank.type);
  const ExpertStages& stages = expert_stages(exec.isa);
  const PackedMatrix& up0 = bank.gate_up_shape;
  const int64_t tiles = static_cast<int64_t>(plan.tiles.size());
  const int64_t groups = static_cast<int64_t>(plan.groups.size());
  std::atomic<bool> failed{false};
  auto status = [&](bool done) { return failed.load() ? kNoMemory : done ? kOk : kCancelled; };

  const int64_t padded = up0.steps * pack_unit(up0.type);
  Status s = status(parallel_for(exec, tiles, 1 + 4096 / padded, [&](int64_t begin, int64_t end) {
    auto* rows = static_cast<float*>(Workspace::local().get(static_cast<size_t>(kMaxTileRows * padded) * sizeof(float)));
    if (!rows) return failed.store(true);
    for (int64_t i = begin; i < end; ++i) {
      const Tile& t = plan.tiles[static_cast<size_t>(i)];
      stages.pack_x(a, up0, l.kind, plan.token.data() + t.begin, t.rows, rows, xy + t.begin * l.x_row);
    }
  }));
  if (s != kOk) return s;

  // Tasks are runs of consecutive (expert, panel) pairs in order: threads share an expert's operands, and each knows
  // which panel it will want next.
  auto panels = [&](int64_t count, const PackedMatrix& shape, auto&& body) {
    const int64_t work = shape.steps * kStepBytes;  // bytes of one panel
    const int64_t total = groups * count;
    const int64_t run = std::min<int64_t>(4, std::max<int64_t>(1, total / (8 * exec.threads)));
    const int64_t grain = std::max(run, 1 + 65536 / work);
    return parallel_for(exec, total, grain, [&](int64_t begin, int64_t end) {
      const size_t floats = static_cast<size_t>(accumulator_floats(plan, shape));
      auto* c = static_cast<float*>(Workspace::local().get(floats * sizeof(float)));
      if (!c) return failed.store(true);
      for (int64_t i = begin; i < end; ++i) {
        // Behind the end of the run the other threads have taken theirs.
        const int64_t n = i + 1 < end ? i + 1 : end + grain * (exec.threads - 1);
        const bool more = n < total;
        body(plan.groups[static_cast<size_t>(i / count)], i % count,
             more ? &plan.groups[static_cast<size_t>(n / count)] : nullptr, n % count, c);
      }
    });
  };
  s = status(panels(up0.panels, up0, [&](const Plan::Group& g, int64_t p, const Plan::Group* then, int64_t then_p, float* c) {
    const PackedExpert& e = bank.experts[static_cast<size_t>(g.expert)];
    const char* next = then ? bank.experts[static_cast<size_t>(then->expert)].gate_up.panel(then_p) : nullptr;
    run_panel(e.gate_up, kernels, l.kind, plan, g, p, next, xy, l.x_row, c, [&](const Tile& t, const float* out) {
      stages.activate(bank, e, p, out, t.rows, reinterpret_cast<float*>(h + t.begin * l.h_row), l.h_stride);
    });
  }));
  if (s != kOk) return s;

  const PackedMatrix& down0 = bank.down_shape;
  s = status(parallel_for(exec, tiles, 1 + 4096 / l.h_stride, [&](int64_t begin, int64_t end) {
    const int64_t row_bytes = operand_row_bytes(l.kind, down0);
    auto* packed = static_cast<char*>(Workspace::local().get(static_cast<size_t>(kMaxTileRows * row_bytes)));
    if (!packed) return failed.store(true);
    for (int64_t i = begin; i < end; ++i) {
      const Tile& t = plan.tiles[static_cast<size_t>(i)];
      char* rows = h + t.begin * l.h_row;
      stages.pack_h(down0, l.kind, reinterpret_cast<float*>(rows), l.h_stride, t.rows, packed);
      std::memcpy(rows, packed, static_cast<size_t>(t.rows * row_bytes));
    }
  }));
  if (s != kOk) return s;

  float* y = reinterpret_cast<float*>(xy);
  return status(panels(down0.panels, down0, [&](const Plan::Group& g, int64_t p, const Plan::Group* then, int64_t then_p, float* c) {
    const PackedExpert& e = bank.experts[static_cast<size_t>(g.expert)];
    const char* next = then ? bank.experts[static_cast<size_t>(then->expert)].down.panel(then_p) : nullptr;
    run_panel(e.down, kernels, l.kind, plan, g, p, next, h, l.h_row, c, [&](const Tile& t, const float* out) {
      stages.write_down(e, bank.hidden, p, out, t.rows, y + t.begin * bank.hidden);
    });
  }));
}

Layout layout_of(const ExpertBank& bank, Isa isa) {
  Layout l;
  l.kind = operand_kind(isa, bank.type);
  const PackedMatrix& up = bank.gate_up_shape;
  const PackedMatrix& down = bank.down_shape;
  l.x_row = operand_row_bytes(l.kind, up);
  const int64_t width = bank.gated ? kHalfPanel : kPanel;
  l.h_stride = std::max(down.steps * pack_unit(down.type), up.panels * width);
  l.h_row = std::max<int64_t>(l.h_stride * 4, operand_row_bytes(l.kind, down));
  l.y_row = bank.hidden * 4;
  return l;
}

// Scratch of a bank: its kept block if free and large enough, else a new one.
class Scratch {
 public:
  bool take(ExpertBank& bank, size_t bytes) {
    bank_ = &bank;
    {
      std::lock_guard<std::mutex> lock(bank.scratch_mutex);
      block_ = std::move(bank.scratch);
    }
    return block_.size() >= bytes || block_.reset(bytes);
  }
  ~Scratch() {
    if (!bank_ || block_.size() > kKeep) return;
    std::lock_guard<std::mutex> lock(bank_->scratch_mutex);
    if (bank_->scratch.size() < block_.size()) bank_->scratch = std::move(block_);
  }
  char* data() { return block_.as<char>(); }

 private:
  static constexpr size_t kKeep = size_t{64} << 20;
  ExpertBank* bank_ = nullptr;
  HugeBuffer block_;
};

struct BankRun {
  Plan plan;
  Layout layout;
  Scratch scratch;
  const float* y = nullptr;

  Status run(const ExpertsForwardArgs& a, ExpertBank& bank, const Exec& exec) {
    layout = layout_of(bank, exec.isa);
    const int64_t xy_row = round_up_to(std::max(layout.x_row, layout.y_row), 4);
    const int64_t xy_bytes = round_up_to(plan.rows * xy_row, 64);
    if (!scratch.take(bank, static_cast<size_t>(xy_bytes + plan.rows * layout.h_row))) return kNoMemory;
    y = reinterpret_cast<const float*>(scratch.data());
    return run_bank(a, bank, plan, layout, scratch.data(), scratch.data() + xy_bytes, exec);
  }
};

Status copy_routes(const ExpertsForwardArgs& a, const BankRun& routed, int64_t d, const Exec& exec) {
  const bool done = parallel_for(exec, a.tokens * a.k, 1 + 65536 / d, [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r) {
      const int64_t row = routed.plan.position[static_cast<size_t>(r)];
      if (row >= 0) std::memcpy(a.routes + r * d, routed.y + row * d, static_cast<size_t>(d) * sizeof(float));
    }
  });
  return done ? kOk : kCancelled;
}

}  // namespace

int64_t ExpertBank::bytes() const {
  int64_t n = 0;
  for (const PackedExpert& e : experts) n += e.bytes();
  return n;
}

void ExpertBank::set_shapes(int64_t group) {
  shape_matrix(gate_up_shape, type, gated, intermediate, hidden, group);
  shape_matrix(down_shape, type, false, hidden, intermediate, group);
}

int64_t ExpertBank::expert_bytes(bool biased) const {
  const int64_t biases = biased ? (gated ? 2 : 1) * intermediate + hidden : 0;
  return packed_bytes(gate_up_shape) + packed_bytes(down_shape) + biases * static_cast<int64_t>(sizeof(float));
}

Status pack_experts(const PackExpertsArgs& args, const Exec& exec) {
  ExpertBank& bank = *args.bank;
  const int64_t d = bank.hidden, f = bank.intermediate;
  try {
    for (size_t i = 0; i < args.sources.size(); ++i) {
      const ExpertSource& s = args.sources[i];
      PackedExpert& e = bank.experts[args.first + i];
      const MatrixSource none;
      PackOptions up_options = args.options, down_options = args.options;
      up_options.mean_square = args.hidden_mean_square;
      down_options.mean_square = args.intermediate_mean_square;
      const int64_t size = d * f;
      int64_t before = static_cast<int64_t>(i) * 3 * size + (bank.gated ? 0 : size);
      Status status = pack_matrix(e.gate_up, bank.type, bank.gated ? s.gate : s.up, bank.gated ? s.up : none, f, d, up_options, exec);
      if (status == kOk) {
        before = static_cast<int64_t>(i) * 3 * size + 2 * size;
        status = pack_matrix(e.down, bank.type, s.down, none, d, f, down_options, exec);
      }
      if (status != kOk) return status > 0 ? status + before : status;
      if (s.up_bias) e.up_bias.assign(s.up_bias, s.up_bias + f);
      if (s.gate_bias) e.gate_bias.assign(s.gate_bias, s.gate_bias + f);
      if (s.down_bias) e.down_bias.assign(s.down_bias, s.down_bias + d);
    }
  } catch (const std::bad_alloc&) {
    return kNoMemory;
  }
  return kOk;
}

Status experts_forward(const ExpertsForwardArgs& a, const Exec& exec) {
  ExpertBank& bank = *a.bank;
  const int64_t routes = a.tokens * a.k;
  const int64_t experts = static_cast<int64_t>(bank.experts.size());
  for (int64_t r = 0; r < routes; ++r) {
    if (a.indices[r] < -1 || a.indices[r] >= experts) return bad_value(r);
  }
  if (a.tokens == 0) return kOk;
  try {
    BankRun routed, shared;
    const int64_t d = bank.hidden;
    const bool combine_only = a.routes && a.out;
    Status s = kOk;
    if (!combine_only) {
      plan_routes(routed.plan, a.indices, a.tokens, a.k, experts, tile_kernels(exec.isa, bank.type).max_rows);
      for (const Plan::Group& g : routed.plan.groups) {
        if (!bank.experts[static_cast<size_t>(g.expert)].down.data) return kUnsupported;
      }
      s = routed.run(a, bank, exec);
      if (s != kOk) return s;
    }
    if (a.routes && !a.out) return copy_routes(a, routed, d, exec);
    if (a.shared) {
      plan_all(shared.plan, a.tokens, tile_kernels(exec.isa, a.shared->type).max_rows);
      s = shared.run(a, *a.shared, exec);
      if (s != kOk) return s;
    }
    const ExpertStages& stages = expert_stages(exec.isa);
    std::atomic<bool> failed{false};
    const bool done = parallel_for(exec, a.tokens, 1 + 65536 / (d * (a.k + 1)), [&](int64_t begin, int64_t end) {
      const size_t slots = static_cast<size_t>(a.k) + 1;
      auto* y = static_cast<const float**>(Workspace::local().get(slots * (sizeof(float*) + sizeof(float))));
      if (!y) return failed.store(true);
      auto* w = reinterpret_cast<float*>(y + slots);
      for (int64_t t = begin; t < end; ++t) {
        int64_t count = 0;
        for (int64_t j = 0; j < a.k; ++j) {
          const int64_t route = t * a.k + j;
          if (a.indices[route] < 0) continue;
          y[count] = combine_only ? a.routes + route * d : routed.y + routed.plan.position[static_cast<size_t>(route)] * d;
          w[count++] = a.weights ? a.weights[t * a.k + j] : 1.0f;
        }
        if (a.shared) {
          y[count] = shared.y + t * d;
          w[count++] = a.shared_gate ? a.shared_gate[t] : 1.0f;
        }
        stages.combine(y, w, count, d, a.out, a.out_type, t * d);
      }
    });
    return failed.load() ? kNoMemory : done ? kOk : kCancelled;
  } catch (const std::bad_alloc&) {
    return kNoMemory;
  }
}

}  // namespace heddle
