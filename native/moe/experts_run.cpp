// The products of a bank, in one of two schedules with the same results.
//
// Whole groups (many groups per thread: prefill). One thread takes a group of up to kGroupRows rows through all steps:
// its x, h and operands stay in this core's L2, and the weights are the only stream from memory. No thread waits for
// another until the end.
// Panels (few groups: decode, few experts, many threads). All threads share each step; a task is a run of panels.
#include "moe/experts_run.h"

#include <algorithm>
#include <atomic>
#include <cstring>

namespace heddle {
namespace {

void cut_groups(Plan& p, int32_t expert, int64_t begin, int64_t rows, int max_rows) {
  const int64_t groups = (rows + kGroupRows - 1) / kGroupRows;
  for (int64_t g = 0; g < groups; ++g) {
    const int64_t g0 = rows * g / groups, n = rows * (g + 1) / groups - g0;
    const int64_t count = (n + max_rows - 1) / max_rows;  // of nearly equal height: 15 rows at 14 become 8 + 7
    p.groups.push_back({expert, static_cast<int64_t>(p.tiles.size()), count, begin + g0, n});
    for (int64_t i = 0; i < count; ++i) {
      const int64_t from = n * i / count, to = n * (i + 1) / count;
      p.tiles.push_back({begin + g0 + from, static_cast<int32_t>(to - from)});
    }
  }
}

// Groups per thread from which whole groups are taken: the last one leaves the other threads idle for half of it.
constexpr int64_t kWholeGroups = 16;

// Bytes of operands that stay in L2 while the panels pass; a longer k is taken in ranges, sums waiting in memory.
constexpr int64_t kOperandBytes = int64_t{1} << 20;

int64_t align64(int64_t n) { return round_up_to(n, 64); }

struct Products {
  Products(const ExpertsForwardArgs& args, const ExpertBank& b, const Plan& p, const Exec& e)
      : a(args), bank(b), plan(p), exec(e), kernels(tile_kernels(e.isa, b.type)), stages(expert_stages(e.isa)),
        kind(operand_kind(e.isa, b.type)), up(b.gate_up_shape), down(b.down_shape), width(b.gated ? kHalfPanel : kPanel),
        x_row(operand_row_bytes(kind, up)), down_row(operand_row_bytes(kind, down)),
        h_stride(std::max(down.steps * pack_unit(down.type), up.panels * width)),
        groups(static_cast<int64_t>(p.groups.size())), straight(packs_values(kind)) {}

  bool whole_groups() const { return groups >= kWholeGroups * exec.threads; }
  // Shared memory per row: y takes the place of x's operands, h's operands that of h.
  int64_t xy_row() const { return whole_groups() ? bank.hidden * 4 : round_up_to(std::max(x_row, bank.hidden * 4), 4); }
  int64_t h_row() const { return whole_groups() ? 0 : std::max(h_stride * 4, down_row); }

  Status run(char* xy, char* h) { return whole_groups() ? run_groups(reinterpret_cast<float*>(xy)) : run_panels(xy, h); }

 private:
  const PackedExpert& expert_of(const Plan::Group& g) const { return bank.experts[static_cast<size_t>(g.expert)]; }
  const RowTile* tiles_of(const Plan::Group& g) const { return plan.tiles.data() + g.first_tile; }
  int64_t padded() const { return up.steps * pack_unit(up.type); }
  Status status(bool done) const { return failed.load() ? kNoMemory : done ? kOk : kCancelled; }
  char* local(int64_t bytes) {
    auto* p = static_cast<char*>(Workspace::local().get(static_cast<size_t>(bytes)));
    if (!p) failed.store(true);
    return p;
  }
  PanelProduct product(const PackedMatrix& m, const Plan::Group& g, const char* operands, int64_t row_bytes) const {
    return {&m, &kernels, kind, tiles_of(g), g.tile_count, operands, row_bytes, 0, m.steps, block_steps(exec.isa)};
  }
  void pack_x(const RowTile& t, char* rows, char* operand) const {
    stages.pack_x(a, up, kind, plan.token.data() + t.begin, t.rows, reinterpret_cast<float*>(rows), operand);
  }

  // Ranges of k for a matrix's product with `rows` rows.
  int64_t ranges(const PackedMatrix& m, int64_t row_bytes, int64_t rows) const {
    return chains_continue(m.type) ? (rows * row_bytes + kOperandBytes - 1) / kOperandBytes : 1;
  }
  int64_t sums_bytes(const PackedMatrix& m, int64_t row_bytes, int64_t rows) const {
    return (ranges(m, row_bytes, rows) > 1 ? m.panels : 1) * rows * kPanel * 4;
  }

  // All panels of m for one group. `next`: what is read afterwards.
  template <class Done>
  void multiply_group(const PackedMatrix& m, const Plan::Group& g, const char* operands, int64_t row_bytes, const char* next,
                      float* c, const Done& done) const {
    PanelProduct q = product(m, g, operands, row_bytes);
    const int64_t n = ranges(m, row_bytes, g.rows);
    for (int64_t r = 0; r < n; ++r) {
      q.first_step = m.steps * r / n, q.last_step = m.steps * (r + 1) / n;
      for (int64_t p = 0; p < m.panels && !exec.cancelled(); ++p) {
        const char *end = m.panel(m.panels), *then = next;
        if (n > 1) {
          end = m.panel(p) + q.last_step * kStepBytes;
          then = m.panel((p + 1) % m.panels) + (p + 1 < m.panels ? q.first_step : q.last_step) * kStepBytes;
          if (p + 1 == m.panels && r + 1 == n) then = next;
        }
        float* sums = n > 1 ? c + p * g.rows * kPanel : c;
        multiply_panel(q, p, end, then, sums, [&](const RowTile& t, float* out) { done(p, t, out); });
      }
    }
  }

  Status run_groups(float* y) {
    // The heaviest first: what is left at the end is then short.
    std::vector<int32_t> order(static_cast<size_t>(groups));
    for (size_t i = 0; i < order.size(); ++i) order[i] = static_cast<int32_t>(i);
    std::stable_sort(order.begin(), order.end(), [&](int32_t l, int32_t r) {
      return plan.groups[static_cast<size_t>(l)].rows > plan.groups[static_cast<size_t>(r)].rows;
    });
    return status(parallel_for(exec, groups, 1, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        // A guess: the threads take groups in turns.
        const int64_t n = std::min(i + exec.threads, groups - 1);
        run_group(plan.groups[static_cast<size_t>(order[static_cast<size_t>(i)])],
                  plan.groups[static_cast<size_t>(order[static_cast<size_t>(n)])], y);
      }
    }));
  }

  void run_group(const Plan::Group& g, const Plan::Group& then, float* y) {
    const PackedExpert& e = expert_of(g);
    const int64_t operand_bytes = align64(g.rows * std::max(x_row, down_row));
    const int64_t h_bytes = align64(std::max(g.rows * std::max(h_stride * 4, down_row), kMaxTileRows * padded() * 4));
    const int64_t c_bytes = std::max(sums_bytes(up, x_row, g.rows), sums_bytes(down, down_row, g.rows));
    char* operands = local(operand_bytes + h_bytes + c_bytes);
    if (!operands) return;
    float* h = reinterpret_cast<float*>(operands + operand_bytes);
    char* hidden = straight ? operands + operand_bytes : operands;  // operands of the down product
    float* c = reinterpret_cast<float*>(operands + operand_bytes + h_bytes);
    auto for_tiles = [&](auto&& body) {
      for (int64_t i = 0; i < g.tile_count; ++i) body(tiles_of(g)[i], tiles_of(g)[i].begin - g.begin);
    };
    for_tiles([&](const RowTile& t, int64_t row) { pack_x(t, reinterpret_cast<char*>(h), operands + row * x_row); });
    multiply_group(e.gate_up, g, operands, x_row, e.down.panel(0), c, [&](int64_t p, const RowTile& t, float* out) {
      const int64_t row = t.begin - g.begin;
      if (straight) stages.activate_operand(bank, e, p, out, t.rows, hidden + row * down_row);
      else stages.activate(bank, e, p, out, t.rows, h + row * h_stride, h_stride);
    });
    if (exec.cancelled()) return;
    if (!straight) {
      for_tiles([&](const RowTile& t, int64_t row) {
        stages.pack_h(down, kind, h + row * h_stride, h_stride, t.rows, hidden + row * down_row);
      });
    }
    const char* next = expert_of(then).gate_up.panel(0);
    multiply_group(e.down, g, hidden, down_row, next, c, [&](int64_t p, const RowTile& t, const float* out) {
      stages.write_down(e, bank.hidden, p, out, t.rows, y + t.begin * bank.hidden);
    });
  }

  // body(group, panel, end, next, c) for all panels of all groups; end and next as multiply_panel wants them.
  template <class Body>
  Status for_panels(const PackedMatrix& shape, const PackedMatrix PackedExpert::* matrix, const Body& body) {
    const int64_t bytes = shape.steps * kStepBytes, count = shape.panels, total = groups * count;
    // Runs of panels, so that a thread knows what it reads next.
    const int64_t run = std::min<int64_t>(4, std::max<int64_t>(1, total / (8 * exec.threads)));
    const int64_t grain = std::max(run, 1 + 65536 / bytes);
    auto panel = [&](int64_t i) {
      return (expert_of(plan.groups[static_cast<size_t>(i / count)]).*matrix).panel(i % count);
    };
    return status(parallel_for(exec, total, grain, [&](int64_t begin, int64_t end) {
      auto* c = reinterpret_cast<float*>(local(kGroupRows * kPanel * 4));
      for (int64_t i = begin; c && i < end; ++i) {
        const int64_t last = std::min(end, (i / count + 1) * count);         // of the run inside this group
        const int64_t n = last < end ? last : end + grain * (exec.threads - 1);  // the other threads take theirs
        body(plan.groups[static_cast<size_t>(i / count)], i % count, panel(last - 1) + bytes, n < total ? panel(n) : nullptr, c);
      }
    }));
  }
  bool for_tiles(int64_t grain, int64_t bytes, void (Products::*body)(const RowTile&, char*)) {
    return parallel_for(exec, static_cast<int64_t>(plan.tiles.size()), grain, [&](int64_t begin, int64_t end) {
      char* memory = local(bytes);
      for (int64_t i = begin; memory && i < end; ++i) (this->*body)(plan.tiles[static_cast<size_t>(i)], memory);
    });
  }

  Status run_panels(char* xy_, char* h_) {
    xy = xy_, h = h_;
    Status s = status(for_tiles(1 + 4096 / padded(), kMaxTileRows * padded() * 4, &Products::pack_x_tile));
    if (s != kOk) return s;
    s = for_panels(up, &PackedExpert::gate_up, [&](const Plan::Group& g, int64_t p, const char* end, const char* next, float* c) {
      const PackedExpert& e = expert_of(g);
      multiply_panel(product(e.gate_up, g, xy + g.begin * x_row, x_row), p, end, next, c, [&](const RowTile& t, float* out) {
        char* rows = h + t.begin * h_row();
        if (straight) stages.activate_operand(bank, e, p, out, t.rows, rows);
        else stages.activate(bank, e, p, out, t.rows, reinterpret_cast<float*>(rows), h_stride);
      });
    });
    if (s != kOk) return s;
    if (!straight) s = status(for_tiles(1 + 4096 / h_stride, kMaxTileRows * down_row, &Products::pack_h_tile));
    if (s != kOk) return s;
    float* y = reinterpret_cast<float*>(xy);
    return for_panels(down, &PackedExpert::down, [&](const Plan::Group& g, int64_t p, const char* end, const char* next, float* c) {
      const PackedExpert& e = expert_of(g);
      multiply_panel(product(e.down, g, h + g.begin * h_row(), h_row()), p, end, next, c, [&](const RowTile& t, const float* out) {
        stages.write_down(e, bank.hidden, p, out, t.rows, y + t.begin * bank.hidden);
      });
    });
  }
  void pack_x_tile(const RowTile& t, char* rows) { pack_x(t, rows, xy + t.begin * x_row); }
  void pack_h_tile(const RowTile& t, char* packed) {
    char* rows = h + t.begin * h_row();
    stages.pack_h(down, kind, reinterpret_cast<float*>(rows), h_stride, t.rows, packed);
    std::memcpy(rows, packed, static_cast<size_t>(t.rows * down_row));
  }

  const ExpertsForwardArgs& a;
  const ExpertBank& bank;
  const Plan& plan;
  const Exec& exec;
  const TileKernels& kernels;
  const ExpertStages& stages;
  const Operand kind;
  const PackedMatrix &up, &down;          // shapes
  const int64_t width;                    // columns of h per panel
  const int64_t x_row, down_row;          // bytes of an operand's row
  const int64_t h_stride;                 // floats
  const int64_t groups;
  const bool straight;                    // activated values go straight into the down product's operand
  char *xy = nullptr, *h = nullptr;       // shared by the threads in run_panels
  std::atomic<bool> failed{false};
};

constexpr size_t kKeepScratch = size_t{64} << 20;

}  // namespace

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
    if (offset[e + 1] > offset[e]) cut_groups(p, static_cast<int32_t>(e), offset[e], offset[e + 1] - offset[e], max_rows);
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
  if (tokens > 0) cut_groups(p, 0, 0, tokens, max_rows);
}

Status BankRun::run(const ExpertsForwardArgs& a, ExpertBank& bank, const Exec& exec) {
  Products products(a, bank, plan, exec);
  const int64_t xy_bytes = align64(plan.rows * products.xy_row());
  const size_t bytes = static_cast<size_t>(xy_bytes + plan.rows * products.h_row());
  bank_ = &bank;
  {
    std::lock_guard<std::mutex> lock(bank.scratch_mutex);
    block_ = std::move(bank.scratch);
  }
  if (block_.size() < bytes && !block_.reset(bytes)) return kNoMemory;
  y = block_.as<float>();
  return products.run(block_.as<char>(), block_.as<char>() + xy_bytes);
}

BankRun::~BankRun() {
  if (!bank_ || block_.size() > kKeepScratch) return;
  std::lock_guard<std::mutex> lock(bank_->scratch_mutex);
  if (bank_->scratch.size() < block_.size()) bank_->scratch = std::move(block_);
}

}  // namespace heddle
