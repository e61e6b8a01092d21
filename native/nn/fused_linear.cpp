#include "nn/fused_linear.h"

#include <algorithm>
#include <atomic>
#include <vector>

#include "gemm/panel.h"
#include "simd/dispatch.h"

namespace heddle {

HEDDLE_FOR_X86(namespace avx512 { const FusedLinearStages& fused_linear_stages(); })
HEDDLE_FOR_X86(namespace avx2 { const FusedLinearStages& fused_linear_stages(); })
HEDDLE_FOR_NEON(namespace neon { const FusedLinearStages& fused_linear_stages(); })
namespace scalar {
const FusedLinearStages& fused_linear_stages();
}

const FusedLinearStages& fused_linear_stages(Isa isa) {
  switch (isa) {
    HEDDLE_FOR_X86(case Isa::kAvx512 : return avx512::fused_linear_stages();)
    HEDDLE_FOR_X86(case Isa::kAvx2 : return avx2::fused_linear_stages();)
    HEDDLE_FOR_NEON(case Isa::kNeon : return neon::fused_linear_stages();)
    default: return scalar::fused_linear_stages();
  }
}

namespace {

// One product: its matrix and how its rows are stored.
struct Product {
  const PackedMatrix* matrix = nullptr;
  const TileKernels* kernels = nullptr;
  Operand kind = Operand::kFloat32;
  int64_t padded = 0, row_bytes = 0;

  Product() = default;
  Product(const PackedMatrix& m, Isa isa)
      : matrix(&m),
        kernels(&tile_kernels(isa, m.type)),
        kind(operand_kind(isa, m.type)),
        padded(m.steps * pack_unit(m.type)),
        row_bytes(operand_row_bytes(kind, m)) {}
};

// Tiles whose rows pass together.
struct Group {
  int64_t begin, end;
};

struct Run {
  const FusedLinearArgs& a;
  const FusedLinearStages& stages;
  Product first, second;  // second.matrix is null without a hidden matrix
  int64_t block;
  std::vector<RowTile> tiles;

  bool hidden() const { return second.matrix != nullptr; }
  // Hidden values go straight into the second operand; kinds that need a whole row of them wait for it as floats.
  bool straight() const { return packs_values(second.kind); }
  int64_t rows_of(Group g) const {
    const RowTile &b = tiles[static_cast<size_t>(g.begin)], &e = tiles[static_cast<size_t>(g.end - 1)];
    return e.begin + e.rows - b.begin;
  }
  int64_t row(int64_t tile) const { return tiles[static_cast<size_t>(tile)].begin; }
};

// Memory of a group: operands of both products, hidden rows where they wait, and a tile's rows while they are packed.
struct Memory {
  char *first = nullptr, *second = nullptr;
  float *hidden = nullptr, *scratch = nullptr;
  size_t bytes = 0;

  Memory(const Run& r, int64_t rows, char* base) {
    auto take = [&](int64_t n) {
      char* p = base ? base + bytes : nullptr;
      bytes += static_cast<size_t>(round_up_to(n, 64));
      return p;
    };
    first = take(rows * r.first.row_bytes);
    if (r.hidden()) second = take(rows * r.second.row_bytes);
    if (r.hidden() && !r.straight()) hidden = reinterpret_cast<float*>(take(rows * r.second.padded * 4));
    scratch = reinterpret_cast<float*>(take(kMaxTileRows * r.first.padded * 4));
  }
};

void pack_tiles(const Run& r, Group g, const Memory& m, float* scratch) {
  for (int64_t i = g.begin; i < g.end; ++i) {
    const RowTile& t = r.tiles[static_cast<size_t>(i)];
    r.stages.pack(r.a, t.begin, t.rows, *r.first.matrix, r.first.kind, scratch,
                  m.first + (t.begin - r.row(g.begin)) * r.first.row_bytes);
  }
}

// Panels [begin, end) of a product of the group at `g`; `next`: what the thread reads after them.
template <class Done>
void multiply(const Run& r, const Product& p, Group g, const char* operands, int64_t begin, int64_t end, const char* next,
              const Done& done) {
  const RowTile* tiles = r.tiles.data() + g.begin;
  alignas(64) float c[kGroupRows * kPanel];
  const PanelProduct q = {p.matrix, p.kernels, p.kind, tiles, g.end - g.begin, operands, p.row_bytes, 0, p.matrix->steps, r.block};
  const char* last = p.matrix->panel(end);
  for (int64_t panel = begin; panel < end; ++panel) {
    multiply_panel(q, panel, last, next, c, [&](const RowTile& t, float* out) { done(t, panel, out); });
  }
}

// Panels of the hidden product, and what becomes of them.
void hidden_panels(const Run& r, Group g, const Memory& m, int64_t begin, int64_t end, const char* next) {
  const int64_t row0 = r.row(g.begin);
  multiply(r, r.first, g, m.first, begin, end, next, [&](const RowTile& t, int64_t panel, float* c) {
    if (r.straight()) r.stages.pack_hidden(r.a, t.rows, panel, c, m.second + (t.begin - row0) * r.second.row_bytes);
    else r.stages.store_hidden(r.a, t.rows, panel, c, m.hidden + (t.begin - row0) * r.second.padded, r.second.padded);
  });
}

void pack_hidden_rows(const Run& r, Group g, const Memory& m) {
  if (r.straight()) return;
  const int64_t row0 = r.row(g.begin);
  for (int64_t i = g.begin; i < g.end; ++i) {
    const RowTile& t = r.tiles[static_cast<size_t>(i)];
    r.stages.pack_rows(*r.second.matrix, r.second.kind, m.hidden + (t.begin - row0) * r.second.padded, r.second.padded,
                       t.rows, m.second + (t.begin - row0) * r.second.row_bytes);
  }
}

void last_panels(const Run& r, Group g, const Memory& m, int64_t begin, int64_t end, const char* next) {
  const Product& p = r.hidden() ? r.second : r.first;
  multiply(r, p, g, r.hidden() ? m.second : m.first, begin, end, next,
           [&](const RowTile& t, int64_t panel, const float* c) { r.stages.finish(r.a, t.begin, t.rows, panel, c); });
}

// Groups of all tiles: large ones first, smaller ones towards the end.
void cut_groups(const Run& r, int threads, std::vector<Group>& groups) {
  const int64_t tiles = static_cast<int64_t>(r.tiles.size()), most = kGroupRows / r.first.kernels->max_rows;
  const int64_t least = std::max<int64_t>(1, most / 3);
  for (int64_t at = 0; at < tiles;) {
    const int64_t left = tiles - at, share = threads > 1 ? (left + 2 * threads - 1) / (2 * threads) : left;
    const int64_t whole = (left + most - 1) / most;  // groups of nearly one size
    const int64_t n = std::min(std::max(share, least), (left + whole - 1) / whole);
    groups.push_back({at, at + n});
    at += n;
  }
}

// `also`: the run of another product of the same operands, or null.
Status run_groups(const Run& r, const Run* also, const std::vector<Group>& groups, const Exec& exec) {
  std::atomic<bool> failed{false};
  const char* weights = r.first.matrix->panel(0);
  const bool done = parallel_for(exec, static_cast<int64_t>(groups.size()), 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const Group g = groups[static_cast<size_t>(i)];
      const int64_t rows = r.rows_of(g);
      char* base = static_cast<char*>(Workspace::local().get(Memory(r, rows, nullptr).bytes));
      if (!base) return failed.store(true);
      const Memory m(r, rows, base);
      pack_tiles(r, g, m, m.scratch);
      if (r.hidden()) {
        hidden_panels(r, g, m, 0, r.first.matrix->panels, r.second.matrix->panel(0));
        pack_hidden_rows(r, g, m);
      }
      const char* next = also ? also->first.matrix->panel(0) : weights;
      last_panels(r, g, m, 0, (r.hidden() ? r.second : r.first).matrix->panels, next);
      if (also) last_panels(*also, g, m, 0, also->first.matrix->panels, weights);
    }
  });
  if (failed.load()) return kNoMemory;
  return done ? kOk : kCancelled;
}

// Few rows: all threads pack them, then share the panels.
Status share_panels(const Run& r, const Run* also, const Exec& exec) {
  const Group all = {0, static_cast<int64_t>(r.tiles.size())};
  HugeBuffer buffer;
  if (!buffer.reset(Memory(r, r.a.rows, nullptr).bytes)) return kNoMemory;
  const Memory m(r, r.a.rows, buffer.as<char>());
  pack_tiles(r, all, m, m.scratch);
  const auto shared = [&](const PackedMatrix& w, const auto& panels) {
    const int64_t grain = 1 + 65536 / (w.steps * kStepBytes * all.end + 1);
    return parallel_for(exec, w.panels, grain, [&](int64_t begin, int64_t end) {
      panels(begin, end, w.panel((end + grain * (exec.threads - 1)) % w.panels));
    });
  };
  if (r.hidden()) {
    const bool done = shared(*r.first.matrix, [&](int64_t begin, int64_t end, const char* next) {
      hidden_panels(r, all, m, begin, end, next);
    });
    if (!done) return kCancelled;
    pack_hidden_rows(r, all, m);
  }
  const bool done = shared(r.hidden() ? *r.second.matrix : *r.first.matrix, [&](int64_t begin, int64_t end, const char* next) {
    last_panels(r, all, m, begin, end, next);
  });
  if (!done || !also) return done ? kOk : kCancelled;
  const bool both = shared(*also->first.matrix, [&](int64_t begin, int64_t end, const char* next) {
    last_panels(*also, all, m, begin, end, next);
  });
  return both ? kOk : kCancelled;
}

}  // namespace

Status fused_linear(const FusedLinearArgs& a, const Exec& exec) {
  if (a.rows == 0 || a.weight->columns == 0) return kOk;
  Run r{a, fused_linear_stages(exec.isa), Product(a.hidden ? *a.hidden : *a.weight, exec.isa), Product(),
        block_steps(exec.isa), {}};
  if (a.hidden) r.second = Product(*a.weight, exec.isa);
  // Tiles fit both products.
  const int64_t most = std::min(r.first.kernels->max_rows, a.hidden ? r.second.kernels->max_rows : kMaxTileRows);
  const int64_t tiles = (a.rows + most - 1) / most;
  std::vector<Group> groups;
  try {
    r.tiles.resize(static_cast<size_t>(tiles));
    for (int64_t i = 0; i < tiles; ++i) {
      const int64_t from = a.rows * i / tiles;
      r.tiles[static_cast<size_t>(i)] = {from, static_cast<int32_t>(a.rows * (i + 1) / tiles - from)};
    }
    cut_groups(r, exec.threads, groups);
  } catch (const std::bad_alloc&) {
    return kNoMemory;
  }
  FusedLinearArgs other;
  other.rows = a.rows;
  other.weight = a.also;
  other.bias = a.also_bias;
  other.out = a.also_out;
  std::unique_ptr<Run> also;
  if (a.also) {
    try {
      also.reset(new Run{other, r.stages, Product(*a.also, exec.isa), Product(), r.block, r.tiles});
    } catch (const std::bad_alloc&) {
      return kNoMemory;
    }
  }
  const bool few = exec.threads > 1 && tiles <= 2 * exec.threads && tiles <= kGroupRows / most;
  return few ? share_panels(r, also.get(), exec) : run_groups(r, also.get(), groups, exec);
}

}  // namespace heddle
