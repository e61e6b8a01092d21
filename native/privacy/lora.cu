// Norms and clipped sums of low-rank adapters on the device; definitions in lora.h. One kernel forms u = s A x and
// v = s B^T G in fp32, 64 rows a block; the rest is two linear layers. x and G are read twice, of which the first time
// costs as much as the second: 4 rows (p + d) bytes each.
#include "privacy/lora.h"

#include "privacy/clipped_launch.h"
#include "privacy/norm_partials.cuh"

namespace heddle {
namespace {

// blockIdx.x: 64 rows; blockIdx.y: 64 ranks; blockIdx.z: 0 forms u, 1 forms v.
__global__ void __launch_bounds__(kProductThreads, 2) adapt_rows_kernel(LoraLayer l, int64_t rows, float* u, float* v) {
  __shared__ float4 memory[kProductShared / 16];
  const int64_t r0 = int64_t{blockIdx.x} * kProductTile, i0 = int64_t{blockIdx.y} * kProductTile;
  const bool down = blockIdx.z != 0;
  const RowSource& source = down ? l.rows.grad_outputs : l.rows.inputs;
  ExactProduct<true> product;
  product.run(
      down ? l.rows.output_count : l.rows.input_count, memory,
      [&](int64_t k, int r) {
        const int64_t row = r0 + r;
        return row < rows && (!l.rows.mask || l.rows.mask[row]) ? load_source(source, row, k) : 0.0f;
      },
      [&](int64_t k, int i) {
        if (i0 + i >= l.rank) return 0.0f;
        return down ? load_source(l.b, k, i0 + i) : load_source(l.a, i0 + i, k);
      });
  float* out = down ? v : u;
#pragma unroll
  for (int e = 0; e < 16; ++e) {
    const int64_t row = r0 + product.row(e), i = i0 + product.column(e);
    if (row < rows && i < l.rank) out[row * l.rank + i] = l.scale * product.c[e];
  }
}

// dB and dA as linear layers.
struct Adapted {
  RowLayer up, down;
};
int64_t adapt(const LoraLayer& l, Adapted& out, heddle_cuda_job& job) {
  const int64_t rows = l.rows.samples * l.rows.positions, blocks = ceil_div(l.rank, kProductTile);
  float* u = job.scratch<float>(rows * l.rank);
  float* v = job.scratch<float>(rows * l.rank);
  if (!u || !v) return kNoMemory;
  if (ceil_div(rows, kProductTile) > INT32_MAX || blocks > 65535) return kUnsupported;
  out.up = out.down = l.rows;
  out.up.inputs = {u, DType::kFloat32, l.rank};
  out.up.input_count = l.rank;
  out.down.grad_outputs = {v, DType::kFloat32, l.rank};
  out.down.output_count = l.rank;
  if (rows == 0) return kOk;
  const dim3 grid(static_cast<unsigned>(ceil_div(rows, kProductTile)), static_cast<unsigned>(blocks), 2);
  HEDDLE_LAUNCH(adapt_rows_kernel, grid, dim3(kProductThreads), 0, job.stream, l, rows, u, v);
  return job.launched();
}

}  // namespace

HEDDLE_CUDA_OP(lora_squared_norms, LoraNormsArgs) {
  const int64_t samples = a.layer.rows.samples;
  if (samples == 0) return kOk;
  if (samples > 65535) return kUnsupported;
  Adapted x;
  int64_t status = adapt(a.layer, x, job);
  if (status != kOk) return status;
  const NormBlocks up = linear_norm_blocks(x.up, a.method), down = linear_norm_blocks(x.down, a.method);
  const int64_t count = up.count + down.count;
  double* partial = job.scratch<double>(samples * count);
  if (!partial) return kNoMemory;
  status = launch_linear_norms(x.up, up, partial, count, job);
  if (status == kOk) status = launch_linear_norms(x.down, down, partial + up.count, count, job);
  return status == kOk ? sum_partials(partial, samples, count, a.out, job) : status;
}

HEDDLE_CUDA_OP(lora_clipped_gradients, LoraClippedArgs) {
  if (a.layer.rows.samples == 0) return kOk;
  Adapted x;
  int64_t status = adapt(a.layer, x, job);
  if (status != kOk) return status;
  ClippedArgs part;
  part.factors = a.factors;
  part.layer = x.up;
  part.weight = a.b;
  status = launch_linear_clipped(part, job);
  if (status != kOk) return status;
  part.layer = x.down;
  part.weight = a.a;
  return launch_linear_clipped(part, job);
}

}  // namespace heddle
