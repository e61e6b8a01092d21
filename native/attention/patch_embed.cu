// patch_embed() on the device: the product of gathered, normalised pixels with a weight matrix [dim, k] as it comes.
//
// A block of 64 tokens x 128 outputs walks k in steps: pixels are read where they lie in the video (8 consecutive k are one
// load where the layout has them together), widened, normalised, and put into shared memory as rows of the product, so
// the unfolded video never exists. Where a thread's pixels lie follows from mixed-radix digits of k (width, height, time,
// channel), which a step advances by additions. Weights in bf16 or fp16 take the matrix cores, with the normalised
// pixels rounded to the weights' type; fp32 weights take fp32 FMA, one chain in ascending k per output.
//
// The matrix form loads pixels of the next step into registers and weights two steps ahead into shared memory while it
// multiplies; one barrier a step. Blocks beside each other share their tokens: a frame comes from memory once and then
// from L2.
//
// Floor, ViViT-B on one clip of 32 frames (16 x 14 x 14 tokens, k = 1,536, dim 768): 7.4 GFLOP = 7.5 us on an H100's
// tensor cores, about 13 us by mma.sync; 4.8 MB of uint8 video, 2.4 MB of weights and 4.8 MB of bf16 results are 3.6 us
// of its memory. Widening costs 29 M pixels (each token for 6 blocks of outputs) at 3 instructions: 5 us of issue slots,
// spread over the same time. 294 blocks, 4 a multiprocessor. Not measured on a GPU yet.
//
// A token's bits do not depend on what is computed beside it: every sum runs over k in one order.
#include "attention/patch_embed.h"
#include "cuda/job.h"
#include "cuda/matrix.cuh"

namespace heddle {
namespace {

constexpr int kTokens = 64, kOutputs = 128;
constexpr int kMatrixStep = 32, kMatrixThreads = 128, kStages = 3;
constexpr int kExactStep = 16, kExactThreads = 256;

// Where the pixel of an input k lies: sum of digit * stride, digit 0 fastest, the last without a bound.
struct KOrder {
  int32_t radix[3];
  int32_t step[4];  // digits of one step
  int64_t stride[4];
  int32_t channels;
  bool channel_last_digit;  // the channel is digit 3, else digit 0 modulo channels
  bool run, vector;         // 8 inputs never cross digit 0; and are contiguous and aligned
  bool weight_vector;       // rows of the weights can be read 16 bytes at a time
};

struct Digits {
  int32_t d[4];
  __device__ __forceinline__ void set(const KOrder& o, int32_t k) {
#pragma unroll
    for (int i = 0; i < 3; ++i) {
      d[i] = k % o.radix[i];
      k /= o.radix[i];
    }
    d[3] = k;
  }
  __device__ __forceinline__ void carry(const KOrder& o) {
#pragma unroll
    for (int i = 0; i < 3; ++i) {
      if (d[i] >= o.radix[i]) {
        d[i] -= o.radix[i];
        ++d[i + 1];
      }
    }
  }
  __device__ __forceinline__ void advance(const KOrder& o) {
#pragma unroll
    for (int i = 0; i < 3; ++i) {
      d[i] += o.step[i];
      if (d[i] >= o.radix[i]) {
        d[i] -= o.radix[i];
        ++d[i + 1];
      }
    }
    d[3] += o.step[3];
  }
  __device__ __forceinline__ int64_t offset(const KOrder& o) const {
    return d[0] * o.stride[0] + d[1] * o.stride[1] + d[2] * o.stride[2] + d[3] * o.stride[3];
  }
};

// Calls f(j, offset, channel) for the 8 inputs from `at`, of which `left` exist.
template <class F>
__device__ __forceinline__ void each_input(const KOrder& o, Digits at, int left, const F& f) {
  if (o.run) {
    const int64_t offset = at.offset(o);
    int channel = o.channel_last_digit ? at.d[3] : at.d[0] % o.channels;
#pragma unroll
    for (int j = 0; j < 8; ++j) {
      if (j < left) f(j, offset + j * o.stride[0], channel);
      if (!o.channel_last_digit && ++channel == o.channels) channel = 0;
    }
  } else {
#pragma unroll
    for (int j = 0; j < 8; ++j) {
      if (j < left) f(j, at.offset(o), o.channel_last_digit ? at.d[3] : at.d[0] % o.channels);
      ++at.d[0];
      at.carry(o);
    }
  }
}

__device__ __forceinline__ float widen(uint8_t v) { return static_cast<float>(v); }
__device__ __forceinline__ float widen(float v) { return v; }
__device__ __forceinline__ float widen(uint16_t v) { return widen_bf16(v); }

// 8 consecutive inputs of one token.
template <class P>
struct Pixels {
  alignas(8 * sizeof(P) > 16 ? 16 : 8 * sizeof(P)) P x[8];

  // `base`: the token's first pixel, or -1.
  __device__ __forceinline__ void load(const P* video, const KOrder& o, const Digits& at, int left, int64_t base) {
    if (base < 0 || left <= 0) return;
    if (o.vector) {
      const P* from = video + base + at.offset(o);
      if constexpr (sizeof(P) == 1) {
        *reinterpret_cast<uint2*>(x) = *reinterpret_cast<const uint2*>(from);
      } else {
#pragma unroll
        for (int i = 0; i < static_cast<int>(sizeof(P)) / 2; ++i) {
          reinterpret_cast<uint4*>(x)[i] = reinterpret_cast<const uint4*>(from)[i];
        }
      }
    } else {
      each_input(o, at, left, [&](int j, int64_t offset, int) { x[j] = video[base + offset]; });
    }
  }
  __device__ __forceinline__ void normalise(const PatchEmbedProblem& a, const KOrder& o, const Digits& at, int left,
                                            int64_t base, float (&v)[8]) const {
#pragma unroll
    for (int j = 0; j < 8; ++j) v[j] = 0.0f;
    if (base < 0 || left <= 0) return;
    if (o.run && o.channel_last_digit) {
      const float scale = a.scale[at.d[3]], shift = a.shift[at.d[3]];
#pragma unroll
      for (int j = 0; j < 8; ++j) {
        if (j < left) v[j] = fmaf(widen(x[j]), scale, shift);
      }
    } else {
      each_input(o, at, left, [&](int j, int64_t, int c) { v[j] = fmaf(widen(x[j]), a.scale[c], a.shift[c]); });
    }
  }
};

// The block's tokens: first pixel (or -1) and row of the result of each.
struct TokenRows {
  int64_t base[kTokens], out[kTokens];
};

__device__ __forceinline__ void find_tokens(const PatchEmbedDeviceArgs& a, int64_t first, TokenRows* rows) {
  const int i = static_cast<int>(threadIdx.x);
  if (i >= kTokens) return;
  const int64_t r = first + i, tokens = a.grid[0] * a.grid[1] * a.grid[2];
  rows->base[i] = -1;
  if (r >= a.rows) return;
  int64_t b, token;
  if (a.indices) {
    int64_t hi = a.batch;
    b = 0;  // the last batch entry that begins at or before r
    while (hi - b > 1) {
      const int64_t mid = (b + hi) / 2;
      if (a.batch_offsets[mid] <= r) b = mid;
      else hi = mid;
    }
    token = a.indices[r];
    rows->out[i] = r;
  } else {
    b = r / tokens;
    token = r - b * tokens;
    rows->out[i] = b * a.out_rows + a.out_first + token;
  }
  const int64_t x = token % a.grid[2], y = token / a.grid[2] % a.grid[1], t = token / (a.grid[2] * a.grid[1]);
  rows->base[i] = a.start + b * a.batch_stride + t * a.step[0] * a.pixel_stride[0] + y * a.step[1] * a.pixel_stride[1] +
                  x * a.step[2] * a.pixel_stride[2];
}

__device__ __forceinline__ void store_result(const PatchEmbedDeviceArgs& a, int64_t row, int64_t column, float x) {
  if (column >= a.columns) return;
  if (a.bias) x += a.bias[column];
  const int64_t at = row * a.columns + column;
  if (a.out_type == DType::kFloat32) store_float<DType::kFloat32>(a.out, at, x);
  else if (a.out_type == DType::kBFloat16) store_float<DType::kBFloat16>(a.out, at, x);
  else store_float<DType::kFloat16>(a.out, at, x);
}

constexpr int kPitch = kMatrixStep + 8;
constexpr int64_t kMatrixBytes = 2 * kPitch * (2 * kTokens + kStages * kOutputs);

// Four warps: 32 tokens and 64 outputs each.
template <class P, DType W>
__global__ void __launch_bounds__(kMatrixThreads, 3) patch_matrix_kernel(PatchEmbedDeviceArgs a, KOrder o) {
  HEDDLE_DYNAMIC_SHARED(uint16_t, shared);
  __shared__ TokenRows rows;
  uint16_t* pixels = shared;                            // [2][kTokens][kPitch]
  uint16_t* weights = shared + 2 * kTokens * kPitch;    // [kStages][kOutputs][kPitch]
  const int thread = static_cast<int>(threadIdx.x), lane = thread % kWarp, warp = thread / kWarp;
  const int64_t blocks = ceil_div(a.columns, kOutputs), block = blockIdx.x;
  const int64_t column0 = block % blocks * kOutputs;
  find_tokens(a, block / blocks * kTokens, &rows);
  __syncthreads();

  const auto* video = static_cast<const P*>(a.video);
  const auto* matrix = static_cast<const uint16_t*>(a.weight);
  const int k_count = static_cast<int>(a.k), steps = (k_count + kMatrixStep - 1) / kMatrixStep;
  // This thread's pixels: the same 8 inputs of a step for two tokens.
  constexpr int kLoads = kTokens * kMatrixStep / 8 / kMatrixThreads;
  const int own = thread % 4 * 8, token0 = thread / 4;
  constexpr int kTokenStep = kMatrixThreads / 4;
  Pixels<P> raw[kLoads];
  Digits at;
  at.set(o, own);
  auto load_pixels = [&](int step) {
#pragma unroll
    for (int i = 0; i < kLoads; ++i) {
      raw[i].load(video, o, at, k_count - step * kMatrixStep - own, rows.base[token0 + i * kTokenStep]);
    }
  };
  auto put_pixels = [&](int step) {
#pragma unroll
    for (int i = 0; i < kLoads; ++i) {
      const int token = token0 + i * kTokenStep;
      float v[8];
      raw[i].normalise(a, o, at, k_count - step * kMatrixStep - own, rows.base[token], v);
      auto* to = reinterpret_cast<uint32_t*>(pixels + (step % 2 * kTokens + token) * kPitch + own);
#pragma unroll
      for (int j = 0; j < 4; ++j) to[j] = pack_any<W>(v[2 * j], v[2 * j + 1]);
    }
  };
  auto load_weights = [&](int step) {
    uint16_t* stage = weights + step % kStages * kOutputs * kPitch;
    if (step < steps) {
#pragma unroll
      for (int i = 0; i < kOutputs * kMatrixStep / 8 / kMatrixThreads; ++i) {
        const int row = token0 + i * kTokenStep;
        const int64_t n = column0 + row;
        const int k = step * kMatrixStep + own, left = n < a.columns ? k_count - k : 0;
        uint16_t* to = stage + row * kPitch + own;
        if (o.weight_vector) {
          cp_async_16(to, left > 0 ? matrix + n * a.k + k : matrix, left >= 8 ? 16 : left > 0 ? 2 * left : 0);
        } else {
#pragma unroll
          for (int j = 0; j < 8; ++j) to[j] = j < left ? matrix[n * a.k + k + j] : uint16_t{0};
        }
      }
    }
    cp_async_commit();
  };

  load_weights(0);
  load_weights(1);
  load_pixels(0);
  put_pixels(0);
  float sums[2][8][4] = {};
  const int row0 = warp / 2 * 32, output0 = warp % 2 * 64;
#pragma unroll 1
  for (int step = 0; step < steps; ++step) {
    cp_async_wait<1>();
    __syncthreads();  // this step's rows are there, and the last step's are read
    load_weights(step + 2);
    at.advance(o);
    if (step + 1 < steps) load_pixels(step + 1);
    const uint16_t* x = pixels + step % 2 * kTokens * kPitch;
    const uint16_t* y = weights + step % kStages * kOutputs * kPitch;
#pragma unroll
    for (int k = 0; k < kMatrixStep; k += 16) {
      uint32_t p[2][4];
#pragma unroll
      for (int i = 0; i < 2; ++i) ldmatrix_x4(p[i], x + (row0 + i * 16 + lane % 16) * kPitch + k + lane / 16 * 8);
#pragma unroll
      for (int n = 0; n < 4; ++n) {
        uint32_t q[4];
        ldmatrix_x4(q, y + (output0 + n * 16 + lane / 16 * 8 + lane % 8) * kPitch + k + lane / 8 % 2 * 8);
        const uint32_t low[2] = {q[0], q[1]}, high[2] = {q[2], q[3]};
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          mma_any<W>(sums[i][2 * n], p[i], low);
          mma_any<W>(sums[i][2 * n + 1], p[i], high);
        }
      }
    }
    if (step + 1 < steps) put_pixels(step + 1);
  }
  cp_async_wait<0>();
#pragma unroll
  for (int i = 0; i < 2; ++i) {
#pragma unroll
    for (int e = 0; e < 4; e += 2) {
      const int token = row0 + i * 16 + e / 2 * 8 + lane / 4;
      if (rows.base[token] < 0) continue;
      const int64_t row = rows.out[token];
#pragma unroll
      for (int n = 0; n < 8; ++n) {
        const int64_t column = column0 + output0 + n * 8 + lane % 4 * 2;
        store_result(a, row, column, sums[i][n][e]);
        store_result(a, row, column + 1, sums[i][n][e + 1]);
      }
    }
  }
}

// A thread has 4 tokens and 8 outputs (two groups of 4).
template <class P>
__global__ void __launch_bounds__(kExactThreads) patch_exact_kernel(PatchEmbedDeviceArgs a, KOrder o) {
  constexpr int kTokenPitch = kTokens + 4, kOutputPitch = kOutputs + 4;
  __shared__ TokenRows rows;
  __shared__ float4 pixels4[kExactStep * kTokenPitch / 4], weights4[kExactStep * kOutputPitch / 4];
  auto* pixels = reinterpret_cast<float*>(pixels4);    // [k][token]
  auto* weights = reinterpret_cast<float*>(weights4);  // [k][output]
  const int thread = static_cast<int>(threadIdx.x);
  const int64_t blocks = ceil_div(a.columns, kOutputs), block = blockIdx.x;
  const int64_t column0 = block % blocks * kOutputs;
  find_tokens(a, block / blocks * kTokens, &rows);
  __syncthreads();

  const auto* video = static_cast<const P*>(a.video);
  const auto* matrix = static_cast<const float*>(a.weight);
  const int k_count = static_cast<int>(a.k), own = thread % 2 * 8, row = thread / 2;
  const bool gathers = row < kTokens;  // half of the threads read pixels, all of them weights
  const int64_t n = column0 + row, base = gathers ? rows.base[row] : -1;
  Pixels<P> raw;
  float w[8];
  Digits at;
  at.set(o, own);
  auto load = [&](int k) {
    raw.load(video, o, at, k_count - k - own, base);
    const int left = n < a.columns ? k_count - k - own : 0;
    const float* from = matrix + n * a.k + k + own;
    if (o.weight_vector && left >= 8) {
      const float4 low = reinterpret_cast<const float4*>(from)[0], high = reinterpret_cast<const float4*>(from)[1];
      w[0] = low.x, w[1] = low.y, w[2] = low.z, w[3] = low.w;
      w[4] = high.x, w[5] = high.y, w[6] = high.z, w[7] = high.w;
    } else {
#pragma unroll
      for (int j = 0; j < 8; ++j) w[j] = j < left ? from[j] : 0.0f;
    }
  };
  auto put = [&](int k) {
    float v[8];
    raw.normalise(a, o, at, k_count - k - own, base, v);
#pragma unroll
    for (int j = 0; j < 8; ++j) {
      if (gathers) pixels[(own + j) * kTokenPitch + row] = v[j];
      weights[(own + j) * kOutputPitch + row] = w[j];
    }
  };

  float sums[4][8] = {};
  const int token0 = thread / 16 * 4, output0 = thread % 16 * 4;
  load(0);
#pragma unroll 1
  for (int k = 0; k < k_count; k += kExactStep) {
    put(k);
    __syncthreads();
    at.advance(o);
    if (k + kExactStep < k_count) load(k + kExactStep);
#pragma unroll
    for (int d = 0; d < kExactStep; ++d) {
      const float4 p = pixels4[(d * kTokenPitch + token0) / 4];
      const float4 q = weights4[(d * kOutputPitch + output0) / 4], r = weights4[(d * kOutputPitch + output0 + 64) / 4];
      const float x[4] = {p.x, p.y, p.z, p.w}, y[8] = {q.x, q.y, q.z, q.w, r.x, r.y, r.z, r.w};
#pragma unroll
      for (int i = 0; i < 4; ++i) {
#pragma unroll
        for (int j = 0; j < 8; ++j) sums[i][j] = fmaf(x[i], y[j], sums[i][j]);
      }
    }
    __syncthreads();
  }
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    if (rows.base[token0 + i] < 0) continue;
#pragma unroll
    for (int j = 0; j < 8; ++j) {
      store_result(a, rows.out[token0 + i], column0 + output0 + j / 4 * 64 + j % 4, sums[i][j]);
    }
  }
}

template <class P>
KOrder order_of(const PatchEmbedDeviceArgs& a, int step) {
  KOrder o{};
  const int64_t* s = a.pixel_stride;
  const auto extent = [&](int i) { return static_cast<int32_t>(a.size[i]); };
  o.channels = static_cast<int32_t>(a.channels);
  o.channel_last_digit = !a.channels_last;
  if (!a.channels_last) {
    o = {{extent(2), extent(1), extent(0)}, {}, {s[2], s[1], s[0], a.channel_stride}, o.channels, true, false, false, false};
  } else if (a.channel_stride == 1 && s[2] == a.channels) {  // a row of pixels is one run
    o = {{extent(2) * o.channels, extent(1), 1}, {}, {1, s[1], 0, s[0]}, o.channels, false, false, false, false};
  } else {
    o = {{o.channels, extent(2), extent(1)}, {}, {a.channel_stride, s[2], s[1], s[0]}, o.channels, false, false, false, false};
  }
  for (int i = 0, rest = step; i < 4; ++i) {
    o.step[i] = i < 3 ? rest % o.radix[i] : rest;
    if (i < 3) rest /= o.radix[i];
  }
  o.run = o.radix[0] % 8 == 0;
  const int64_t all = a.start | a.batch_stride | a.step[0] * s[0] | a.step[1] * s[1] | a.step[2] * s[2] | o.stride[1] |
                      o.stride[2] | o.stride[3];
  o.vector = o.run && o.stride[0] == 1 && all % 8 == 0 && is_aligned(sizeof(P) == 1 ? 8 : 16, {a.video}, 0);
  o.weight_vector = is_aligned(16, {a.weight}, a.k * dtype_size(a.weight_type));
  return o;
}

template <class P, DType W>
int64_t launch_matrix(const PatchEmbedDeviceArgs& a, dim3 grid, heddle_cuda_job& job) {
  HEDDLE_ALLOW_SHARED((patch_matrix_kernel<P, W>), kMatrixBytes);
  HEDDLE_LAUNCH((patch_matrix_kernel<P, W>), grid, dim3(kMatrixThreads), kMatrixBytes, job.stream, a,
                order_of<P>(a, kMatrixStep));
  return job.launched();
}

template <class P>
int64_t launch_for(const PatchEmbedDeviceArgs& a, heddle_cuda_job& job) {
  const int64_t blocks = ceil_div(a.rows, kTokens) * ceil_div(a.columns, kOutputs);
  if (blocks > INT32_MAX || a.k > INT32_MAX - 64) return kUnsupported;
  const dim3 grid(static_cast<unsigned>(blocks));
  if (a.weight_type == DType::kBFloat16) return launch_matrix<P, DType::kBFloat16>(a, grid, job);
  if (a.weight_type == DType::kFloat16) return launch_matrix<P, DType::kFloat16>(a, grid, job);
  HEDDLE_LAUNCH((patch_exact_kernel<P>), grid, dim3(kExactThreads), 0, job.stream, a, order_of<P>(a, kExactStep));
  return job.launched();
}

}  // namespace

HEDDLE_CUDA_OP(patch_embed, PatchEmbedDeviceArgs) {
  if (a.rows == 0 || a.columns == 0) return kOk;
  if (a.type == DType::kUint8) return launch_for<uint8_t>(a, job);
  if (a.type == DType::kBFloat16) return launch_for<uint16_t>(a, job);
  return launch_for<float>(a, job);
}

}  // namespace heddle
