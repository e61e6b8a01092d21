// Norms and clipped sums of experts on the device; definitions in experts.h.
//
// Rows are listed by expert, then within each by sample, in ascending order: counts by integer atomics, their prefix, and
// a block for each list that walks what it is taken from, (experts + samples) rows words read in all. A list of one
// sample and expert takes the ghost norm where it has up to 64 rows and that is the cheaper one (each tile of the
// gradient is one block's, so only the first has work then), else the gradient's. fp32 throughout: factors differ from
// row to row and are not rounded. Not measured on a GPU yet.
#include "privacy/experts.h"

#include "privacy/norm_partials.cuh"

namespace heddle {
namespace {

struct ExpertsWork {
  ExpertsLayer l;
  const float* factors;  // null: rows of every sample count
  int64_t across;        // tiles of columns, the bias's among them
  int64_t tiles;         // of one expert's gradient
};

__device__ inline bool used(const ExpertsWork& w, int64_t row) {
  const RowLayer& l = w.l.rows;
  if (l.mask && !l.mask[row]) return false;
  const int32_t sample = w.l.sample_of[row];
  return sample >= 0 && w.l.expert_of[row] >= 0 && (!w.factors || w.factors[sample] != 0.0f);
}

// Rows [begin[i], begin[i + 1]) of list i.
struct Lists {
  int32_t *rows, *begin;
};

// counts[expert] and, where there is room, counts[expert][sample].
__global__ void __launch_bounds__(kProductThreads) count_rows_kernel(ExpertsWork w, int32_t* experts, int32_t* runs) {
  const int64_t row = int64_t{blockIdx.x} * kProductThreads + threadIdx.x;
  if (row >= w.l.rows.positions || !used(w, row)) return;
  const int64_t expert = w.l.expert_of[row];
  atomicAdd(experts + expert, 1);
  if (runs) atomicAdd(runs + expert * w.l.rows.samples + w.l.sample_of[row], 1);
}

// counts[0 .. count) to their exclusive prefix, and the total behind; one block.
__global__ void __launch_bounds__(kProductThreads) prefix_rows_kernel(int32_t* counts, int64_t count) {
  __shared__ int32_t words[kProductThreads / kWarp];
  int32_t base = 0;
  for (int64_t first = 0; first <= count; first += kProductThreads) {
    const int64_t i = first + threadIdx.x;
    const int32_t own = i < count ? counts[i] : 0;
    int32_t total;
    const int32_t through = block_scan<kProductThreads>(own, words, &total);
    if (i <= count) counts[i] = base + through - own;
    base += total;
  }
}

// A block a list: rows of its expert, from all; with `samples`, rows of its expert and sample, from the expert's.
__global__ void __launch_bounds__(kProductThreads) list_rows_kernel(ExpertsWork w, Lists experts, Lists runs) {
  __shared__ int32_t words[kProductThreads / kWarp];
  const bool by_sample = runs.rows != nullptr;
  const auto list = static_cast<int32_t>(blockIdx.x), samples = static_cast<int32_t>(w.l.rows.samples);
  const int32_t expert = by_sample ? list / samples : list;
  const int64_t begin = by_sample ? experts.begin[expert] : 0;
  const int64_t end = by_sample ? experts.begin[expert + 1] : w.l.rows.positions;
  int32_t* to = by_sample ? runs.rows + runs.begin[list] : experts.rows + experts.begin[list];
  for (int64_t first = begin; first < end; first += kProductThreads) {
    const int64_t i = first + threadIdx.x;
    int32_t row = 0, hit = 0, total;
    if (i < end) {
      row = by_sample ? experts.rows[i] : static_cast<int32_t>(i);
      hit = by_sample ? w.l.sample_of[row] == list % samples : used(w, row) && w.l.expert_of[row] == expert;
    }
    const int32_t through = block_scan<kProductThreads>(hit, words, &total);
    if (hit) to[through - 1] = row;
    to += total;
  }
}

// blockIdx.x: expert, sample and a tile of the expert's gradient [outputs, inputs + bias]. partial[sample][expert][tile]
__global__ void __launch_bounds__(kProductThreads) experts_norm_kernel(ExpertsWork w, Lists runs, NormMethod method,
                                                                       double* partial) {
  __shared__ float4 memory[kProductShared / 16];
  __shared__ double sums[kProductThreads / kWarp];
  const RowLayer& l = w.l.rows;
  const int64_t run = blockIdx.x / w.tiles, tile = blockIdx.x % w.tiles;
  const int64_t expert = run / l.samples, sample = run % l.samples;
  const int32_t* rows = runs.rows + runs.begin[run];
  const int64_t count = runs.begin[run + 1] - runs.begin[run], columns = l.input_count + (l.bias ? 1 : 0);
  double* to = partial + (sample * w.l.experts + expert) * w.tiles + tile;
  if (count == 0) {
    if (threadIdx.x == 0) *to = 0.0;
    return;
  }
  const bool cheaper = method == NormMethod::kGhost || 2 * count * count <= l.input_count * l.output_count;
  if (method != NormMethod::kInstantiate && cheaper && count <= kProductTile) {
    double sum = 0.0;
    if (tile == 0) {
      ExactProduct<true> a, g;
      auto gram = [&](const RowSource& source, int64_t width, auto& product) {
        auto element = [&](int64_t k, int i) { return i < count ? load_source(source, rows[i], k) : 0.0f; };
        product.run(width, memory, element, element);
      };
      gram(l.inputs, l.input_count, a);
      gram(l.grad_outputs, l.output_count, g);
      sum = ghost_sum(a, g, 0, 0, l.bias);
    }
    put_partial(sum, sums, to);
    return;
  }
  const int64_t p0 = tile / w.across * kProductTile, d0 = tile % w.across * kProductTile;
  ExactProduct<false> product;
  product.run(
      count, memory,
      [&](int64_t k, int i) { return p0 + i < l.output_count ? load_source(l.grad_outputs, rows[k], p0 + i) : 0.0f; },
      [&](int64_t k, int j) {
        if (d0 + j > l.input_count) return 0.0f;
        return d0 + j == l.input_count ? 1.0f : load_source(l.inputs, rows[k], d0 + j);
      });
  put_partial(square_sum(product, d0, columns), sums, to);
}

// blockIdx.x: an expert and a tile of its gradient.
__global__ void __launch_bounds__(kProductThreads) experts_clipped_kernel(ExpertsWork w, Lists experts, float* weight, float* bias) {
  __shared__ float4 memory[kProductShared / 16];
  const RowLayer& l = w.l.rows;
  const int64_t expert = blockIdx.x / w.tiles, tile = blockIdx.x % w.tiles;
  const int32_t* rows = experts.rows + experts.begin[expert];
  const int64_t count = experts.begin[expert + 1] - experts.begin[expert];
  if (count == 0) return;
  const int64_t p0 = tile / w.across * kProductTile, d0 = tile % w.across * kProductTile;
  ExactProduct<false> product;
  product.run(
      count, memory,
      [&](int64_t k, int i) {
        if (p0 + i >= l.output_count) return 0.0f;
        return w.factors[w.l.sample_of[rows[k]]] * load_source(l.grad_outputs, rows[k], p0 + i);
      },
      [&](int64_t k, int j) {
        if (d0 + j > l.input_count) return 0.0f;
        return d0 + j == l.input_count ? 1.0f : load_source(l.inputs, rows[k], d0 + j);
      });
#pragma unroll
  for (int e = 0; e < 16; ++e) {
    const int64_t p = p0 + product.row(e), d = d0 + product.column(e);
    if (p >= l.output_count) continue;
    const int64_t output = expert * l.output_count + p;
    if (d < l.input_count) weight[output * l.input_count + d] += product.c[e];
    else if (d == l.input_count && l.bias) bias[output] += product.c[e];
  }
}

ExpertsWork work_of(const ExpertsLayer& l, const float* factors) {
  ExpertsWork w{l, factors, ceil_div(l.rows.input_count + (l.rows.bias ? 1 : 0), kProductTile), 0};
  w.tiles = ceil_div(l.rows.output_count, kProductTile) * w.across;
  return w;
}

bool get_lists(Lists& lists, int64_t rows, int64_t count, heddle_cuda_job& job) {
  lists.rows = job.scratch<int32_t>(rows + 1);
  lists.begin = job.scratch<int32_t>(count + 1);
  if (!lists.rows || !lists.begin) return false;
  cudaMemsetAsync(lists.begin, 0, static_cast<size_t>(count + 1) * sizeof(int32_t), job.stream);
  return true;
}

// Lists by expert and, where asked for, by expert and sample.
int64_t list_rows(const ExpertsWork& w, Lists& experts, Lists* runs, heddle_cuda_job& job) {
  const int64_t rows = w.l.rows.positions, count = w.l.experts * w.l.rows.samples;
  if (rows >= INT32_MAX || w.l.experts >= INT32_MAX || count * w.tiles >= INT32_MAX) return kUnsupported;
  if (!get_lists(experts, rows, w.l.experts, job) || (runs && !get_lists(*runs, rows, count, job))) return kNoMemory;
  const dim3 block(kProductThreads);
  if (rows > 0) {
    HEDDLE_LAUNCH(count_rows_kernel, dim3(static_cast<unsigned>(ceil_div(rows, kProductThreads))), block, 0, job.stream, w,
                  experts.begin, runs ? runs->begin : nullptr);
  }
  HEDDLE_LAUNCH(prefix_rows_kernel, dim3(1), block, 0, job.stream, experts.begin, w.l.experts);
  HEDDLE_LAUNCH(list_rows_kernel, dim3(static_cast<unsigned>(w.l.experts)), block, 0, job.stream, w, experts, (Lists{nullptr, nullptr}));
  if (runs) {
    HEDDLE_LAUNCH(prefix_rows_kernel, dim3(1), block, 0, job.stream, runs->begin, count);
    HEDDLE_LAUNCH(list_rows_kernel, dim3(static_cast<unsigned>(count)), block, 0, job.stream, w, experts, *runs);
  }
  return job.launched();
}

}  // namespace

HEDDLE_CUDA_OP(experts_squared_norms, ExpertsNormsArgs) {
  const int64_t samples = a.layer.rows.samples;
  if (samples == 0) return kOk;
  const ExpertsWork w = work_of(a.layer, nullptr);
  const int64_t count = a.layer.experts * w.tiles;
  double* partial = job.scratch<double>(samples * count);
  if (!partial) return kNoMemory;
  if (count > 0) {
    Lists experts, runs;
    const int64_t status = list_rows(w, experts, &runs, job);
    if (status != kOk) return status;
    HEDDLE_LAUNCH(experts_norm_kernel, dim3(static_cast<unsigned>(samples * count)), dim3(kProductThreads), 0, job.stream, w,
                  runs, a.method, partial);
  }
  return sum_partials(partial, samples, count, a.out, job);
}

HEDDLE_CUDA_OP(experts_clipped_gradients, ExpertsClippedArgs) {
  const ExpertsWork w = work_of(a.layer, a.factors);
  const int64_t blocks = a.layer.experts * w.tiles;
  if (blocks == 0 || a.layer.rows.positions == 0 || a.layer.rows.samples == 0) return kOk;
  Lists experts;
  const int64_t status = list_rows(w, experts, nullptr, job);
  if (status != kOk) return status;
  HEDDLE_LAUNCH(experts_clipped_kernel, dim3(static_cast<unsigned>(blocks)), dim3(kProductThreads), 0, job.stream, w, experts,
                a.weight, a.bias);
  return job.launched();
}

}  // namespace heddle
