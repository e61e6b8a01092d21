// Chunks of products: up to 256 x 256 of an output, accumulated over the whole depth in thread scratch.
#pragma once
#include <algorithm>

#include "core/workspace.h"
#include "privacy/kernels.h"

namespace heddle {

// One side of a product. By rows: x is a column of the source and y a row of the list (weight gradients); by columns:
// x is a row of the list and y a column (Gram matrices).
struct Side {
  RowSource source;
  const int64_t* rows = nullptr;
  const float* scale = nullptr;  // by rows: per entry of the list
  float factor = 1.0f;           // by columns
  bool by_rows = true;

  void pack(const PrivacyKernels& k, int64_t x, int64_t count, int64_t y, int64_t depth, float* out) const {
    if (by_rows) k.pack_rows(source, rows + y, scale ? scale + y : nullptr, x, count, depth, out);
    else k.pack_columns(source, rows + x, count, y, depth, factor, out);
  }
};

struct ChunkScratch {
  static constexpr int64_t kPanelFloats = int64_t{kChunkPanels} * kDepth * kBlock;
  static constexpr int64_t kBlockFloats = int64_t{kChunkPanels} * kChunkPanels * kBlockSize;

  // Per thread, reused; false without memory.
  bool get() {
    auto* all = static_cast<float*>(Workspace::local().get((2 * kPanelFloats + 2 * kBlockFloats) * sizeof(float)));
    if (!all) return false;
    p = all, q = p + kPanelFloats, first = q + kPanelFloats, second = first + kBlockFloats;
    return true;
  }
  float *p = nullptr, *q = nullptr, *first = nullptr, *second = nullptr;
};

inline int64_t panels_of(int64_t count) { return (count + kBlock - 1) / kBlock; }

// blocks[i][j] (+)= P[x0 + 32 i ..] Q[x1 + 32 j ..]ᵀ over y in [0, depth); blocks lie kChunkPanels to a row.
// symmetric: P = Q and x0 = x1; only blocks on and above the diagonal. `sums`: also the column sums of P.
inline void chunk_product(const PrivacyKernels& k, const ChunkScratch& s, const Side& p, int64_t x0, int64_t n0,
                          const Side& q, int64_t x1, int64_t n1, int64_t depth, bool symmetric, bool first, float* blocks,
                          float* sums) {
  const int64_t rows = panels_of(n0), columns = panels_of(n1);
  if (depth == 0 && first) {
    std::fill(blocks, blocks + ChunkScratch::kBlockFloats, 0.0f);
    if (sums) std::fill(sums, sums + kChunk, 0.0f);
  }
  for (int64_t y = 0; y < depth; y += kDepth) {
    const int64_t step = std::min<int64_t>(kDepth, depth - y);
    const bool fresh = first && y == 0;
    p.pack(k, x0, n0, y, step, s.p);
    if (!symmetric) q.pack(k, x1, n1, y, step, s.q);
    const float* right = symmetric ? s.p : s.q;
    if (sums) {
      for (int64_t i = 0; i < rows; ++i) k.column_sums(s.p + i * step * kBlock, step, sums + i * kBlock, fresh);
    }
    for (int64_t j = 0; j < columns; ++j) {
      const int width = static_cast<int>(std::min<int64_t>(kBlock, n1 - j * kBlock));
      for (int64_t i = 0; i < (symmetric ? j + 1 : rows); ++i) {
        const int height = static_cast<int>(std::min<int64_t>(kBlock, n0 - i * kBlock));
        k.block(s.p + i * step * kBlock, height, right + j * step * kBlock, width, step,
                blocks + (i * kChunkPanels + j) * kBlockSize, fresh, symmetric && i == j);
      }
    }
  }
}

// sum of (x + shift) * y over all blocks of a chunk.
inline double chunk_dot(const PrivacyKernels& k, const float* x, const float* y, float shift, int64_t n0, int64_t n1,
                        bool symmetric) {
  double total = 0;
  for (int64_t i = 0; i < panels_of(n0); ++i) {
    const int height = static_cast<int>(std::min<int64_t>(kBlock, n0 - i * kBlock));
    for (int64_t j = symmetric ? i : 0; j < panels_of(n1); ++j) {
      const int width = static_cast<int>(std::min<int64_t>(kBlock, n1 - j * kBlock));
      const int64_t at = (i * kChunkPanels + j) * kBlockSize;
      const bool diagonal = symmetric && i == j;
      const double d = k.block_dot(x + at, y + at, shift, height, width, diagonal);
      total += symmetric && !diagonal ? 2 * d : d;
    }
  }
  return total;
}

}  // namespace heddle
