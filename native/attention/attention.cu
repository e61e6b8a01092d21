// attention() on the device; definition and promises in attention.h.
//
// Two kernels here, and one for sequences of up to 64 keys in attention_short.cuh. `exact` is the reference-grade one, for
// every type, head size and stride: fp32 throughout, a warp a row, 32 keys at a time with one key per lane for q.k and
// one value column per lane for p v. `matrix` serves bf16 and fp16 with head sizes up to 256 on the matrix cores: a warp has 16 rows, the block's four warps share tiles of keys and
// values in shared memory; values arrive while q.k runs and the next keys while p v runs. Logits, maxima and sums are
// fp32; p is rounded to the input type for its product (one rounding of 2^-9 in bf16, averaged over the keys).
//
// A row's bits depend on its own sequence alone: tiles start at fixed multiples inside it, and a tile that a row does
// not see multiplies its sums by 1 and adds 0. A tile with masked keys whose values are not finite takes a loop that
// skips weights of 0. Not measured on a GPU yet.
#include "attention/attention_launch.h"
#include "attention/attention_matrix.cuh"

namespace heddle {
namespace {

constexpr int kExactRows = 8, kExactKeys = 32;

// N * 32 value columns at most.
template <DType T, int N>
__global__ void __launch_bounds__(kExactRows* kWarp) attention_exact_kernel(AttentionArgs a) {
  HEDDLE_DYNAMIC_SHARED(float, shared);
  const AttentionProblem& p = a.problem;
  BlockRows rows;
  if (!find_rows(p, kExactRows, blockIdx.x, blockIdx.y, &rows)) return;
  const Sequence& s = rows.sequence;
  const int warp = static_cast<int>(threadIdx.x) / kWarp, lane = static_cast<int>(threadIdx.x) % kWarp;
  const int64_t group = p.group();
  const int32_t dim = p.head_dim, width = p.value_dim;
  float* q = shared + warp * dim;
  float* keys = shared + kExactRows * dim;               // [32][dim + 1]
  float* values = keys + kExactKeys * (dim + 1);         // [32][width]

  const int64_t last = (rows.first + kExactRows < rows.count ? rows.first + kExactRows : rows.count) - 1;
  const int64_t row = rows.first + warp;
  const bool active = row <= last;
  const int64_t position = active ? row / group : 0, head = rows.key_head * group + (active ? row % group : 0);
  const KeyRange own = key_range(p, s, position);
  const KeyRange all = union_range(p, s, rows.first / group, last / group);
  const bool formed = has_transform(p);
  const float unit = formed ? kLog2OfE : p.scale * kLog2OfE;
  if (active) {
    const int64_t at = p.query_at(s, position, head);
    for (int i = lane; i < dim; i += kWarp) q[i] = load_as_float<T>(p.query, at + i * p.query_stride[3]);
  }

  float sums[N] = {};
  float m = kNegInf, total = 0.0f;
  for (int64_t tile = all.lo / kExactKeys * kExactKeys; tile < all.hi; tile += kExactKeys) {
    __syncthreads();
    for (int j = warp; j < kExactKeys; j += kExactRows) {
      const bool exists = tile + j < s.keys;
      const int64_t k = exists ? p.key_at(s, tile + j, rows.key_head) : 0;
      const int64_t v = exists ? p.value_at(s, tile + j, rows.key_head) : 0;
      for (int i = lane; i < dim; i += kWarp) {
        keys[j * (dim + 1) + i] = exists ? load_as_float<T>(p.key, k + i * p.key_stride[3]) : 0.0f;
      }
      for (int i = lane; i < width; i += kWarp) {
        values[j * width + i] = exists ? load_as_float<T>(p.value, v + i * p.value_stride[3]) : 0.0f;
      }
    }
    __syncthreads();
    if (!active) continue;
    float z = kNegInf;
    if (sees(p, s, position, head, own, tile + lane)) {
      float product = 0.0f;
      for (int i = 0; i < dim; ++i) product = fmaf(q[i], keys[lane * (dim + 1) + i], product);
      z = formed ? logit_of(p, s, position, head, tile + lane, product, nullptr) : product;
    }
    const float top = fmaxf(m, warp_max(z != z ? kNegInf : z) * unit);
    const float base = top == kNegInf ? 0.0f : top;
    const float keep = m == kNegInf ? 0.0f : exp2f(m - base);
    const float weight = z == kNegInf ? 0.0f : exp2f(fmaf(z, unit, -base));
    m = top;
    total = total * keep + warp_sum(weight);
#pragma unroll
    for (int c = 0; c < N; ++c) sums[c] *= keep;
    for (int j = 0; j < kExactKeys; ++j) {
      const float w = __shfl_sync(kFullMask, weight, j);
      if (w == 0.0f) continue;
#pragma unroll
      for (int c = 0; c < N; ++c) {
        const int i = c * kWarp + lane;
        if (i < width) sums[c] = fmaf(w, values[j * width + i], sums[c]);
      }
    }
  }
  if (!active) return;
  const RowEnd end = end_row(p, head, m, total);
  const RowOut<T> out(a, s, position, head);
#pragma unroll
  for (int c = 0; c < N; ++c) {
    const int i = c * kWarp + lane;
    if (i < width) out.put(i, end.empty ? 0.0f : sums[c] * end.factor);
  }
  if (end.empty && p.uniform_empty) put_means(p, s, rows.key_head, lane, kWarp, out);
  if (lane == 0) put_lse(a, s, position, head, end.lse);
}

template <DType T, int Width>
int64_t launch_matrix(const AttentionArgs& a, heddle_cuda_job& job) {
  const AttentionProblem& p = a.problem;
  const int64_t bytes = matrix_shared(Width);
  HEDDLE_ALLOW_SHARED((attention_matrix_kernel<T, Width>), bytes);
  const dim3 grid(static_cast<unsigned>(row_blocks(p, kMatrixRows)), static_cast<unsigned>(p.key_heads));
  HEDDLE_LAUNCH((attention_matrix_kernel<T, Width>), grid, dim3(kMatrixThreads), bytes, job.stream, a, aligned_rows(p),
                serves_short(p));
  return job.launched();
}

template <DType T, int N>
int64_t launch_exact(const AttentionArgs& a, heddle_cuda_job& job) {
  const AttentionProblem& p = a.problem;
  const int64_t bytes = 4 * (kExactRows * p.head_dim + kExactKeys * (p.head_dim + 1 + p.value_dim));
  HEDDLE_ALLOW_SHARED((attention_exact_kernel<T, N>), bytes);
  const dim3 grid(static_cast<unsigned>(row_blocks(p, kExactRows)), static_cast<unsigned>(p.key_heads));
  HEDDLE_LAUNCH((attention_exact_kernel<T, N>), grid, dim3(kExactRows * kWarp), bytes, job.stream, a);
  return job.launched();
}

template <DType T>
int64_t launch_any(const AttentionArgs& a, heddle_cuda_job& job) {
  const AttentionProblem& p = a.problem;
  const int32_t width = p.head_dim > p.value_dim ? p.head_dim : p.value_dim;
  if constexpr (T != DType::kFloat32) {
    if (width <= 32) return launch_matrix<T, 32>(a, job);
    if (width <= 64) return launch_matrix<T, 64>(a, job);
    if (width <= 128) return launch_matrix<T, 128>(a, job);
    if (width <= 256) return launch_matrix<T, 256>(a, job);
  }
  if (p.value_dim <= 128) return launch_exact<T, 4>(a, job);
  return launch_exact<T, 16>(a, job);
}

}  // namespace

int64_t launch_attention_on(const AttentionArgs& a, heddle_cuda_job& job) {
  const AttentionProblem& p = a.problem;
  if (p.sequences() == 0 || p.queries == 0 || p.query_heads == 0) return kOk;
  if (row_blocks(p, kExactRows) > INT32_MAX || p.key_heads > 65535) return kUnsupported;
  if (all_short(p)) return launch_short_attention(a, job);
  // Ragged sequences of which some may be short: each kernel leaves the other's alone.
  if (p.query_offsets && serves_short(p)) {
    const int64_t status = launch_short_attention(a, job);
    if (status != kOk) return status;
  }
  return with_float_type(p.type, [&](auto type) { return launch_any<decltype(type)::value>(a, job); });
}

HEDDLE_CUDA_OP(attention, AttentionArgs) { return launch_attention_on(a, job); }

}  // namespace heddle
