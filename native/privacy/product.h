// Chunks of products: up to 256 x 256 of an output, accumulated over the whole depth in thread scratch.
#pragma once
#include <algorithm>

#include "core/huge.h"
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

  // Addresses of the cache lines that pack() reads.
  const char** lines(int64_t x, int64_t count, int64_t y, int64_t depth, const char** out) const {
    const int64_t size = dtype_size(source.type);
    const int64_t* list = by_rows ? rows + y : rows + x;
    const int64_t runs = by_rows ? depth : count, bytes = (by_rows ? count : depth) * size;
    for (int64_t r = 0; r < runs; ++r) {
      const char* at = static_cast<const char*>(source.data) + (list[r] * source.stride + (by_rows ? x : y)) * size;
      for (int64_t b = 0; b < bytes; b += 64) *out++ = at + b;
    }
    return out;
  }
};

struct ChunkScratch {
  static constexpr int64_t kPanelFloats = int64_t{kDepth} * kBlock;
  static constexpr int64_t kBlockFloats = int64_t{kTallPanels} * kChunkPanels * kBlockSize;
  static constexpr int64_t kLines = int64_t{kTall + kChunk} * kDepth * 4 / 64;

  // One huge page per thread, reused; false without memory.
  bool get() {
    constexpr size_t bytes = (size_t{2} << 20) - 64;
    constexpr int64_t floats = (kTallPanels + kChunkPanels) * kPanelFloats + kBlockFloats + kBlockFloats / 2;
    static_assert(floats * sizeof(float) + kLines * sizeof(char*) <= bytes, "scratch of one huge page");
    static thread_local HugeBuffer buffer;
    if (!buffer && !buffer.reset(bytes)) return false;
    char* all = buffer.as<char>();
    lines = reinterpret_cast<const char**>(all);
    p = reinterpret_cast<float*>(all + kLines * sizeof(char*));
    q = p + kTallPanels * kPanelFloats, first = q + kChunkPanels * kPanelFloats, second = first + kBlockFloats;
    return true;
  }
  float *p = nullptr, *q = nullptr;
  float* first = nullptr;   // up to kTallPanels x kChunkPanels blocks
  float* second = nullptr;  // up to kChunkPanels x kChunkPanels blocks
  const char** lines = nullptr;
};

inline int64_t panels_of(int64_t count) { return (count + kBlock - 1) / kBlock; }

// One product: blocks[i][j] (+)= sum over y of P[y][x0 + 32 i ..] Q[y][x1 + 32 j ..]; blocks lie kChunkPanels to a row.
struct ChunkProduct {
  Side p, q;
  int64_t x0 = 0, n0 = 0, x1 = 0, n1 = 0;
  int64_t depth = 0;
  bool symmetric = false;  // P = Q and x0 = x1: only blocks on and above the diagonal

  // The lines that the step at `y` reads.
  const char** lines(int64_t y, const char** out) const {
    const int64_t step = std::min<int64_t>(kDepth, depth - y);
    if (step <= 0) return out;
    out = p.lines(x0, n0, y, step, out);
    return symmetric ? out : q.lines(x1, n1, y, step, out);
  }

  // `sums`: also the column sums of P. `then`: the product that follows, whose first lines are asked for at the end.
  void run(const PrivacyKernels& k, const ChunkScratch& s, bool first, float* blocks, float* sums,
           const ChunkProduct* then) const {
    const int64_t rows = panels_of(n0), columns = panels_of(n1);
    if (depth == 0 && first) {
      std::fill(blocks, blocks + rows * kChunkPanels * kBlockSize, 0.0f);
      if (sums) std::fill(sums, sums + rows * kBlock, 0.0f);
    }
    for (int64_t y = 0; y < depth; y += kDepth) {
      const int64_t step = std::min<int64_t>(kDepth, depth - y);
      const bool fresh = first && y == 0;
      Ahead ahead;
      ahead.next = s.lines;
      ahead.end = y + step < depth ? lines(y + step, s.lines) : then ? then->lines(0, s.lines) : s.lines;
      if (!symmetric) p.pack(k, x0, n0, y, step, s.p);
      // Rows of the source are long: a panel at a time would touch a page for every 128 bytes, so all are packed at
      // once. By columns a page holds many panels' worth, and the panel stays in L1 for its column of blocks.
      const bool whole = !symmetric && q.by_rows;
      if (whole) q.pack(k, x1, n1, y, step, s.q);
      for (int64_t j = 0; j < columns; ++j) {
        const int width = static_cast<int>(std::min<int64_t>(kBlock, n1 - j * kBlock));
        float* right = (symmetric ? s.p : s.q) + j * step * kBlock;
        if (!whole) (symmetric ? p : q).pack(k, x1 + j * kBlock, width, y, step, right);
        for (int64_t i = 0; i < (symmetric ? j + 1 : rows); ++i) {
          const int height = static_cast<int>(std::min<int64_t>(kBlock, n0 - i * kBlock));
          k.block(s.p + i * step * kBlock, height, right, width, step, blocks + (i * kChunkPanels + j) * kBlockSize, fresh,
                  symmetric && i == j, &ahead);
        }
      }
      for (int64_t i = 0; sums && i < rows; ++i) {
        k.column_sums(s.p + i * step * kBlock, step, sums + i * kBlock, fresh);
      }
    }
  }
};

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
