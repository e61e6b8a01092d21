// Squared norms and clipped sums of convolutions on the device; definitions in convolution.h.
//
// Nothing is unfolded in memory: a product of tiles (product.cuh) gathers elements of U on their way into shared memory.
// U[row][place] is the input at row.at + place.at, or 0 outside; two small tables hold both, so that no index is divided.
// One block per (sample, group, tile) of the norms, one per (group, tile) of the sums, which takes the samples in order.
//
// Cost: 2 T p d operations of a sample and group (instantiate), T^2 (p + d) (ghost). A step of 64 x 64 x 32 on the matrix
// cores takes about 130 clocks of an H100's multiprocessor; gathering its 4,096 elements, about 15 instructions each, takes
// about 480: the gather is the bound. Channels that fill a tile of 64 only in part (depthwise layers) waste the rest of
// it. Not measured on a GPU yet.
#include "privacy/convolution.h"

#include "privacy/norm_partials.cuh"

namespace heddle {
namespace {

// Where a row of U (a tap of a channel) or an output place looks at, on each axis.
struct alignas(16) ConvStep {
  int32_t at[3], channel;
};

struct ConvWork {
  ConvLayer l;
  const ConvStep *rows, *places;
  int64_t place_count, plane;       // output places, input places of a channel
  int64_t channels;                 // input channels of a group
  int64_t inputs, outputs, across;  // d and p of a group; tiles of columns, the bias's among them
};

__global__ void __launch_bounds__(kProductThreads) conv_steps_kernel(ConvGeometry s, ConvStep* rows, int64_t row_count,
                                                                     ConvStep* places, int64_t place_count) {
  const int64_t i = int64_t{blockIdx.x} * kProductThreads + threadIdx.x;
  if (i < row_count) {
    const int64_t taps = int64_t{s.kernel[0]} * s.kernel[1] * s.kernel[2];
    int64_t tap = i % taps;
    ConvStep row;
    row.channel = static_cast<int32_t>(i / taps);
    for (int axis = 2; axis >= 0; --axis) {
      row.at[axis] = static_cast<int32_t>(tap % s.kernel[axis] * s.dilation[axis] - s.padding[axis]);
      tap /= s.kernel[axis];
    }
    rows[i] = row;
  }
  if (i < place_count) {
    int64_t out = i;
    ConvStep place;
    place.channel = 0;
    for (int axis = 2; axis >= 0; --axis) {
      place.at[axis] = static_cast<int32_t>(out % s.out[axis] * s.stride[axis]);
      out /= s.out[axis];
    }
    places[i] = place;
  }
}

// One sample and group.
struct ConvTask {
  const ConvWork& w;
  int64_t sample, group;

  __device__ bool kept(int64_t place) const {
    return place < w.place_count && (!w.l.mask || w.l.mask[sample * w.place_count + place]);
  }
  __device__ float grad(int64_t output, int64_t place) const {
    const int64_t channel = sample * w.l.out_channels + group * w.outputs + output;
    return load_as_float(w.l.grad_outputs, w.l.grad_type, channel * w.place_count + place);
  }
  __device__ float unfolded(const ConvStep& row, const ConvStep& place) const {
    const ConvGeometry& s = w.l.shape;
    const int32_t x0 = row.at[0] + place.at[0], x1 = row.at[1] + place.at[1], x2 = row.at[2] + place.at[2];
    if (x0 < 0 || x0 >= s.size[0] || x1 < 0 || x1 >= s.size[1] || x2 < 0 || x2 >= s.size[2]) return 0.0f;
    const int64_t channel = sample * w.l.in_channels + group * w.channels + row.channel;
    return load_as_float(w.l.input, w.l.input_type, channel * w.plane + (x0 * s.size[1] + x1) * s.size[2] + x2);
  }
  // G U^T at outputs p0 .. and columns d0 ..; column `inputs` is the bias's.
  template <class Product>
  __device__ __forceinline__ void gradient(Product& product, void* memory, int64_t p0, int64_t d0) const {
    product.run(
        w.place_count, memory,
        [&](int64_t k, int i) { return p0 + i < w.outputs && kept(k) ? grad(p0 + i, k) : 0.0f; },
        [&](int64_t k, int j) {
          if (d0 + j > w.inputs || !kept(k)) return 0.0f;
          return d0 + j == w.inputs ? 1.0f : unfolded(w.rows[d0 + j], w.places[k]);
        });
  }
};

// blockIdx.x: sample, group and a pair of tiles of places.
template <DType T>
__global__ void __launch_bounds__(kProductThreads) conv_ghost_kernel(ConvWork w, int32_t tiles, int64_t count, double* partial) {
  __shared__ float4 memory[kMatrixShared / 16];  // 16-byte aligned for ldmatrix
  __shared__ double sums[kProductThreads / kWarp];
  const TilePair pair = tile_pair(static_cast<int32_t>(blockIdx.x % count), tiles);
  const int64_t at = blockIdx.x / count;
  const ConvTask task{w, at / w.l.groups, at % w.l.groups};
  const int64_t t0 = int64_t{pair.i} * kProductTile, s0 = int64_t{pair.j} * kProductTile;
  typename ProductOf<T, false>::type a, g;
  auto u = [&](int64_t k, int64_t place) { return task.kept(place) ? task.unfolded(w.rows[k], w.places[place]) : 0.0f; };
  a.run(w.inputs, memory, [&](int64_t k, int i) { return u(k, t0 + i); }, [&](int64_t k, int i) { return u(k, s0 + i); });
  auto y = [&](int64_t k, int64_t place) { return task.kept(place) ? task.grad(k, place) : 0.0f; };
  g.run(w.outputs, memory, [&](int64_t k, int i) { return y(k, t0 + i); }, [&](int64_t k, int i) { return y(k, s0 + i); });
  put_partial(ghost_sum(a, g, t0, s0, w.l.bias), sums, partial + blockIdx.x);
}

// blockIdx.x: sample, group and a tile of the gradient [outputs, inputs + bias].
template <DType T>
__global__ void __launch_bounds__(kProductThreads) conv_gradient_kernel(ConvWork w, int64_t count, double* partial) {
  __shared__ float4 memory[kMatrixShared / 16];
  __shared__ double sums[kProductThreads / kWarp];
  const int64_t at = blockIdx.x / count, tile = blockIdx.x % count;
  const ConvTask task{w, at / w.l.groups, at % w.l.groups};
  const int64_t d0 = tile % w.across * kProductTile;
  typename ProductOf<T, true>::type product;
  task.gradient(product, memory, tile / w.across * kProductTile, d0);
  put_partial(square_sum(product, d0, w.inputs + (w.l.bias ? 1 : 0)), sums, partial + blockIdx.x);
}

// blockIdx.x: a group and a tile of its gradient. The factor multiplies the product of a whole sample: it is never rounded.
template <DType T>
__global__ void __launch_bounds__(kProductThreads) conv_clipped_kernel(ConvWork w, int64_t count, const float* factors,
                                                                       float* weight, float* bias) {
  __shared__ float4 memory[kMatrixShared / 16];
  const int64_t group = blockIdx.x / count, tile = blockIdx.x % count;
  const int64_t p0 = tile / w.across * kProductTile, d0 = tile % w.across * kProductTile;
  typename ProductOf<T, true>::type product;
  float total[16] = {};
  for (int64_t sample = 0; sample < w.l.samples; ++sample) {
    const float factor = factors[sample];
    if (factor == 0.0f) continue;
    ConvTask{w, sample, group}.gradient(product, memory, p0, d0);
#pragma unroll
    for (int e = 0; e < 16; ++e) total[e] = fmaf(factor, product.c[e], total[e]);
  }
#pragma unroll
  for (int e = 0; e < 16; ++e) {
    const int64_t p = p0 + product.row(e), d = d0 + product.column(e);
    if (p >= w.outputs) continue;
    const int64_t channel = group * w.outputs + p;
    if (d < w.inputs) weight[channel * w.inputs + d] += total[e];
    else if (d == w.inputs && w.l.bias) bias[channel] += total[e];
  }
}

// Sizes and tables of a layer.
int64_t prepare(const ConvLayer& l, ConvWork& w, heddle_cuda_job& job) {
  const ConvGeometry& s = l.shape;
  w.l = l;
  w.place_count = int64_t{s.out[0]} * s.out[1] * s.out[2];
  w.plane = int64_t{s.size[0]} * s.size[1] * s.size[2];
  w.channels = l.in_channels / l.groups;
  w.inputs = w.channels * s.kernel[0] * s.kernel[1] * s.kernel[2];
  w.outputs = l.out_channels / l.groups;
  w.across = ceil_div(w.inputs + (l.bias ? 1 : 0), kProductTile);
  if (w.place_count > INT32_MAX || w.plane > INT32_MAX || w.inputs > INT32_MAX) return kUnsupported;
  auto* rows = job.scratch<ConvStep>(w.inputs);
  auto* places = job.scratch<ConvStep>(w.place_count);
  if (!rows || !places) return kNoMemory;
  w.rows = rows;
  w.places = places;
  const int64_t most = w.inputs > w.place_count ? w.inputs : w.place_count;
  HEDDLE_LAUNCH(conv_steps_kernel, dim3(static_cast<unsigned>(ceil_div(most, kProductThreads))), dim3(kProductThreads), 0,
                job.stream, s, rows, w.inputs, places, w.place_count);
  return job.launched();
}

DType conv_type(const ConvWork& w) {
  // Few places would fill a step of the matrix cores with zeros.
  return w.place_count < 16 || w.l.input_type != w.l.grad_type ? DType::kFloat32 : w.l.input_type;
}

template <DType T>
int64_t conv_norms(const ConvNormsArgs& a, const ConvWork& w, heddle_cuda_job& job) {
  const bool ghost = a.method == NormMethod::kGhost;
  const int64_t tiles = ceil_div(w.place_count, kProductTile);
  const int64_t count = ghost ? tiles * (tiles + 1) / 2 : ceil_div(w.outputs, kProductTile) * w.across;
  const int64_t blocks = w.l.samples * w.l.groups * count;
  if (blocks > INT32_MAX) return kUnsupported;
  double* partial = job.scratch<double>(blocks);
  if (!partial) return kNoMemory;
  const dim3 grid(static_cast<unsigned>(blocks));
  if (blocks > 0 && ghost) {
    HEDDLE_LAUNCH((conv_ghost_kernel<T>), grid, dim3(kProductThreads), 0, job.stream, w, static_cast<int32_t>(tiles), count,
                  partial);
  } else if (blocks > 0) {
    HEDDLE_LAUNCH((conv_gradient_kernel<T>), grid, dim3(kProductThreads), 0, job.stream, w, count, partial);
  }
  return sum_partials(partial, w.l.samples, w.l.groups * count, a.out, job);
}

}  // namespace

HEDDLE_CUDA_OP(conv_squared_norms, ConvNormsArgs) {
  if (a.layer.samples == 0) return kOk;
  ConvWork w;
  const int64_t status = prepare(a.layer, w, job);
  if (status != kOk) return status;
  return with_float_type(conv_type(w), [&](auto type) { return conv_norms<decltype(type)::value>(a, w, job); });
}

HEDDLE_CUDA_OP(conv_clipped_gradients, ConvClippedArgs) {
  if (a.layer.samples == 0) return kOk;
  ConvWork w;
  const int64_t status = prepare(a.layer, w, job);
  if (status != kOk) return status;
  const int64_t count = ceil_div(w.outputs, kProductTile) * w.across;
  if (w.l.groups * count == 0) return kOk;
  if (w.l.groups * count > INT32_MAX) return kUnsupported;
  return with_float_type(conv_type(w), [&](auto type) {
    HEDDLE_LAUNCH((conv_clipped_kernel<decltype(type)::value>), dim3(static_cast<unsigned>(w.l.groups * count)),
                  dim3(kProductThreads), 0, job.stream, w, count, a.factors, a.weight, a.bias);
    return job.launched();
  });
}

}  // namespace heddle
