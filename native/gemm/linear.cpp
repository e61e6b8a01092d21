#include "gemm/linear.h"

#include <algorithm>
#include <atomic>
#include <vector>

#include "gemm/panel.h"

namespace heddle {

Status linear(const LinearArgs& a, const Exec& exec) {
  const PackedMatrix& w = *a.weight;
  const TileKernels& kernels = tile_kernels(exec.isa, w.type);
  const LinearStages& stages = linear_stages(exec.isa);
  const Operand kind = operand_kind(exec.isa, w.type);
  if (a.rows == 0 || w.columns == 0) return kOk;
  const int64_t row_bytes = operand_row_bytes(kind, w);
  const int64_t padded = w.steps * pack_unit(w.type);
  const int64_t tiles = (a.rows + kernels.max_rows - 1) / kernels.max_rows;
  std::vector<RowTile> rows_of;
  try {
    rows_of.resize(static_cast<size_t>(tiles));
  } catch (const std::bad_alloc&) {
    return kNoMemory;
  }
  for (int64_t i = 0; i < tiles; ++i) {
    const int64_t from = a.rows * i / tiles;
    rows_of[static_cast<size_t>(i)] = {from, static_cast<int32_t>(a.rows * (i + 1) / tiles - from)};
  }
  HugeBuffer operands;
  if (!operands.reset(static_cast<size_t>(a.rows * row_bytes))) return kNoMemory;
  std::atomic<bool> failed{false};

  bool done = parallel_for(exec, tiles, 1 + 4096 / (padded + 1), [&](int64_t begin, int64_t end) {
    auto* rows = static_cast<float*>(Workspace::local().get(static_cast<size_t>(kMaxTileRows * padded) * sizeof(float)));
    if (!rows) return failed.store(true);
    for (int64_t i = begin; i < end; ++i) {
      const RowTile& t = rows_of[static_cast<size_t>(i)];
      stages.pack(a.x, a.type, t.begin, t.rows, w, kind, rows, operands.as<char>() + t.begin * row_bytes);
    }
  });
  if (failed.load()) return kNoMemory;
  if (!done) return kCancelled;

  // A task: one panel for the tiles whose rows pass together.
  const int64_t together = kGroupRows / kernels.max_rows;
  const int64_t groups = (tiles + together - 1) / together;
  const int64_t bytes = w.steps * kStepBytes;
  const int64_t grain = 1 + 65536 / (bytes * std::min(tiles, together) + 1);
  done = parallel_for(exec, groups * w.panels, grain, [&](int64_t begin, int64_t end) {
    alignas(64) float c[kGroupRows * kPanel];
    for (int64_t i = begin; i < end; ++i) {
      const int64_t p = i % w.panels;
      const int64_t t0 = tiles * (i / w.panels) / groups, t1 = tiles * (i / w.panels + 1) / groups;
      const RowTile* first = rows_of.data() + t0;
      const PanelProduct q = {&w, &kernels, kind, first, t1 - t0, operands.as<char>() + first->begin * row_bytes, row_bytes,
                              0, w.steps, block_steps(exec.isa)};
      // Behind the run of panels of this task the other threads take theirs.
      const int64_t last = std::min(end - i, w.panels - p), next = (p + last + grain * (exec.threads - 1)) % w.panels;
      multiply_panel(q, p, w.panel(p) + last * bytes, w.panel(next), c, [&](const RowTile& t, const float* out) {
        stages.finish(a, t.begin, t.rows, p, out);
      });
    }
  });
  return done ? kOk : kCancelled;
}

Status pack_matrix_job(const PackMatrixArgs& a, const Exec& exec) {
  return pack_matrix(*a.matrix, a.type, a.source, MatrixSource(), a.n, a.k, a.options, exec);
}

}  // namespace heddle
