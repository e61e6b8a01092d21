// The inner loops of the privacy family, one table per instruction set; the drivers (*.cpp) hold no SIMD code.
//
// Every matrix product here is made of 32 x 32 blocks of an output that is never stored whole:
//   C[x][x'] = sum_y P[y][x] Q[y][x']        P, Q packed as panels [depth][32]
// A Gram matrix A Aᵀ has x = position, y = feature; a weight gradient Gᵀ A has x = output, x' = input, y = position.
// Precision: products and sums of one depth block (kDepth values of y) in fp32 in ascending y, block sums added in
// fp32 in ascending order; what becomes a norm is summed further in double. None of it depends on threads or batch.
#pragma once
#include "core/dtype.h"
#include "core/thread_pool.h"

namespace heddle {

constexpr int kBlock = 32;        // rows and columns of a block: one panel
constexpr int kBlockSize = kBlock * kBlock;
// 128 x 32 floats are 16 KiB: two panels stay in L1 while their block is computed, and the 4 KiB of the block are
// read and written once per 4096 cycles of multiplication.
constexpr int kDepth = 128;
constexpr int kChunkPanels = 8;   // panels of one chunk: 8 x 8 blocks (256 KiB) are accumulated per task, in L2
constexpr int kChunk = kChunkPanels * kBlock;
// Clipped sums are 16 panels high: 3 panels are packed for 16 blocks instead of 4.
constexpr int kTallPanels = 16;
constexpr int kTall = kTallPanels * kBlock;

// Rows of a matrix whose elements are contiguous along a row.
struct RowSource {
  const void* data = nullptr;
  DType type = DType::kFloat32;
  int64_t stride = 0;
};

// Cache lines that the next step will read: asked for while this one multiplies.
struct Ahead {
  const char* const* next = nullptr;
  const char* const* end = nullptr;
};

struct PrivacyKernels {
  // out[panel][y][i] = scale[y] * source[rows[y]][column + 32 panel + i]; 0 beyond `count` columns. No scale: 1.
  void (*pack_rows)(const RowSource& source, const int64_t* rows, const float* scale, int64_t column, int64_t count,
                    int64_t depth, float* out);
  // out[panel][y][i] = factor * source[rows[32 panel + i]][column + y]; 0 beyond `count` rows.
  void (*pack_columns)(const RowSource& source, const int64_t* rows, int64_t count, int64_t column, int64_t depth,
                       float factor, float* out);
  // c[rows][32] = (or +=, unless first) the product of two panels; columns beyond `columns` may be left alone.
  // `upper`: only elements on and above the diagonal are needed.
  void (*block)(const float* p, int rows, const float* q, int columns, int64_t depth, float* c, bool first, bool upper,
                Ahead* ahead);
  // sum of (x + shift) * y over a block; diagonal: twice what is above the diagonal and once what is on it.
  double (*block_dot)(const float* x, const float* y, float shift, int rows, int columns, bool diagonal);
  // sums[i] (+)= sum_y panel[y][i]
  void (*column_sums)(const float* panel, int64_t depth, float* sums, bool first);
  // sum of squares of one row
  double (*squared_row)(const RowSource& source, int64_t row, int64_t n);
  // out[i] += sum_r scale[r] * source[rows[r]][i]; no scale: 1. Returns the sum of squares of that sum; out may be null.
  double (*sum_rows)(const RowSource& source, const int64_t* rows, const float* scale, int64_t count, int64_t n,
                     float* out);
  // weight[i] = sum_r scale[r] * g[rows[r]][i] * x[rows[r]][i], bias[i] = sum_r scale[r] * g[rows[r]][i], over columns
  // column .. column + n, n <= kChunk.
  void (*scale_rows)(const RowSource& x, const RowSource& g, const int64_t* rows, const float* scale, int64_t count,
                     int64_t column, int64_t n, float* weight, float* bias);
  // sums of x * g and of g over one row
  void (*channel_sums)(const RowSource& x, const RowSource& g, int64_t row, int64_t n, double* product, double* sum);
};

const PrivacyKernels& privacy_kernels(Isa isa);

}  // namespace heddle
