// attention_backward() in fp32 throughout, for every type, head size and stride; see attention_backward.cu.
#include "attention/attention_backward_launch.h"
#include "attention/attention_backward_rows.cuh"

namespace heddle {
namespace {

constexpr int kExactLines = 8, kExactTile = 32, kExactThreads = kExactLines * kWarp;

// Line `i` of a tensor as fp32 to shared memory, by a warp; zeros where there is none.
template <DType T>
__device__ __forceinline__ void load_line(float* to, const void* from, int64_t at, int64_t step, int32_t dim) {
#pragma unroll 1
  for (int i = static_cast<int>(threadIdx.x) % kWarp; i < dim; i += kWarp) {
    to[i] = at == kNoLine ? 0.0f : load_as_float<T>(from, at + i * step);
  }
}

// Both vectors of a row or of a key.
struct Lines {
  float *x, *y;
};
template <DType T>
__device__ __forceinline__ void load_row(const AttentionBackwardArgs& a, const Sequence& s, int64_t position, int64_t head,
                                         bool exists, Lines to) {
  const AttentionProblem& p = a.problem;
  load_line<T>(to.x, p.query, exists ? p.query_at(s, position, head) : kNoLine, p.query_stride[3], p.head_dim);
  load_line<T>(to.y, a.upstream, exists ? a.upstream_at(s, position, head) : kNoLine, 1, p.value_dim);
}
template <DType T>
__device__ __forceinline__ void load_key(const AttentionProblem& p, const Sequence& s, int64_t key, int64_t key_head,
                                         Lines to) {
  const bool exists = key < s.keys;
  load_line<T>(to.x, p.key, exists ? p.key_at(s, key, key_head) : kNoLine, p.key_stride[3], p.head_dim);
  load_line<T>(to.y, p.value, exists ? p.value_at(s, key, key_head) : kNoLine, p.value_stride[3], p.value_dim);
}

__device__ __forceinline__ float product_of(const float* a, const float* b, int32_t dim) {
  float sum = 0.0f;
#pragma unroll 1
  for (int i = 0; i < dim; ++i) sum = fmaf(a[i], b[i], sum);
  return sum;
}

// A warp owns a line (a row, or a key) and streams the other side 32 lines at a time: one per lane for the products, one
// column per lane for the sums. N * 32 columns at most.
template <DType T, bool ByRow, int N>
__global__ void __launch_bounds__(kExactThreads, N == 4 ? 2 : 1)
    attention_backward_exact_kernel(AttentionBackwardArgs a, const RowTerms* terms) {
  HEDDLE_DYNAMIC_SHARED(float, shared);
  const AttentionProblem& p = a.problem;
  BlockRows block;
  if (!(ByRow ? find_rows(p, kExactLines, blockIdx.x, blockIdx.y, &block)
              : find_keys(p, kExactLines, blockIdx.x, blockIdx.y, &block))) {
    return;
  }
  const Sequence& s = block.sequence;
  const int warp = static_cast<int>(threadIdx.x) / kWarp, lane = static_cast<int>(threadIdx.x) % kWarp;
  const int64_t group = p.group(), key_head = block.key_head, rows = s.queries * group;
  const int32_t dim = p.head_dim, width = p.value_dim;
  const Lines own = {shared + warp * (dim + width), shared + warp * (dim + width) + dim};
  float* tile_x = shared + kExactLines * (dim + width);  // [32][dim + 1]
  float* tile_y = tile_x + kExactTile * (dim + 1);       // [32][width + 1]

  const int64_t end = block.first + kExactLines < block.count ? block.first + kExactLines : block.count;
  const int64_t line = block.first + warp;
  const bool active = line < end, formed = has_transform(p);
  KeyRange range;
  if (ByRow) {
    range = union_range(p, s, block.first / group, (end - 1) / group);
  } else {
    range = seeing_positions(p, s, block.first, end);
    range = {range.lo * group, range.hi * group};
  }
  GradRow row = no_row();
  if (ByRow && active) {
    row = grad_row(p, terms, s, line / group, key_head * group + line % group);
    load_row<T>(a, s, row.position, row.head, true, own);
  } else if (active) {
    load_key<T>(p, s, line, key_head, own);
  }

  float sum_x[N] = {}, sum_y[ByRow ? 1 : N] = {};
  for (int64_t tile = range.lo / kExactTile * kExactTile; tile < range.hi; tile += kExactTile) {
    __syncthreads();
#pragma unroll 1
    for (int j = warp; j < kExactTile; j += kExactLines) {
      const Lines to = {tile_x + j * (dim + 1), tile_y + j * (width + 1)};
      const int64_t at = tile + j;
      if constexpr (ByRow) load_key<T>(p, s, at, key_head, to);
      else load_row<T>(a, s, at / group, key_head * group + at % group, at < rows, to);
    }
    __syncthreads();
    if (!active) continue;
    int64_t key = line;
    if constexpr (ByRow) {
      key = tile + lane;
    } else {
      const int64_t at = tile + lane;
      row = at < rows ? grad_row(p, terms, s, at / group, key_head * group + at % group) : no_row();
    }
    const PairGrad pair = pair_grad(p, s, row, key, formed, product_of(own.x, tile_x + lane * (dim + 1), dim),
                                    product_of(own.y, tile_y + lane * (width + 1), width));
    if (ByRow && a.bias_grad && key < s.keys) a.bias_grad[p.bias_at(s, row.position, row.head, key)] = pair.logit;
#pragma unroll 1
    for (int j = 0; j < kExactTile; ++j) {
      const float slope = __shfl_sync(kFullMask, pair.product, j);
      if (slope != 0.0f) {
#pragma unroll
        for (int c = 0; c < N; ++c) {
          const int i = c * kWarp + lane;
          if (i < dim) sum_x[c] = fmaf(slope, tile_x[j * (dim + 1) + i], sum_x[c]);
        }
      }
      if constexpr (!ByRow) {
        const float weight = __shfl_sync(kFullMask, pair.weight, j);
        if (weight == 0.0f) continue;
#pragma unroll
        for (int c = 0; c < N; ++c) {
          const int i = c * kWarp + lane;
          if (i < width) sum_y[c] = fmaf(weight, tile_y[j * (width + 1) + i], sum_y[c]);
        }
      }
    }
  }
  if (!active) return;
  const GradOut<T> to_x = ByRow ? query_grad_of<T>(a, s, line / group, key_head * group + line % group)
                                : key_grad_of<T>(a, s, line, key_head);
#pragma unroll
  for (int c = 0; c < N; ++c) {
    if (c * kWarp + lane < dim) to_x.put(c * kWarp + lane, sum_x[c] * p.scale);
  }
  if constexpr (!ByRow) {
    const GradOut<T> to_y = value_grad_of<T>(a, s, line, key_head);
#pragma unroll
    for (int c = 0; c < N; ++c) {
      if (c * kWarp + lane < width) to_y.put(c * kWarp + lane, sum_y[c]);
    }
  }
}

// Gradient of a bias that pairs share. A block owns 32 keys of a sequence, one per lane, and 8 query positions, one per
// warp, of one row of the bias; it adds over the batch, the inner sequences and the heads that share the row, in this
// order, and where all queries share it, over the positions.
template <DType T>
__global__ void __launch_bounds__(kExactThreads)
    attention_backward_bias_kernel(AttentionBackwardArgs a, const RowTerms* terms) {
  HEDDLE_DYNAMIC_SHARED(float, shared);
  const AttentionProblem& p = a.problem;
  const int warp = static_cast<int>(threadIdx.x) / kWarp, lane = static_cast<int>(threadIdx.x) % kWarp;
  const int32_t dim = p.head_dim, width = p.value_dim;
  const Lines own = {shared + warp * (dim + width), shared + warp * (dim + width) + dim};
  float* tile_x = shared + kExactLines * (dim + width);
  float* tile_y = tile_x + kExactTile * (dim + 1);
  float* totals = tile_y + kExactTile * (width + 1);  // [8][32]

  const bool all_batch = p.bias_stride[0] == 0, all_inner = p.inner_stride.bias == 0, all_heads = p.bias_stride[1] == 0;
  const bool all_queries = p.bias_stride[2] == 0, formed = has_transform(p);
  Sequence first;
  int64_t tile;
  if (p.query_offsets) {
    BlockRows block;
    if (!find_keys(p, kExactTile, blockIdx.x, 0, &block)) return;
    first = block.sequence;
    tile = block.first;
  } else {
    const int64_t each = ceil_div(p.keys, kExactTile), inner = all_inner ? 1 : p.inner, index = blockIdx.x / each;
    first = sequence_of(p, index / inner * p.inner + index % inner);
    tile = blockIdx.x % each * kExactTile;
  }
  const int64_t batch_end = all_batch && !p.query_offsets ? p.batch : first.batch + 1;
  const int64_t inner_end = all_inner && !p.query_offsets ? p.inner : first.inner + 1;
  const int64_t head_end = all_heads ? p.query_heads : blockIdx.z + 1, groups = ceil_div(first.queries, kExactLines);
  const int64_t key = tile + lane;

  const int64_t step = all_queries ? groups : int64_t{gridDim.y};
  for (int64_t begin = blockIdx.y; begin < groups; begin += step) {
    float total = 0.0f;
    Sequence s = first;
    for (s.batch = first.batch; s.batch < batch_end; ++s.batch) {
      for (s.inner = first.inner; s.inner < inner_end; ++s.inner) {
        for (int64_t head = all_heads ? 0 : blockIdx.z; head < head_end; ++head) {
          __syncthreads();
#pragma unroll 1
          for (int j = warp; j < kExactTile; j += kExactLines) {
            load_key<T>(p, s, tile + j, head / p.group(), {tile_x + j * (dim + 1), tile_y + j * (width + 1)});
          }
          __syncthreads();
          for (int64_t at = begin; at < (all_queries ? groups : begin + 1); ++at) {
            const int64_t position = at * kExactLines + warp;
            if (position >= s.queries) continue;
            __syncwarp();
            load_row<T>(a, s, position, head, true, own);
            __syncwarp();
            const float product = product_of(own.x, tile_x + lane * (dim + 1), dim);
            const float upstream = product_of(own.y, tile_y + lane * (width + 1), width);
            total += pair_grad(p, s, grad_row(p, terms, s, position, head), key, formed, product, upstream).logit;
          }
        }
      }
    }
    const int64_t head = all_heads ? 0 : blockIdx.z, position = begin * kExactLines + warp;
    if (!all_queries) {
      if (key < first.keys && position < first.queries) a.bias_grad[p.bias_at(first, position, head, key)] = total;
      continue;
    }
    totals[warp * kWarp + lane] = total;
    __syncthreads();
    if (warp == 0 && key < first.keys) {
      for (int w = 1; w < kExactLines; ++w) total += totals[w * kWarp + lane];
      a.bias_grad[p.bias_at(first, 0, head, key)] = total;
    }
  }
}

int64_t exact_shared(const AttentionProblem& p) {
  return 4 * (kExactLines * (p.head_dim + p.value_dim) + kExactTile * (p.head_dim + p.value_dim + 2));
}

template <DType T, bool ByRow, int N>
int64_t launch_exact(const AttentionBackwardArgs& a, const RowTerms* terms, heddle_cuda_job& job) {
  const AttentionProblem& p = a.problem;
  const int64_t blocks = ByRow ? row_blocks(p, kExactLines) : key_blocks(p, kExactLines), bytes = exact_shared(p);
  if (blocks == 0) return kOk;
  HEDDLE_ALLOW_SHARED((attention_backward_exact_kernel<T, ByRow, N>), bytes);
  const dim3 grid(static_cast<unsigned>(blocks), static_cast<unsigned>(p.key_heads));
  HEDDLE_LAUNCH((attention_backward_exact_kernel<T, ByRow, N>), grid, dim3(kExactThreads), bytes, job.stream, a, terms);
  return job.launched();
}

template <DType T, int N>
int64_t launch_both(const AttentionBackwardArgs& a, const RowTerms* terms, heddle_cuda_job& job) {
  const int64_t status = launch_exact<T, false, N>(a, terms, job);
  return status == kOk ? launch_exact<T, true, N>(a, terms, job) : status;
}

template <DType T>
int64_t launch_bias(const AttentionBackwardArgs& a, const RowTerms* terms, heddle_cuda_job& job) {
  const AttentionProblem& p = a.problem;
  const int64_t sequences = (p.bias_stride[0] ? p.batch : 1) * (p.inner_stride.bias ? p.inner : 1);
  const int64_t blocks = p.query_offsets ? key_blocks(p, kExactTile) : sequences * ceil_div(p.keys, kExactTile);
  const int64_t groups = p.bias_stride[2] ? ceil_div(p.queries, kExactLines) : 1;
  if (blocks > INT32_MAX) return kUnsupported;
  const int64_t bytes = exact_shared(p) + 4 * kExactThreads;
  HEDDLE_ALLOW_SHARED((attention_backward_bias_kernel<T>), bytes);
  const dim3 grid(static_cast<unsigned>(blocks), static_cast<unsigned>(groups < 65535 ? groups : 65535),
                  static_cast<unsigned>(p.bias_stride[1] ? p.query_heads : 1));
  HEDDLE_LAUNCH((attention_backward_bias_kernel<T>), grid, dim3(kExactThreads), bytes, job.stream, a, terms);
  return job.launched();
}

}  // namespace

int64_t launch_backward_exact(const AttentionBackwardArgs& a, const RowTerms* terms, heddle_cuda_job& job) {
  const AttentionProblem& p = a.problem;
  return with_float_type(p.type, [&](auto type) {
    constexpr DType kType = decltype(type)::value;
    // bf16 and fp16 come here with large heads only.
    if constexpr (kType == DType::kFloat32) {
      if (p.head_dim <= 128 && p.value_dim <= 128) return launch_both<kType, 4>(a, terms, job);
    }
    return launch_both<kType, 16>(a, terms, job);
  });
}

int64_t launch_backward_bias(const AttentionBackwardArgs& a, const RowTerms* terms, heddle_cuda_job& job) {
  return with_float_type(a.problem.type, [&](auto type) { return launch_bias<decltype(type)::value>(a, terms, job); });
}

}  // namespace heddle
