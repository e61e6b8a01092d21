// expertsForward on the device; definition and precision in experts.h, the weights' layout in experts_device.h and
// gemm/device_matrix.h.
//
// Steps: plan_dispatch sorts the routes by expert and a kernel lists the row tiles (few routes: one kernel for both); x to
// operands (skipped where x is of the weights' type already); gate and up with the activation; h to operands where it is quantised; down;
// the weighted sum per token in slot order. The products, and their precision: gemm/device_product.h. A block takes four
// tiles of 16 outputs of few rows, or 128 x 128.
//
// Floors on an H100 (3.35 TB/s; mma.sync about 600 TFLOP/s in bf16), from arithmetic, not measured. Qwen3-30B-A3B
// (128 experts, top 8, 2048/768) in bf16: one token reads 75 MB, 23 us. 8192 tokens do 0.62 Pop, 1.0 ms, and write and
// read 0.5 GB of y in fp32, 0.3 ms. Mixtral: one token 0.70 GB, 0.21 ms; 8192 tokens 5.8 Pop, 9.6 ms. Rows of x are read
// once for each 128 outputs, weights once for each 128 rows, mostly from L2: runs of 16 row tiles share their outputs.
#include "cuda/vector.cuh"
#include "cuda/warp.cuh"
#include "gemm/device_product.h"
#include "moe/experts_device.h"
#include "moe/plan_dispatch.h"

extern "C" HEDDLE_CUDA_API int64_t heddle_cuda_plan_dispatch(const void* args, heddle_cuda_job* job);

namespace heddle {
namespace {

constexpr int kThreads = 256;

struct TileList {
  const int32_t* offsets;  // [experts + 1]
  int32_t experts, block_rows;
  int32_t* first_tile;  // [experts + 1]
  int32_t* tile_expert;
};

// first_tile and tile_expert, by one block.
__device__ __forceinline__ void list_tiles(const TileList& l, int32_t* words) {
  int32_t before = 0;
  for (int32_t begin = 0; begin < l.experts; begin += kThreads) {
    const int32_t e = begin + static_cast<int32_t>(threadIdx.x);
    const int32_t n = e < l.experts ? (l.offsets[e + 1] - l.offsets[e] + l.block_rows - 1) / l.block_rows : 0;
    int32_t total;
    const int32_t through = block_scan<kThreads>(n, words, &total);
    if (e < l.experts) l.first_tile[e] = before + through - n;
    before += total;
  }
  if (threadIdx.x == 0) l.first_tile[l.experts] = before;
  __syncthreads();
  for (int32_t i = static_cast<int32_t>(threadIdx.x); i < before; i += kThreads) {
    int32_t low = 0, high = l.experts;  // the last expert whose tiles begin at i or before
    while (high - low > 1) {
      const int32_t middle = low + (high - low) / 2;
      if (l.first_tile[middle] <= i) low = middle;
      else high = middle;
    }
    l.tile_expert[i] = low;
  }
}

__global__ void __launch_bounds__(kThreads) tiles_kernel(TileList l) {
  __shared__ int32_t words[kThreads / kWarp];
  list_tiles(l, words);
}

// Decode: what plan_dispatch and tiles_kernel do, for few routes in one block. Launches are what would take the time.
constexpr int64_t kSmallRoutes = 1024, kSmallExperts = 8192;

__global__ void __launch_bounds__(kThreads) small_plan_kernel(PlanDispatchArgs a, TileList l, unsigned long long* bad) {
  HEDDLE_DYNAMIC_SHARED(int32_t, next);  // routes of each expert, then the place of its next one
  __shared__ int32_t words[kThreads / kWarp];
  const int32_t routes = static_cast<int32_t>(a.tokens) * a.k;
  for (int32_t e = static_cast<int32_t>(threadIdx.x); e < a.experts; e += kThreads) next[e] = 0;
  __syncthreads();
  for (int32_t i = static_cast<int32_t>(threadIdx.x); i < routes; i += kThreads) {
    const int32_t e = a.indices[i];
    if (e < -1 || e >= a.experts) report_bad_value(bad, i);
    else if (e >= 0) atomicAdd(&next[e], 1);
  }
  __syncthreads();
  int32_t before = 0;
  for (int32_t begin = 0; begin < a.experts; begin += kThreads) {
    const int32_t e = begin + static_cast<int32_t>(threadIdx.x);
    const int32_t n = e < a.experts ? next[e] : 0;
    int32_t total;
    const int32_t through = block_scan<kThreads>(n, words, &total);
    if (e < a.experts) next[e] = a.offsets[e] = before + through - n;
    before += total;
  }
  if (threadIdx.x == 0) a.offsets[a.experts] = before;
  __syncthreads();
  list_tiles(l, words);
  if (threadIdx.x >= kWarp) return;
  const int lane = static_cast<int>(threadIdx.x);
  for (int32_t base = 0; base < routes; base += kWarp) {
    const int32_t i = base + lane;
    int32_t e = i < routes ? a.indices[i] : -1;
    if (e >= a.experts) e = -1;
    const unsigned peers = __match_any_sync(kFullMask, e);
    const int32_t earlier = __popc(peers & ((1u << lane) - 1u));
    const int32_t at = e >= 0 ? next[e] + earlier : -1;
    __syncwarp();
    if (e >= 0 && earlier == 0) next[e] = at + __popc(peers);
    __syncwarp();
    if (i >= routes) continue;
    a.inverse[i] = at;
    if (at >= 0) a.order[at] = i;
  }
}

struct Combine {
  const float* y;       // [rows, pitch] by place
  const float* shared;  // [tokens, pitch]; may be null
  const int32_t* inverse;
  const float *weights, *shared_gate;
  int64_t k, d, pitch, shared_pitch;
  void* out;
};

constexpr int kCombineThreads = 128;

template <DType O, int V>
__global__ void __launch_bounds__(kCombineThreads) combine_experts_kernel(Combine c) {
  const int64_t token = blockIdx.x;
  const int64_t column = (int64_t{blockIdx.y} * kCombineThreads + threadIdx.x) * V;
  if (column >= c.d) return;
  float sum[V] = {};
  auto add = [&](const float* rows, int64_t at, float weight) {
    float y[V];
    load_values<DType::kFloat32, V>(rows, at + column, y);
#pragma unroll
    for (int v = 0; v < V; ++v) sum[v] = fmaf(y[v], weight, sum[v]);
  };
  for (int64_t j = 0; j < c.k; ++j) {
    const int32_t row = c.inverse[token * c.k + j];
    if (row >= 0) add(c.y, row * c.pitch, c.weights ? c.weights[token * c.k + j] : 1.0f);
  }
  if (c.shared) add(c.shared, token * c.shared_pitch, c.shared_gate ? c.shared_gate[token] : 1.0f);
  store_values<O, V>(c.out, token * c.d + column, sum);
}

template <DType O, int V>
int64_t launch_combine(const Combine& c, int64_t tokens, heddle_cuda_job& job) {
  const dim3 grid(static_cast<unsigned>(tokens), static_cast<unsigned>(ceil_div(c.d, int64_t{kCombineThreads} * V)));
  HEDDLE_LAUNCH((combine_experts_kernel<O, V>), grid, dim3(kCombineThreads), 0, job.stream, c);
  return job.launched();
}

LinearActivation gate_activation(Activation a) {
  switch (a) {
    case Activation::kGeluTanh: return LinearActivation::kGeluTanh;
    case Activation::kGeluErf: return LinearActivation::kGeluErf;
    case Activation::kReluSquared: return LinearActivation::kReluSquared;
    case Activation::kRelu: return LinearActivation::kRelu;
    case Activation::kIdentity: return LinearActivation::kNone;
    default: return LinearActivation::kSiLU;
  }
}

struct Routes {
  int64_t rows = 0;  // at most
  int32_t* offsets = nullptr;
  PlanDispatchArgs plan;  // without `order`: every token once, to the one expert
};

bool is_floating(PackType t) { return t == PackType::kFloat32 || t == PackType::kBFloat16 || t == PackType::kFloat8; }

class BankRun {
 public:
  BankRun(const ExpertsDeviceArgs& args, const DeviceBank& b, heddle_cuda_job& j)
      : a(args), bank(b), job(j), image(image_of(b.type, b.gated != 0, b.points != 0, b.group, b.hidden, b.intermediate)),
        ops(product_ops(b.type, b.group, b.points != 0)), group(b.type == PackType::kFloat8 ? kBlock : b.group) {}

  int64_t pitch() const { return image.down.tiles * 16; }

  // x as this bank's products read it.
  int64_t prepare_x(OperandRows* x) const {
    return to_operand({a.x, a.type, a.tokens, bank.hidden, bank.hidden, nullptr, image.up.steps, group, nullptr, nullptr}, x);
  }

  // The outputs of all rows, unweighted: y [rows, pitch()].
  int64_t run(const Routes& routes, const OperandRows& x, float** y) const {
    const int64_t experts = bank.experts, busy = routes.rows < experts ? routes.rows : experts;
    const int64_t average = ceil_div(routes.rows, busy);
    const BlockShape shape = block_shape(average);
    const int32_t block_rows = kBlockRows[static_cast<int>(shape)];
    GroupedProduct p{};
    p.most_tiles = routes.rows / block_rows + busy;
    const PlanDispatchArgs& plan = routes.plan;
    TileList tiles{routes.offsets, static_cast<int32_t>(experts), block_rows, nullptr, nullptr};
    if (plan.order) {
      tiles.first_tile = job.scratch<int32_t>(experts + 1);
      tiles.tile_expert = job.scratch<int32_t>(p.most_tiles);
    }
    const bool direct = is_floating(bank.type);  // h is written as the operand
    const int64_t row_bytes = direct ? image.down.steps * kImageRowBytes[static_cast<int>(bank.type)] : image.padded * 4;
    char* h = job.scratch<char>(routes.rows * row_bytes);
    *y = job.scratch<float>(routes.rows * pitch());
    if (job.no_memory) return kNoMemory;
    int64_t status = kOk;
    if (!plan.order) {
      p.all = static_cast<int32_t>(routes.rows);
    } else if (routes.rows <= kSmallRoutes && experts <= kSmallExperts) {
      unsigned long long* bad = job.status();
      if (!bad) return kNoMemory;
      HEDDLE_LAUNCH(small_plan_kernel, dim3(1), dim3(kThreads), experts * 4, job.stream, plan, tiles, bad);
      status = job.launched();
    } else {
      status = heddle_cuda_plan_dispatch(&plan, &job);
      HEDDLE_LAUNCH(tiles_kernel, dim3(1), dim3(kThreads), 0, job.stream, tiles);
    }
    if (status != kOk) return status;

    p.bank = bank.data, p.expert_bytes = image.bytes, p.matrix = image.up, p.group = group;
    p.experts = static_cast<int32_t>(experts);
    p.rows = x.data, p.row_bytes = x.row_bytes, p.row_scale = x.scale;
    p.order = plan.order, p.routes_per_row = static_cast<int32_t>(a.k);
    p.offsets = routes.offsets, p.first_tile = tiles.first_tile, p.tile_expert = tiles.tile_expert;
    p.is_up = 1, p.gated = bank.gated;
    p.activation = gate_activation(bank.activation), p.clamped = bank.activation == Activation::kClampedSwiGLU;
    p.alpha = bank.alpha, p.limit = bank.limit;
    p.out = h, p.out_pitch = bank.type == PackType::kFloat8 ? row_bytes : image.padded, p.columns = bank.intermediate;
    status = ops.product(shape, p, job);
    if (status != kOk) return status;

    OperandRows down{h, nullptr, row_bytes};
    if (!direct) {
      status = to_operand({h, DType::kFloat32, routes.rows, bank.intermediate, image.padded,
                           routes.offsets ? routes.offsets + experts : nullptr, image.down.steps, group, nullptr, nullptr}, &down);
      if (status != kOk) return status;
    }
    p.matrix = image.down;
    p.rows = down.data, p.row_bytes = down.row_bytes, p.row_scale = down.scale;
    p.order = nullptr, p.is_up = 0, p.activation = LinearActivation::kNone;
    p.out = *y, p.out_pitch = pitch(), p.columns = bank.hidden;
    return ops.product(shape, p, job);
  }

 private:
  int64_t to_operand(const RowsToOperand& r, OperandRows* out) const { return make_operand(ops, bank.type, r, job, out); }

  const ExpertsDeviceArgs& a;
  const DeviceBank& bank;
  heddle_cuda_job& job;
  const ExpertImage image;
  const ProductOps ops;
  const int64_t group;
};

}  // namespace

HEDDLE_CUDA_OP(experts_forward, ExpertsDeviceArgs) {
  if (a.tokens == 0) return kOk;
  const int64_t count = a.tokens * a.k;
  if (count >= int64_t{1} << 31 || a.tokens >= int64_t{1} << 31) return kUnsupported;
  const DeviceBank& d = a.bank;
  Combine c{};
  c.weights = a.weights, c.shared_gate = a.shared_gate;
  c.k = a.k, c.d = d.hidden, c.out = a.out;
  const BankRun routed(a, d, job);
  OperandRows x;
  int64_t status = kOk;
  if (count > 0) {
    Routes routes;
    routes.rows = count;
    routes.offsets = job.scratch<int32_t>(d.experts + 1);
    PlanDispatchArgs& plan = routes.plan;
    plan.indices = a.indices, plan.tokens = a.tokens, plan.k = static_cast<int32_t>(a.k);
    plan.experts = plan.global_experts = static_cast<int32_t>(d.experts);
    plan.order = job.scratch<int32_t>(count), plan.inverse = job.scratch<int32_t>(count);
    plan.offsets = routes.offsets, plan.counts = job.scratch<int32_t>(2);
    if (job.no_memory) return kNoMemory;
    status = routed.prepare_x(&x);
    float* y = nullptr;
    if (status == kOk) status = routed.run(routes, x, &y);
    if (status != kOk) return status;
    c.y = y, c.inverse = plan.inverse, c.pitch = routed.pitch();
  }
  if (a.shared.data) {
    const BankRun shared(a, a.shared, job);
    if (count == 0 || a.shared.type != d.type || a.shared.group != d.group) status = shared.prepare_x(&x);
    Routes routes;
    routes.rows = a.tokens;
    float* y = nullptr;
    if (status == kOk) status = shared.run(routes, x, &y);
    if (status != kOk) return status;
    c.shared = y, c.shared_pitch = shared.pitch();
  }
  return with_float_type(a.out_type, [&](auto type) -> int64_t {
    constexpr DType O = decltype(type)::value;
    const bool vectors = is_aligned(16, {a.out}, d.hidden * 4);
    return vectors ? launch_combine<O, 4>(c, a.tokens, job) : launch_combine<O, 1>(c, a.tokens, job);
  });
}

}  // namespace heddle
