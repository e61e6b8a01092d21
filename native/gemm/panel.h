// One packed panel times the rows of several tiles: the order that keeps weights and rows in the caches.
//
// With more than one tile, k is cut into blocks of up to 192 steps (24 KiB of the panel, in L1 while all tiles pass
// over them; chains wait in c meanwhile, float types only). So L2 gives each weight once for all rows instead of once
// for 14 (6 on AVX2), and the rows' operands once per panel. What the thread reads next is brought to L2 at the same
// pace, kAhead bytes in advance: a compute-bound product then never waits for memory.
//
// The rows that pass together are limited (kGroupRows), so that their operands stay in L2 beside the weights in
// flight: 84 rows (6 tiles of 14, 14 of 6) x 2048 floats are 688 KiB, and do 42 operations per byte of weights read.
//
// Measured on two cores (64 experts of 2048/768, 64 rows each, share of the peak of plain multiply-adds in the same
// second, before -> after): fp32 84 -> 88 %, AVX2 fp32 75 -> 83 %, int8 63 -> 71 %; 8 rows each, share of the read
// bandwidth: 82 -> 86 %. These are all changes together, and 128 or 256 steps differ from 192 by no more than the noise. A
// profile of int8 had 7 % of its samples at the `rep stos` that zeroed a TileCall (fp32: below 2 %). In a loop of products
// alone, without any software prefetch, one thread reaches 62 % and two 52 %.
//
// bf16 and float8 are widened to floats once for all tiles, a block at a time (24 KiB; float8: a scale group, 16 KiB)
// that stays in L1. The tiles' own widening takes 4 to 8 operations of the FMA's ports per two vectors: 64 experts of
// 2048/768 at 512 tokens, share of the FMA peak before -> after: float8 62 -> 84 % (AVX2 59 -> 79), bf16 83 -> 84 (AVX2
// 78 -> 80), where fp32 has 89. The bits are the same: every product and sum is.
//
// Where the rest of the peak goes, fp32, quiet host: tiles reach 98 % with operands in L1, 96 % with all of a group's in
// L2; weights from memory instead of L2 cost 1.3 %, activations 1.3 %, writing down's rows 1.2 %, packing x 1.7 %,
// combining 1.1 %. Tried without gain: asking for one line of two (-2 %; none: -21 %), rows of x of the next group asked
// for during this one's down product (-1 to 0 %), the last groups in halves, which read weights twice (-1 to -2 %), every
// other row's broadcast in a register (0), the whole of k as one block (-2 %).
#pragma once
#include <algorithm>

#include "gemm/packed.h"

namespace heddle {

constexpr int64_t kGroupRows = 84;
constexpr int64_t kMaxGroupTiles = kGroupRows / 4;  // no kernel table has less than 4 rows
constexpr int64_t kBlockSteps = 192;
constexpr int64_t kAhead = int64_t{64} << 10;

// Consecutive rows with one operand.
struct RowTile {
  int64_t begin;
  int32_t rows;
};

struct PanelProduct {
  const PackedMatrix* matrix;
  const TileKernels* kernels;
  Operand kind;
  const RowTile* tiles;
  int64_t count;
  const char* operands;  // of the first tile; the others' follow, row_bytes per row
  int64_t row_bytes;
  int64_t first_step, last_step;  // range of k
  int64_t block_steps;
};

// avx512's tiles take all 32 columns at once: there a block may come from L2 each time, and calls a fourth as long would
// cost 1 to 5 %. Narrower tiles pass twice or more over a block, which must then be in L1.
inline int64_t block_steps(Isa isa) { return isa == Isa::kAvx512 ? 768 : kBlockSteps; }

// With this many tiles a type that kernels widen in registers is widened once for all of them, block by block (float8:
// scale group by scale group).
constexpr int64_t kWidenTiles = 3;
constexpr int64_t kWidenedFloats = kBlockSteps * kPanel;

inline bool chains_continue(PackType t) { return t == PackType::kFloat32 || t == PackType::kBFloat16; }

// Panel p over the range of k, c[row][32] (row counted from the first tile's), continuing the chains in c when
// first_step > 0. `end`: where the bytes end that this thread reads in a row from here; `next`: what it reads after
// them, or nullptr. done(tile, c) as soon as a tile is complete.
template <class Done>
void multiply_panel(const PanelProduct& q, int64_t p, const char* end, const char* next, float* c, const Done& done) {
  const PackedMatrix& m = *q.matrix;
  const int64_t range = q.last_step - q.first_step;
  const bool widen = q.kernels->widen && q.count >= kWidenTiles;
  const int64_t unit = widen ? pack_unit(m.type) : 1;  // steps of the tiles per step of the panel
  alignas(64) float widened[kWidenedFloats];
  int64_t block = range;
  if (widen && m.group) {
    block = m.group / unit;
  } else if (q.count > 1 && chains_continue(m.type)) {
    const int64_t most = widen ? kBlockSteps / unit : q.block_steps;
    const int64_t blocks = (range + most - 1) / most;
    block = (range + blocks - 1) / blocks;
  }
  const int64_t step_bytes = packs_values(q.kind) ? 4 * pack_unit(m.type) : 4;  // of an operand's row, float types
  const TileKernels& kernels = widen ? *q.kernels->widened : *q.kernels;
  TileCall calls[kMaxGroupTiles];
  for (int64_t i = 0; i < q.count; ++i) {
    const int64_t row = q.tiles[i].begin - q.tiles[0].begin;
    fill_tile(calls[i], q.kind, m, p, q.operands + row * q.row_bytes, q.tiles[i].rows);
    calls[i].c = c + row * kPanel;
    if (q.count > 1) calls[i].prefetch_stride = kStepBytes / unit / q.count;
  }
  for (int64_t s0 = q.first_step; s0 < q.last_step; s0 += block) {
    const int64_t steps = std::min(block, q.last_step - s0);
    const char* b = m.panel(p) + s0 * kStepBytes;
    const char* ahead = nullptr;
    if (q.count > 1) {
      const int64_t distance = std::max(kAhead, steps * kStepBytes), left = end - b;
      ahead = distance < left ? b + distance : next ? next + (distance - left) : nullptr;
    }
    if (widen) q.kernels->widen(b, steps, widened);
    for (int64_t i = 0; i < q.count; ++i) {
      const RowTile& tile = q.tiles[i];
      TileCall& t = calls[i];
      if (s0 > 0) t.a = q.operands + (tile.begin - q.tiles[0].begin) * q.row_bytes + s0 * tile.rows * step_bytes;
      t.b = widen ? reinterpret_cast<const char*>(widened) : b;
      t.steps = steps * unit;
      if (widen && m.group) t.b_scale = m.scale.as<float>() + (p * m.groups() + s0 / block) * kPanel;
      t.accumulate = s0 > 0;
      t.resident = widen || (i > 0 && block <= kBlockSteps && block < range);
      t.prefetch = ahead ? ahead + i * t.prefetch_stride * t.steps : nullptr;
      kernels.tile[tile.rows](t);
      if (s0 + steps == m.steps) done(tile, t.c);
    }
  }
}

}  // namespace heddle
