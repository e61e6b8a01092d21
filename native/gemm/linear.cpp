#include "gemm/linear.h"

#include <algorithm>
#include <atomic>

namespace heddle {

namespace {

// Tiles of one task: their operands stay in L2 while the panels pass.
constexpr int64_t kTilesPerBlock = 16;

}  // namespace

Status linear(const LinearArgs& a, const Exec& exec) {
  const PackedMatrix& w = *a.weight;
  const TileKernels& kernels = tile_kernels(exec.isa, w.type);
  const LinearStages& stages = linear_stages(exec.isa);
  const Operand kind = operand_kind(exec.isa, w.type);
  if (a.rows == 0 || w.columns == 0) return kOk;
  const int64_t row_bytes = operand_row_bytes(kind, w);
  const int64_t padded = w.steps * pack_unit(w.type);
  const int64_t tiles = (a.rows + kernels.max_rows - 1) / kernels.max_rows;
  auto first_row = [&](int64_t i) { return a.rows * i / tiles; };
  HugeBuffer operands;
  if (!operands.reset(static_cast<size_t>(a.rows * row_bytes))) return kNoMemory;
  std::atomic<bool> failed{false};

  bool done = parallel_for(exec, tiles, 1 + 4096 / (padded + 1), [&](int64_t begin, int64_t end) {
    auto* rows = static_cast<float*>(Workspace::local().get(static_cast<size_t>(kMaxTileRows * padded) * sizeof(float)));
    if (!rows) return failed.store(true);
    for (int64_t i = begin; i < end; ++i) {
      const int64_t from = first_row(i);
      stages.pack(a.x, a.type, from, static_cast<int>(first_row(i + 1) - from), w, kind, rows,
                  operands.as<char>() + from * row_bytes);
    }
  });
  if (failed.load()) return kNoMemory;
  if (!done) return kCancelled;

  const int64_t blocks = (tiles + kTilesPerBlock - 1) / kTilesPerBlock;
  const int64_t work = w.steps * kStepBytes * std::min(tiles, kTilesPerBlock);
  done = parallel_for(exec, blocks * w.panels, 1 + 65536 / (work + 1), [&](int64_t begin, int64_t end) {
    alignas(64) float c[kMaxTileRows * kPanel];
    for (int64_t i = begin; i < end; ++i) {
      const int64_t p = i % w.panels;
      const int64_t t0 = i / w.panels * kTilesPerBlock, t1 = std::min(tiles, t0 + kTilesPerBlock);
      for (int64_t tile = t0; tile < t1; ++tile) {
        const int64_t from = first_row(tile);
        const int rows = static_cast<int>(first_row(tile + 1) - from);
        TileCall t;
        fill_tile(t, kind, w, p, operands.as<char>() + from * row_bytes, rows);
        t.c = c;
        kernels.tile[rows](t);
        stages.finish(a, from, rows, p, c);
      }
    }
  });
  return done ? kOk : kCancelled;
}

Status pack_matrix_job(const PackMatrixArgs& a, const Exec& exec) {
  return pack_matrix(*a.matrix, a.type, a.source, MatrixSource(), a.n, a.k, a.options, exec);
}

}  // namespace heddle
