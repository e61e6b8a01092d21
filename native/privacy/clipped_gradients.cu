// Clipped gradient sums on the device; definitions in clipped_gradients.h. One block owns a tile of the result and takes all rows in order: no atomics, the same bits in
// every run. Rows of padding and of samples with factor 0 are not read.
#include "privacy/clipped_gradients.h"

#include "privacy/clipped_launch.h"
#include "privacy/product.cuh"

namespace heddle {
namespace {

constexpr int64_t kRowsPerPart = 256;

__device__ inline float factor_of(const ClippedArgs& a, int64_t row) {
  return a.layer.mask && !a.layer.mask[row] ? 0.0f : a.factors[row / a.layer.positions];
}

// The factor multiplies elements of G on their way into shared memory (fp32), or, with 16-bit operands, the product of a
// whole sample: so it is never rounded.
template <DType T>
__global__ void __launch_bounds__(kProductThreads) linear_clipped_kernel(ClippedArgs a) {
  __shared__ float4 memory[kMatrixShared / 16];  // 16-byte aligned for ldmatrix
  const RowLayer& l = a.layer;
  const int64_t p0 = int64_t{blockIdx.x} * kProductTile, d0 = int64_t{blockIdx.y} * kProductTile;
  constexpr bool kBySample = T != DType::kFloat32;
  typename ProductOf<T, false>::type product;
  float total[16] = {};
  const int64_t runs = kBySample ? l.samples : 1, rows = kBySample ? l.positions : l.samples * l.positions;
  for (int64_t run = 0; run < runs; ++run) {
    const float factor = kBySample ? a.factors[run] : 1.0f;
    if (factor == 0.0f) continue;
    const int64_t first = run * rows;
    product.run(
        rows, memory,
        [&](int64_t k, int i) {
          const float f = p0 + i < l.output_count ? factor_of(a, first + k) : 0.0f;
          if (f == 0.0f) return 0.0f;
          const float g = load_source(l.grad_outputs, first + k, p0 + i);
          return kBySample ? g : f * g;
        },
        [&](int64_t k, int j) {
          if (d0 + j > l.input_count || factor_of(a, first + k) == 0.0f) return 0.0f;
          return d0 + j == l.input_count ? 1.0f : load_source(l.inputs, first + k, d0 + j);
        });
#pragma unroll
    for (int e = 0; e < 16; ++e) total[e] = fmaf(factor, product.c[e], total[e]);
  }
#pragma unroll
  for (int e = 0; e < 16; ++e) {
    const int64_t p = p0 + product.row(e), d = d0 + product.column(e);
    if (p >= l.output_count) continue;
    if (d < l.input_count) a.weight[p * l.input_count + d] += total[e];
    else if (d == l.input_count && l.bias) a.bias[p] += total[e];
  }
}

// A block a row: the first row of each id that counts sums the rows of that id, in order.
__global__ void __launch_bounds__(kProductThreads, 4) embedding_clipped_kernel(ClippedArgs a, int64_t rows) {
  const RowLayer& l = a.layer;
  const int64_t at = blockIdx.x;
  const int32_t id = l.indices[at];
  int earlier = id == l.padding_index || factor_of(a, at) == 0.0f;
  for (int64_t r = threadIdx.x; r < at && !earlier; r += kProductThreads) {
    earlier = l.indices[r] == id && factor_of(a, r) != 0.0f;
  }
  if (__syncthreads_or(earlier)) return;
  for (int64_t c = threadIdx.x; c < l.output_count; c += kProductThreads) {
    float sum = 0.0f;
    for (int64_t r = at; r < rows; ++r) {
      if (l.indices[r] != id) continue;
      const float f = factor_of(a, r);
      if (f != 0.0f) sum = fmaf(f, load_source(l.grad_outputs, r, c), sum);
    }
    a.weight[id * l.output_count + c] += sum;
  }
}

// blockIdx.y: a part of kRowsPerPart rows. partial[part][0 or 1][column]
__global__ void __launch_bounds__(kProductThreads, 6) scale_parts_kernel(ClippedArgs a, int64_t rows, float* partial) {
  const RowLayer& l = a.layer;
  const int64_t c = int64_t{blockIdx.x} * kProductThreads + threadIdx.x, part = blockIdx.y;
  if (c >= l.output_count) return;
  const int64_t begin = part * kRowsPerPart, end = begin + kRowsPerPart < rows ? begin + kRowsPerPart : rows;
  float w = 0.0f, b = 0.0f;
  for (int64_t r = begin; r < end; ++r) {
    const float f = factor_of(a, r);
    if (f == 0.0f) continue;
    const float g = f * load_source(l.grad_outputs, r, c);
    w = fmaf(g, load_source(l.inputs, r, c), w);
    b += g;
  }
  partial[2 * part * l.output_count + c] = w;
  partial[(2 * part + 1) * l.output_count + c] = b;
}
__global__ void __launch_bounds__(kProductThreads) scale_sum_kernel(ClippedArgs a, int64_t parts, const float* partial) {
  const int64_t n = a.layer.output_count, c = int64_t{blockIdx.x} * kProductThreads + threadIdx.x;
  if (c >= n) return;
  float w = 0.0f, b = 0.0f;
  for (int64_t part = 0; part < parts; ++part) {
    w += partial[2 * part * n + c];
    b += partial[(2 * part + 1) * n + c];
  }
  a.weight[c] += w;
  if (a.layer.bias) a.bias[c] += b;
}

// A block a channel.
__global__ void __launch_bounds__(kProductThreads) channel_clipped_kernel(ClippedArgs a) {
  __shared__ float sums[kProductThreads / kWarp];
  const RowLayer& l = a.layer;
  const int64_t channel = blockIdx.x;
  float weight = 0.0f, bias = 0.0f;
  for (int64_t sample = 0; sample < l.samples; ++sample) {
    const float f = a.factors[sample];
    if (f == 0.0f) continue;
    const int64_t row = sample * l.positions + channel;
    const uint8_t* mask = l.mask ? l.mask + sample * l.output_count : nullptr;
    float w = 0.0f, b = 0.0f;
    for (int64_t c = threadIdx.x; c < l.output_count; c += kProductThreads) {
      if (mask && !mask[c]) continue;
      const float g = load_source(l.grad_outputs, row, c);
      w = fmaf(load_source(l.inputs, row, c), g, w);
      b += g;
    }
    weight = fmaf(f, w, weight);
    bias = fmaf(f, b, bias);
  }
  weight = block_sum<kProductThreads>(weight, sums);
  bias = block_sum<kProductThreads>(bias, sums);
  if (threadIdx.x == 0) {
    a.weight[channel] += weight;
    if (l.bias) a.bias[channel] += bias;
  }
}

unsigned blocks_of(int64_t n) { return static_cast<unsigned>(ceil_div(n, kProductThreads)); }

}  // namespace

int64_t launch_linear_clipped(const ClippedArgs& a, heddle_cuda_job& job) {
  const RowLayer& l = a.layer;
  if (l.output_count == 0) return kOk;
  const dim3 grid(static_cast<unsigned>(ceil_div(l.output_count, kProductTile)),
                  static_cast<unsigned>(ceil_div(l.input_count + (l.bias ? 1 : 0), kProductTile)));
  // A sample of few rows would fill a step of the matrix cores with zeros.
  const DType type = l.positions < 16 ? DType::kFloat32 : product_type(l.inputs, l.grad_outputs);
  return with_float_type(type, [&](auto type) {
    HEDDLE_LAUNCH((linear_clipped_kernel<decltype(type)::value>), grid, dim3(kProductThreads), 0, job.stream, a);
    return job.launched();
  });
}

int64_t launch_embedding_clipped(const ClippedArgs& a, heddle_cuda_job& job) {
  const int64_t rows = a.layer.samples * a.layer.positions;
  if (rows == 0) return kOk;
  HEDDLE_LAUNCH(embedding_clipped_kernel, dim3(static_cast<unsigned>(rows)), dim3(kProductThreads), 0, job.stream, a,
                rows);
  return job.launched();
}

HEDDLE_CUDA_OP(linear_clipped_gradients, ClippedArgs) { return launch_linear_clipped(a, job); }
HEDDLE_CUDA_OP(embedding_clipped_gradients, ClippedArgs) { return launch_embedding_clipped(a, job); }

HEDDLE_CUDA_OP(scale_clipped_gradients, ClippedArgs) {
  const RowLayer& l = a.layer;
  const int64_t rows = l.samples * l.positions, parts = ceil_div(rows, kRowsPerPart);
  if (rows == 0 || l.output_count == 0) return kOk;
  if (parts > 65535) return kUnsupported;
  float* partial = job.scratch<float>(2 * parts * l.output_count);
  if (!partial) return kNoMemory;
  const dim3 grid(blocks_of(l.output_count), static_cast<unsigned>(parts));
  HEDDLE_LAUNCH(scale_parts_kernel, grid, dim3(kProductThreads), 0, job.stream, a, rows, partial);
  HEDDLE_LAUNCH(scale_sum_kernel, dim3(blocks_of(l.output_count)), dim3(kProductThreads), 0, job.stream, a, parts,
                partial);
  return job.launched();
}

HEDDLE_CUDA_OP(channel_clipped_gradients, ClippedArgs) {
  const RowLayer& l = a.layer;
  if (l.positions == 0 || l.samples == 0) return kOk;
  HEDDLE_LAUNCH(channel_clipped_kernel, dim3(static_cast<unsigned>(l.positions)), dim3(kProductThreads), 0, job.stream,
                a);
  return job.launched();
}

}  // namespace heddle
