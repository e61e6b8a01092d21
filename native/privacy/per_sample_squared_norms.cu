// Per-sample squared norms on the device; definitions in per_sample_squared_norms.h. Rows of padding are not read.
#include "privacy/per_sample_squared_norms.h"

#include "privacy/norm_partials.cuh"

namespace heddle {
namespace {

__device__ inline bool kept(const RowLayer& l, int64_t row) { return !l.mask || l.mask[row]; }

// blockIdx.x: a pair (i <= j) of tiles of positions; blockIdx.y: a sample.
template <DType T>
__global__ void __launch_bounds__(kProductThreads) ghost_norm_kernel(RowLayer l, int32_t tiles, double* partial,
                                                                     int64_t pitch) {
  __shared__ float4 memory[kMatrixShared / 16];  // 16-byte aligned for ldmatrix
  __shared__ double sums[kProductThreads / kWarp];
  const TilePair pair = tile_pair(static_cast<int32_t>(blockIdx.x), tiles);
  const int64_t sample = blockIdx.y, first = sample * l.positions;
  const int64_t t0 = int64_t{pair.i} * kProductTile, s0 = int64_t{pair.j} * kProductTile;
  auto gram = [&](const RowSource& source, int64_t columns, auto& product) {
    auto element = [&](int64_t position, int64_t k) {
      return position < l.positions && kept(l, first + position) ? load_source(source, first + position, k) : 0.0f;
    };
    product.run(columns, memory, [&](int64_t k, int r) { return element(t0 + r, k); },
                [&](int64_t k, int r) { return element(s0 + r, k); });
  };
  typename ProductOf<T, true>::type a, g;
  gram(l.inputs, l.input_count, a);
  gram(l.grad_outputs, l.output_count, g);
  put_partial(ghost_sum(a, g, t0, s0, l.bias), sums, partial + sample * pitch + blockIdx.x);
}

// blockIdx.x: a tile of the gradient [outputs, inputs + bias]; blockIdx.y: a sample.
template <DType T>
__global__ void __launch_bounds__(kProductThreads) gradient_norm_kernel(RowLayer l, int32_t across, double* partial,
                                                                        int64_t pitch) {
  __shared__ float4 memory[kMatrixShared / 16];  // 16-byte aligned for ldmatrix
  __shared__ double sums[kProductThreads / kWarp];
  const int64_t sample = blockIdx.y, first = sample * l.positions;
  const int64_t p0 = int64_t{blockIdx.x} / across * kProductTile, d0 = int64_t{blockIdx.x} % across * kProductTile;
  typename ProductOf<T, false>::type product;
  product.run(
      l.positions, memory,
      [&](int64_t k, int i) {
        return p0 + i < l.output_count && kept(l, first + k) ? load_source(l.grad_outputs, first + k, p0 + i) : 0.0f;
      },
      [&](int64_t k, int j) {
        if (d0 + j > l.input_count || !kept(l, first + k)) return 0.0f;
        return d0 + j == l.input_count ? 1.0f : load_source(l.inputs, first + k, d0 + j);
      });
  put_partial(square_sum(product, d0, l.input_count + (l.bias ? 1 : 0)), sums,
              partial + sample * pitch + blockIdx.x);
}

// blockIdx.x: a position; blockIdx.y: a sample. The first position of each id sums the rows of that id.
__global__ void __launch_bounds__(kProductThreads) embedding_norm_kernel(RowLayer l, double* partial, int64_t pitch) {
  __shared__ double sums[kProductThreads / kWarp];
  const int64_t sample = blockIdx.y, first = sample * l.positions, at = blockIdx.x;
  double* to = partial + sample * pitch + at;
  const int32_t id = l.indices[first + at];
  int earlier = id == l.padding_index || !kept(l, first + at);
  for (int64_t t = threadIdx.x; t < at && !earlier; t += kProductThreads) {
    earlier = l.indices[first + t] == id && kept(l, first + t);
  }
  if (__syncthreads_or(earlier)) {
    if (threadIdx.x == 0) *to = 0.0;
    return;
  }
  double sum = 0.0;
  for (int64_t c = threadIdx.x; c < l.output_count; c += kProductThreads) {
    float v = 0.0f;
    for (int64_t t = at; t < l.positions; ++t) {
      if (l.indices[first + t] == id && kept(l, first + t)) v += load_source(l.grad_outputs, first + t, c);
    }
    sum += static_cast<double>(v) * v;
  }
  put_partial(sum, sums, to);
}

// A block a sample: |sum_t x_t * G_t|^2 (+ |sum_t G_t|^2).
__global__ void __launch_bounds__(kProductThreads) scale_norm_kernel(RowLayer l, double* partial) {
  __shared__ double sums[kProductThreads / kWarp];
  const int64_t sample = blockIdx.x, first = sample * l.positions;
  double sum = 0.0;
  for (int64_t c = threadIdx.x; c < l.output_count; c += kProductThreads) {
    float w = 0.0f, b = 0.0f;
    for (int64_t t = 0; t < l.positions; ++t) {
      if (!kept(l, first + t)) continue;
      const float g = load_source(l.grad_outputs, first + t, c);
      w = fmaf(load_source(l.inputs, first + t, c), g, w);
      b += g;
    }
    sum += static_cast<double>(w) * w + (l.bias ? static_cast<double>(b) * b : 0.0);
  }
  put_partial(sum, sums, partial + sample);
}

// A block for each (sample, channel): positions are channels, the mask is [samples, output_count].
__global__ void __launch_bounds__(kProductThreads) channel_norm_kernel(RowLayer l, double* partial) {
  __shared__ float sums[kProductThreads / kWarp];
  const int64_t row = blockIdx.x;
  const uint8_t* mask = l.mask ? l.mask + row / l.positions * l.output_count : nullptr;
  float w = 0.0f, b = 0.0f;
  for (int64_t c = threadIdx.x; c < l.output_count; c += kProductThreads) {
    if (mask && !mask[c]) continue;
    const float g = load_source(l.grad_outputs, row, c);
    w = fmaf(load_source(l.inputs, row, c), g, w);
    b += g;
  }
  w = block_sum<kProductThreads>(w, sums);
  b = block_sum<kProductThreads>(b, sums);
  if (threadIdx.x == 0) {
    partial[row] = static_cast<double>(w) * w + (l.bias ? static_cast<double>(b) * b : 0.0);
  }
}

// out[i] = max(0, sum of partial[i][0 .. count)), a warp each, in a fixed order; NaN stays.
__global__ void __launch_bounds__(kProductThreads) sum_partials_kernel(const double* partial, int64_t rows,
                                                                       int64_t count, float* out) {
  const int64_t row = int64_t{blockIdx.x} * (kProductThreads / kWarp) + threadIdx.x / kWarp;
  if (row >= rows) return;
  double sum = 0.0;
  for (int64_t i = threadIdx.x % kWarp; i < count; i += kWarp) sum += partial[row * count + i];
  sum = warp_sum(sum);
  if (threadIdx.x % kWarp == 0) out[row] = static_cast<float>(sum < 0.0 ? 0.0 : sum);
}

}  // namespace

int64_t sum_partials(const double* partial, int64_t samples, int64_t count, float* out, heddle_cuda_job& job) {
  const int64_t blocks = ceil_div(samples, kProductThreads / kWarp);
  HEDDLE_LAUNCH(sum_partials_kernel, dim3(static_cast<unsigned>(blocks)), dim3(kProductThreads), 0, job.stream, partial,
                samples, count, out);
  return job.launched();
}

NormBlocks linear_norm_blocks(const RowLayer& l, NormMethod method) {
  NormBlocks b;
  b.ghost = method == NormMethod::kGhost || (method == NormMethod::kByLength &&
                                             2 * l.positions * l.positions <= l.input_count * l.output_count);
  const int64_t tiles = ceil_div(l.positions, kProductTile), across = ceil_div(l.input_count + (l.bias ? 1 : 0), kProductTile);
  b.tiles = static_cast<int32_t>(b.ghost ? tiles : across);
  b.count = b.ghost ? tiles * (tiles + 1) / 2 : ceil_div(l.output_count, kProductTile) * across;
  return b;
}

int64_t launch_linear_norms(const RowLayer& l, const NormBlocks& b, double* partial, int64_t pitch, heddle_cuda_job& job) {
  if (b.count == 0) return kOk;
  const dim3 grid(static_cast<unsigned>(b.count), static_cast<unsigned>(l.samples));
  return with_float_type(product_type(l.inputs, l.grad_outputs), [&](auto type) {
    constexpr DType kType = decltype(type)::value;
    if (b.ghost) {
      HEDDLE_LAUNCH((ghost_norm_kernel<kType>), grid, dim3(kProductThreads), 0, job.stream, l, b.tiles, partial, pitch);
    } else {
      HEDDLE_LAUNCH((gradient_norm_kernel<kType>), grid, dim3(kProductThreads), 0, job.stream, l, b.tiles, partial, pitch);
    }
    return job.launched();
  });
}

int64_t launch_embedding_norms(const RowLayer& l, double* partial, int64_t pitch, heddle_cuda_job& job) {
  if (l.positions == 0) return kOk;
  HEDDLE_LAUNCH(embedding_norm_kernel, dim3(static_cast<unsigned>(l.positions), static_cast<unsigned>(l.samples)),
                dim3(kProductThreads), 0, job.stream, l, partial, pitch);
  return job.launched();
}

HEDDLE_CUDA_OP(linear_squared_norms, NormsArgs) {
  const RowLayer& l = a.layer;
  if (l.samples == 0) return kOk;
  if (l.samples > 65535) return kUnsupported;
  const NormBlocks blocks = linear_norm_blocks(l, a.method);
  double* partial = job.scratch<double>(l.samples * blocks.count);
  if (!partial) return kNoMemory;
  const int64_t status = launch_linear_norms(l, blocks, partial, blocks.count, job);
  return status == kOk ? sum_partials(partial, l.samples, blocks.count, a.out, job) : status;
}

HEDDLE_CUDA_OP(embedding_squared_norms, NormsArgs) {
  const RowLayer& l = a.layer;
  if (l.samples == 0) return kOk;
  if (l.samples > 65535) return kUnsupported;
  double* partial = job.scratch<double>(l.samples * l.positions);
  if (!partial) return kNoMemory;
  const int64_t status = launch_embedding_norms(l, partial, l.positions, job);
  return status == kOk ? sum_partials(partial, l.samples, l.positions, a.out, job) : status;
}

HEDDLE_CUDA_OP(scale_squared_norms, NormsArgs) {
  const RowLayer& l = a.layer;
  if (l.samples == 0) return kOk;
  double* partial = job.scratch<double>(l.samples);
  if (!partial) return kNoMemory;
  HEDDLE_LAUNCH(scale_norm_kernel, dim3(static_cast<unsigned>(l.samples)), dim3(kProductThreads), 0, job.stream, l,
                partial);
  return sum_partials(partial, l.samples, 1, a.out, job);
}

HEDDLE_CUDA_OP(channel_squared_norms, NormsArgs) {
  const RowLayer& l = a.layer;
  if (l.samples == 0) return kOk;
  double* partial = job.scratch<double>(l.samples * l.positions);
  if (!partial) return kNoMemory;
  if (l.positions > 0) {
    HEDDLE_LAUNCH(channel_norm_kernel, dim3(static_cast<unsigned>(l.samples * l.positions)), dim3(kProductThreads), 0,
                  job.stream, l, partial);
  }
  return sum_partials(partial, l.samples, l.positions, a.out, job);
}

}  // namespace heddle
