// The kernel of attention() for every type, head size and stride; see attention.cu.
#include "attention/attention_end.cuh"
#include "attention/attention_launch.h"

namespace heddle {
namespace {

constexpr int kExactKeys = 32;

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

template <DType T, int N>
int64_t launch_exact(const AttentionArgs& a, heddle_cuda_job& job) {
  const AttentionProblem& p = a.problem;
  const int64_t bytes = 4 * (kExactRows * p.head_dim + kExactKeys * (p.head_dim + 1 + p.value_dim));
  HEDDLE_ALLOW_SHARED((attention_exact_kernel<T, N>), bytes);
  const dim3 grid(static_cast<unsigned>(row_blocks(p, kExactRows)), static_cast<unsigned>(p.key_heads));
  HEDDLE_LAUNCH((attention_exact_kernel<T, N>), grid, dim3(kExactRows * kWarp), bytes, job.stream, a);
  return job.launched();
}

}  // namespace

int64_t launch_attention_exact(const AttentionArgs& a, heddle_cuda_job& job) {
  return with_float_type(a.problem.type, [&](auto type) {
    constexpr DType kType = decltype(type)::value;
    if (a.problem.value_dim <= 128) return launch_exact<kType, 4>(a, job);
    return launch_exact<kType, 16>(a, job);
  });
}

}  // namespace heddle
