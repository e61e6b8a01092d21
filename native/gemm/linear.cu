// linear on the device: definition in linear.h, layout in device_matrix.h, product and precision in device_product.h.
//
// A narrow matrix (a router, a shared expert's gate) would leave most multiprocessors idle, and in float32 one warp's chain
// of dependent steps would be the time: 128 outputs of 2048 inputs are 8 tiles. Its k is cut into parts, which write their
// sums; a second kernel adds them in order. The cut depends on the matrix alone, so that a row has the same bits in every
// batch.
//
// Floors on an H100 (3.35 TB/s; 60 TFLOP/s in fp32; mma.sync about 600 in bf16), from arithmetic, not measured. Qwen3-MoE's
// router, 128 x 2048 in float32: 1 MB, 0.3 us for one token (16 blocks of 16 steps each, so latency: about 3 us); 8192
// tokens do 4.3 Gop, 72 us, and write and read 33 MB of sums in each direction, 20 us from memory, less from L2. 4096 x 4096
// in bf16: 34 MB, 10 us for one token; 8192 tokens 0.46 ms.
#include "gemm/device_activation.cuh"
#include "gemm/device_product.h"

namespace heddle {
namespace {

constexpr int kThreads = 256;
constexpr int64_t kNarrowTiles = 32, kWantedTiles = 128, kLeastSteps = 16;

int32_t parts_of(const MatrixImage& m) {
  if (m.tiles > kNarrowTiles) return 1;
  const int64_t wanted = kWantedTiles / m.tiles, most = m.steps / kLeastSteps;
  const int64_t parts = wanted < most ? wanted : most;
  return static_cast<int32_t>(parts < 1 ? 1 : parts > 32 ? 32 : parts);
}

struct AddParts {
  const float* sums;  // [parts][count]
  const float* bias;  // may be null
  int64_t count, columns;
  int32_t parts;
  LinearActivation activation;
  void* out;
};

template <DType O>
__global__ void __launch_bounds__(kThreads) add_parts_kernel(AddParts a) {
  const int64_t i = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  if (i >= a.count) return;
  float sum = a.sums[i];
  for (int32_t part = 1; part < a.parts; ++part) sum += a.sums[part * a.count + i];
  if (a.bias) sum += a.bias[i % a.columns];
  store_float<O>(a.out, i, linear_activation(a.activation, sum));
}

}  // namespace

HEDDLE_CUDA_OP(linear, LinearDeviceArgs) {
  const DeviceMatrix& w = a.weight;
  if (a.rows == 0 || w.outputs == 0) return kOk;
  if (a.rows >= int64_t{1} << 31) return kUnsupported;
  const ProductOps ops = product_ops(w.type, w.group, w.points != 0);
  const BlockShape shape = block_shape(a.rows);
  GroupedProduct p{};
  int64_t bytes;
  p.matrix = linear_image(w.type, w.outputs, w.k, w.group, w.points != 0, &bytes);
  p.group = w.type == PackType::kFloat8 ? kBlock : w.group;
  OperandRows x;
  const int64_t status = make_operand(ops, w.type, {a.x, a.type, a.rows, w.k, w.k, nullptr, p.matrix.steps, p.group, nullptr, nullptr},
                                      job, &x);
  if (status != kOk) return status;
  p.bank = w.data, p.expert_bytes = bytes, p.experts = 1;
  p.rows = x.data, p.row_bytes = x.row_bytes, p.row_scale = x.scale;
  p.all = static_cast<int32_t>(a.rows), p.most_tiles = ceil_div(a.rows, kBlockRows[static_cast<int>(shape)]);
  p.activation = a.activation, p.bias = a.bias;
  p.out = a.out, p.out_type = a.out_type;
  p.out_pitch = p.columns = w.outputs;
  p.parts = parts_of(p.matrix);
  if (p.parts == 1) return ops.product(shape, p, job);

  const int64_t count = a.rows * w.outputs;
  float* sums = job.scratch<float>(p.parts * count);
  if (!sums) return kNoMemory;
  p.activation = LinearActivation::kNone, p.bias = nullptr;
  p.out = sums, p.out_type = DType::kFloat32;
  const int64_t done = ops.product(shape, p, job);
  if (done != kOk) return done;
  const AddParts add{sums, a.bias, count, w.outputs, p.parts, a.activation, a.out};
  return with_float_type(a.out_type, [&](auto type) -> int64_t {
    constexpr DType O = decltype(type)::value;
    HEDDLE_LAUNCH((add_parts_kernel<O>), dim3(static_cast<unsigned>(ceil_div(count, kThreads))), dim3(kThreads), 0, job.stream, add);
    return job.launched();
  });
}

}  // namespace heddle
