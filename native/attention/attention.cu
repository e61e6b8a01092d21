// attention() on the device; definition and promises in attention.h.
//
// Two kernels. `exact` is the reference-grade one, for every type, head size and stride: fp32 throughout, a warp a row,
// 32 keys at a time with one key per lane for q.k and one value column per lane for p v. `matrix` serves bf16 and fp16
// with head sizes up to 256 on the matrix cores: a warp has 16 rows, the block's four warps share tiles of keys and
// values in shared memory; values arrive while q.k runs and the next keys while p v runs. Logits, maxima and sums are
// fp32; p is rounded to the input type for its product (one rounding of 2^-9 in bf16, averaged over the keys).
//
// A row's bits depend on its own sequence alone: tiles start at fixed multiples inside it, and a tile that a row does
// not see multiplies its sums by 1 and adds 0. A tile with masked keys whose values are not finite takes a loop that
// skips weights of 0. Not measured on a GPU yet.
#include "attention/attention.h"

#include "attention/attention_rows.cuh"
#include "cuda/job.h"
#include "cuda/matrix.cuh"

namespace heddle {
namespace {

constexpr int kExactRows = 8, kExactKeys = 32;
constexpr int kMatrixRows = 64, kMatrixThreads = 128;

// What ends a row: the maximum logit m in units of ln 2 and the sum of 2^(z - m), before the sink.
struct RowEnd {
  float factor;  // of the sums
  float lse;
  bool empty;
};
__device__ __forceinline__ RowEnd end_row(const AttentionProblem& p, int64_t head, float m, float sum) {
  float shift = 1.0f;
  if (p.sinks) {
    const float sink = p.sinks[head] * kLog2OfE, top = fmaxf(m, sink);
    if (top > kMinusInf) {
      shift = m > kMinusInf ? exp2f(m - top) : 0.0f;
      sum = sum * shift + exp2f(sink - top);
      m = top;
    }
  }
  RowEnd end;
  end.empty = m == kMinusInf;
  end.factor = end.empty ? 0.0f : shift / sum;
  end.lse = end.empty ? kMinusInf : (m + log2f(sum)) * kLnOf2;
  return end;
}

// Where a row's outputs go, and its log-sum-exp.
template <DType T>
struct RowOut {
  void* data;
  int64_t at;
  bool prefix;
  __device__ RowOut(const AttentionArgs& a, const Sequence& s, int64_t position, int64_t head) {
    const AttentionProblem& p = a.problem;
    prefix = p.is_prefix(position);
    data = prefix ? static_cast<void*>(a.prefix_output) : a.output;
    at = prefix ? p.prefix_at(s, p.query_heads, head) * p.value_dim : p.output_at(s, position, head);
  }
  __device__ void put(int64_t i, float x) const {
    if (!data) return;
    if (prefix) static_cast<float*>(data)[at + i] = x;
    else store_float<T>(data, at + i, x);
  }
};

__device__ inline void put_lse(const AttentionArgs& a, const Sequence& s, int64_t position, int64_t head, float lse) {
  const AttentionProblem& p = a.problem;
  if (p.is_prefix(position)) {
    if (a.prefix_lse) a.prefix_lse[p.prefix_at(s, p.query_heads, head)] = lse;
  } else if (a.log_sum_exp) {
    a.log_sum_exp[p.lse_at(s, position, head)] = lse;
  }
}

// Columns first, first + step, ... of a row that sees no key: the mean of all values of the sequence.
template <DType T>
__device__ inline void put_means(const AttentionProblem& p, const Sequence& s, int64_t key_head, int first, int step,
                                 const RowOut<T>& out) {
#pragma unroll 1
  for (int i = first; i < p.value_dim; i += step) {
    float sum = 0.0f;
#pragma unroll 1
    for (int64_t j = 0; j < s.keys; ++j) {
      sum += load_as_float<T>(p.value, p.value_at(s, j, key_head) + i * p.value_stride[3]);
    }
    out.put(i, s.keys ? sum / static_cast<float>(s.keys) : 0.0f);
  }
}

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
  const DeviceRange own = device_range(p, s, position);
  const DeviceRange all = union_range(p, s, rows.first / group, last / group);
  const bool formed = forms_logits(p);
  const float unit = formed ? kLog2OfE : p.scale * kLog2OfE;
  if (active) {
    const int64_t at = p.query_at(s, position, head);
    for (int i = lane; i < dim; i += kWarp) q[i] = load_as_float<T>(p.query, at + i * p.query_stride[3]);
  }

  float sums[N] = {};
  float m = kMinusInf, total = 0.0f;
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
    float z = kMinusInf;
    if (sees(p, s, position, head, own, tile + lane)) {
      float product = 0.0f;
      for (int i = 0; i < dim; ++i) product = fmaf(q[i], keys[lane * (dim + 1) + i], product);
      z = formed ? logit_of(p, s, position, head, tile + lane, product, nullptr) : product;
    }
    const float top = fmaxf(m, warp_max(z != z ? kMinusInf : z) * unit);
    const float base = top == kMinusInf ? 0.0f : top;
    const float keep = m == kMinusInf ? 0.0f : exp2f(m - base);
    const float weight = z == kMinusInf ? 0.0f : exp2f(fmaf(z, unit, -base));
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

template <DType T>
__device__ __forceinline__ void mma_any(float (&d)[4], const uint32_t (&x)[4], const uint32_t (&y)[2]) {
  if constexpr (T == DType::kBFloat16) mma_bf16(d, x, y);
  else mma_f16(d, x, y);
}
template <DType T>
__device__ __forceinline__ uint32_t pack_any(float low, float high) {
  if constexpr (T == DType::kBFloat16) return pack_bf16(low, high);
  else return static_cast<uint32_t>(round_f16(low)) | static_cast<uint32_t>(round_f16(high)) << 16;
}

// Rows of `dim` 16-bit elements to shared memory [rows][Pitch]; `start` gives a row's first element, or -1. Columns up to
// Width are filled with zeros. In the background where everything is aligned to 16 bytes.
template <int Rows, int Width, int Pitch, class Start>
__device__ __forceinline__ void load_tile(uint16_t* to, const void* from, int32_t dim, int64_t step, bool aligned,
                                          Start start) {
  const auto* data = static_cast<const uint16_t*>(from);
  constexpr int kChunks = Width / 8;
#pragma unroll 1
  for (int c = static_cast<int>(threadIdx.x); c < Rows * kChunks; c += kMatrixThreads) {
    const int row = c / kChunks, column = c % kChunks * 8;
    const int64_t at = start(row);
    const int left = at < 0 ? 0 : dim - column;
    uint16_t* target = to + row * Pitch + column;
    if (aligned) {
      cp_async_16(target, left > 0 ? data + at + column : data, left >= 8 ? 16 : left > 0 ? 2 * left : 0);
    } else {
#pragma unroll
      for (int i = 0; i < 8; ++i) target[i] = i < left ? data[at + (column + i) * step] : uint16_t{0};
    }
  }
  cp_async_commit();
}

__host__ __device__ constexpr int matrix_keys(int width) { return width > 128 ? 32 : 64; }
__host__ __device__ constexpr int64_t matrix_shared(int width) {
  return 2 * (kMatrixRows + 2 * matrix_keys(width)) * (width + 8) + 4 * kMatrixThreads * (matrix_keys(width) / 2);
}

// Width: head_dim and value_dim rounded up. The four warps have 16 rows each.
template <DType T, int Width>
__global__ void __launch_bounds__(kMatrixThreads, Width == 64 ? 2 : 1) attention_matrix_kernel(AttentionArgs a, bool aligned) {
  constexpr int kKeys = matrix_keys(Width), kPitch = Width + 8, kWeightPitch = kKeys + 8;
  HEDDLE_DYNAMIC_SHARED(uint16_t, shared);
  uint16_t* queries = shared;
  uint16_t* keys = queries + kMatrixRows * kPitch;
  uint16_t* values = keys + kKeys * kPitch;
  // For formed logits, and for the weights of tiles whose values are not finite.
  auto* logits = reinterpret_cast<float*>(values + kKeys * kPitch);
  auto* weights = reinterpret_cast<uint16_t*>(logits);  // [64][kWeightPitch]
  const AttentionProblem& p = a.problem;
  BlockRows rows;
  if (!find_rows(p, kMatrixRows, blockIdx.x, blockIdx.y, &rows)) return;
  const Sequence& s = rows.sequence;
  const int warp = static_cast<int>(threadIdx.x) / kWarp, lane = static_cast<int>(threadIdx.x) % kWarp;
  const int g = lane / 4, t = lane % 4;
  const int64_t group = p.group(), key_head = rows.key_head;
  const int64_t last = (rows.first + kMatrixRows < rows.count ? rows.first + kMatrixRows : rows.count) - 1;
  const DeviceRange all = union_range(p, s, rows.first / group, last / group);
  const bool formed = forms_logits(p);
  const float unit = formed ? kLog2OfE : p.scale * kLog2OfE;
  const int64_t begin = all.lo / kKeys * kKeys;

  load_tile<kMatrixRows, Width, kPitch>(queries, p.query, p.head_dim, p.query_stride[3], aligned, [&](int r) {
    const int64_t row = rows.first + r;
    return row > last ? int64_t{-1} : p.query_at(s, row / group, key_head * group + row % group);
  });
  auto load_keys = [&](int64_t tile) {
    load_tile<kKeys, Width, kPitch>(keys, p.key, p.head_dim, p.key_stride[3], aligned, [&](int j) {
      return tile + j < s.keys ? p.key_at(s, tile + j, key_head) : int64_t{-1};
    });
  };
  load_keys(begin);

  // The lane's rows: g and g + 8 of its warp.
  int64_t position[2], head[2];
  DeviceRange own[2];
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    int64_t row = rows.first + warp * 16 + g + 8 * r;
    if (row > last) row = last;
    position[r] = row / group;
    head[r] = key_head * group + row % group;
    own[r] = device_range(p, s, position[r]);
  }
  // Tiles that every row of the block sees as a whole need no look at single keys.
  int64_t full_lo = 0, full_hi = 0;
  if (!formed) {
    full_lo = device_range(p, s, last / group).lo;
    full_hi = device_range(p, s, rows.first / group).hi;
  }

  float out[Width / 8][4] = {};
  float m[2] = {kMinusInf, kMinusInf}, total[2] = {0.0f, 0.0f};
  for (int64_t tile = begin; tile < all.hi; tile += kKeys) {
    const bool whole = !formed && tile >= full_lo && tile + kKeys <= full_hi;
    load_tile<kKeys, Width, kPitch>(values, p.value, p.value_dim, p.value_stride[3], aligned, [&](int j) {
      return tile + j < s.keys ? p.value_at(s, tile + j, key_head) : int64_t{-1};
    });
    cp_async_wait<1>();
    __syncthreads();

    float z[kKeys / 8][4] = {};
#pragma unroll
    for (int d = 0; d < Width; d += 16) {
      uint32_t x[4];
      ldmatrix_x4(x, queries + (warp * 16 + lane % 16) * kPitch + d + lane / 16 * 8);
#pragma unroll
      for (int n = 0; n < kKeys / 16; ++n) {
        uint32_t y[4];
        ldmatrix_x4(y, keys + (n * 16 + lane / 16 * 8 + lane % 8) * kPitch + d + lane / 8 % 2 * 8);
        const uint32_t low[2] = {y[0], y[1]}, high[2] = {y[2], y[3]};
        mma_any<T>(z[2 * n], x, low);
        mma_any<T>(z[2 * n + 1], x, high);
      }
    }
    if (formed) {
      // By way of shared memory, so that the code for one logit stands here once instead of once per register.
      float* own_logits = logits + threadIdx.x;
#pragma unroll
      for (int i = 0; i < kKeys / 2; ++i) own_logits[i * kMatrixThreads] = z[i / 4][i % 4];
#pragma unroll 1
      for (int i = 0; i < kKeys / 2; ++i) {
        const bool second = i % 4 >= 2;
        const int64_t at = second ? position[1] : position[0], h = second ? head[1] : head[0];
        const DeviceRange range = second ? own[1] : own[0];
        const int64_t key = tile + i / 4 * 8 + 2 * t + i % 2;
        float* logit = own_logits + i * kMatrixThreads;
        *logit = sees(p, s, at, h, range, key) ? logit_of(p, s, at, h, key, *logit, nullptr) : kMinusInf;
      }
#pragma unroll
      for (int i = 0; i < kKeys / 2; ++i) z[i / 4][i % 4] = own_logits[i * kMatrixThreads];
    } else if (!whole) {
#pragma unroll
      for (int n = 0; n < kKeys / 8; ++n) {
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          const int64_t key = tile + n * 8 + 2 * t + e % 2;
          if (key < own[e / 2].lo || key >= own[e / 2].hi) z[n][e] = kMinusInf;
        }
      }
    }
    float keep[2];
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      float top = kMinusInf;
#pragma unroll
      for (int n = 0; n < kKeys / 8; ++n) top = fmaxf(top, fmaxf(z[n][2 * r], z[n][2 * r + 1]));
      top = fmaxf(top, __shfl_xor_sync(kFullMask, top, 1));
      top = fmaxf(top, __shfl_xor_sync(kFullMask, top, 2));
      top = fmaxf(m[r], top * unit);
      const float base = top == kMinusInf ? 0.0f : top;
      keep[r] = m[r] == kMinusInf ? 0.0f : exp2f(m[r] - base);
      m[r] = top;
      float sum = 0.0f;
#pragma unroll
      for (int n = 0; n < kKeys / 8; ++n) {
#pragma unroll
        for (int e = 2 * r; e < 2 * r + 2; ++e) {
          z[n][e] = z[n][e] == kMinusInf ? 0.0f : exp2f(fmaf(z[n][e], unit, -base));
          sum += z[n][e];
        }
      }
      sum += __shfl_xor_sync(kFullMask, sum, 1);
      sum += __shfl_xor_sync(kFullMask, sum, 2);
      total[r] = total[r] * keep[r] + sum;
    }
#pragma unroll
    for (int n = 0; n < Width / 8; ++n) {
#pragma unroll
      for (int e = 0; e < 4; ++e) out[n][e] *= keep[e / 2];
    }

    cp_async_wait<0>();
    int broken = 0;
    if (!whole) {
      // The thread's own chunks are there; __syncthreads_or makes everybody's visible.
      constexpr int kChunks = Width / 8;
      const uint16_t infinite = T == DType::kBFloat16 ? 0x7f80 : 0x7c00;
#pragma unroll 1
      for (int c = static_cast<int>(threadIdx.x); c < kKeys * kChunks; c += kMatrixThreads) {
        const uint16_t* chunk = values + c / kChunks * kPitch + c % kChunks * 8;
        for (int i = 0; i < 8; ++i) broken |= (chunk[i] & infinite) == infinite;
      }
      broken = __syncthreads_or(broken);
    } else {
      __syncthreads();
    }
    if (tile + kKeys < all.hi) load_keys(tile + kKeys);
    if (!broken) {
#pragma unroll
      for (int k = 0; k < kKeys / 16; ++k) {
        const uint32_t x[4] = {pack_any<T>(z[2 * k][0], z[2 * k][1]), pack_any<T>(z[2 * k][2], z[2 * k][3]),
                               pack_any<T>(z[2 * k + 1][0], z[2 * k + 1][1]), pack_any<T>(z[2 * k + 1][2], z[2 * k + 1][3])};
#pragma unroll
        for (int n = 0; n < Width / 16; ++n) {
          uint32_t y[4];
          ldmatrix_x4_trans(y, values + (k * 16 + lane % 16) * kPitch + n * 16 + lane / 16 * 8);
          const uint32_t low[2] = {y[0], y[1]}, high[2] = {y[2], y[3]};
          mma_any<T>(out[2 * n], x, low);
          mma_any<T>(out[2 * n + 1], x, high);
        }
      }
    } else {
      uint16_t* w = weights + (warp * 16 + g) * kWeightPitch;
#pragma unroll
      for (int n = 0; n < kKeys / 8; ++n) {
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          w[e / 2 * 8 * kWeightPitch + n * 8 + 2 * t + e % 2] = static_cast<uint16_t>(pack_any<T>(z[n][e], 0.0f));
        }
      }
      __syncwarp();
#pragma unroll 1
      for (int j = 0; j < kKeys; ++j) {
        const float weight[2] = {load_as_float<T>(w, j), load_as_float<T>(w, 8 * kWeightPitch + j)};
#pragma unroll
        for (int n = 0; n < Width / 8; ++n) {
#pragma unroll
          for (int e = 0; e < 4; ++e) {
            if (weight[e / 2] == 0.0f) continue;
            out[n][e] = fmaf(weight[e / 2], load_as_float<T>(values, j * kPitch + n * 8 + 2 * t + e % 2), out[n][e]);
          }
        }
      }
    }
    __syncthreads();  // the values are read: the next tile may take their place
  }
  cp_async_wait<0>();

#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const int64_t row = rows.first + warp * 16 + g + 8 * r;
    if (row > last) continue;
    const RowEnd end = end_row(p, head[r], m[r], total[r]);
    const RowOut<T> to(a, s, position[r], head[r]);
#pragma unroll
    for (int n = 0; n < Width / 8; ++n) {
#pragma unroll
      for (int e = 2 * r; e < 2 * r + 2; ++e) {
        const int i = n * 8 + 2 * t + e % 2;
        if (i < p.value_dim) to.put(i, end.empty ? 0.0f : out[n][e] * end.factor);
      }
    }
    if (end.empty && p.uniform_empty) put_means(p, s, key_head, t, 4, to);
    if (t == 0) put_lse(a, s, position[r], head[r], end.lse);
  }
}

bool aligned_rows(const AttentionProblem& p) {
  auto fits = [](const void* base, const int64_t* stride, int64_t inner, const int64_t* extra) {
    int64_t all = inner | stride[0] | stride[1] | stride[2] | extra[0] | extra[1] | extra[2];
    return stride[3] == 1 && all % 8 == 0 && reinterpret_cast<uintptr_t>(base) % 16 == 0;
  };
  const int64_t q[3] = {p.prefix.query, p.prefix.query_stride[0], p.prefix.query_stride[1]};
  const int64_t k[3] = {p.prefix.key, p.prefix.key_stride[0], p.prefix.key_stride[1]};
  const int64_t v[3] = {p.prefix.value, p.prefix.value_stride[0], p.prefix.value_stride[1]};
  return fits(p.query, p.query_stride, p.inner_stride.query, q) && fits(p.key, p.key_stride, p.inner_stride.key, k) &&
         fits(p.value, p.value_stride, p.inner_stride.value, v);
}

template <DType T, int Width>
int64_t launch_matrix(const AttentionArgs& a, heddle_cuda_job& job) {
  const AttentionProblem& p = a.problem;
  const int64_t bytes = matrix_shared(Width);
  HEDDLE_ALLOW_SHARED((attention_matrix_kernel<T, Width>), bytes);
  const dim3 grid(static_cast<unsigned>(row_blocks(p, kMatrixRows)), static_cast<unsigned>(p.key_heads));
  HEDDLE_LAUNCH((attention_matrix_kernel<T, Width>), grid, dim3(kMatrixThreads), bytes, job.stream, a, aligned_rows(p));
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

HEDDLE_CUDA_OP(attention, AttentionArgs) {
  const AttentionProblem& p = a.problem;
  if (p.sequences() == 0 || p.queries == 0 || p.query_heads == 0) return kOk;
  if (row_blocks(p, kExactRows) > INT32_MAX || p.key_heads > 65535) return kUnsupported;
  return with_float_type(p.type, [&](auto type) { return launch_any<decltype(type)::value>(a, job); });
}

}  // namespace heddle
