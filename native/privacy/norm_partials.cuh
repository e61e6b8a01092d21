// Squared norms from partial sums: each block leaves one in double, and a warp per sample adds them in order.
#pragma once
#include "cuda/job.h"
#include "privacy/per_sample_squared_norms.h"
#include "privacy/product.cuh"

namespace heddle {

// By every thread of the block; `shared`: kProductThreads / kWarp values.
__device__ inline void put_partial(double sum, double* shared, double* to) {
  sum = block_sum<kProductThreads>(sum, shared);
  if (threadIdx.x == 0) *to = sum;
}

// blockIdx.x to a pair (i <= j) of `tiles` tiles.
struct TilePair {
  int32_t i, j;
};
__device__ inline TilePair tile_pair(int32_t index, int32_t tiles) {
  TilePair p{0, index};
  while (p.j >= tiles - p.i) p.j -= tiles - p.i++;  // row i of the upper triangle has tiles - i pairs
  p.j += p.i;
  return p;
}

// The sum over pairs t <= s < of ((A A^T)_ts + bias) (G G^T)_ts of a thread's elements, those below the diagonal by symmetry.
template <class Product>
__device__ __forceinline__ double ghost_sum(const Product& a, const Product& g, int64_t t0, int64_t s0, bool bias) {
  double sum = 0.0;
#pragma unroll
  for (int e = 0; e < 16; ++e) {
    const int64_t t = t0 + a.row(e), s = s0 + a.column(e);
    if (t > s) continue;
    const double term = (static_cast<double>(a.c[e]) + (bias ? 1.0 : 0.0)) * g.c[e];
    sum += t == s ? term : 2.0 * term;
  }
  return sum;
}

// The squares of a thread's elements of columns below `columns`.
template <class Product>
__device__ __forceinline__ double square_sum(const Product& p, int64_t first, int64_t columns) {
  double sum = 0.0;
#pragma unroll
  for (int e = 0; e < 16; ++e) {
    if (first + p.column(e) < columns) sum += static_cast<double>(p.c[e]) * p.c[e];
  }
  return sum;
}

// Which blocks a sample's norm of a linear layer takes.
struct NormBlocks {
  bool ghost = false;
  int32_t tiles = 0;  // of positions, or of columns
  int64_t count = 0;
};
NormBlocks linear_norm_blocks(const RowLayer& l, NormMethod method);
// Blocks of sample i leave their sums at partial[i * pitch], `count` or l.positions of them. At most 65535 samples.
int64_t launch_linear_norms(const RowLayer& l, const NormBlocks& b, double* partial, int64_t pitch, heddle_cuda_job& job);
int64_t launch_embedding_norms(const RowLayer& l, double* partial, int64_t pitch, heddle_cuda_job& job);

// out[i] = max(0, sum of partial[i][0 .. count)); NaN stays.
int64_t sum_partials(const double* partial, int64_t samples, int64_t count, float* out, heddle_cuda_job& job);

}  // namespace heddle
