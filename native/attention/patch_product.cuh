// The kernels of patch_embed(); see patch_embed.cu.
#pragma once
#include "attention/patch_gather.cuh"
#include "attention/patch_launch.h"

namespace heddle {
namespace {

constexpr int kThreads = 128, kOutputs = kPatchOutputs;
constexpr int kMatrixStep = 32, kStages = 3, kPitch = kMatrixStep + 8;
constexpr int kExactTokens = 64, kExactStep = 16;

// Two neighbouring outputs of a token. `pairs`: every pair of them is aligned to its size.
__device__ __forceinline__ void store_pair(const PatchEmbedDeviceArgs& a, bool pairs, int64_t row, int64_t column, float x,
                                           float y) {
  if (column >= a.columns) return;
  const PatchProblem& p = a.problem;
  const bool both = column + 1 < a.columns;
  if (p.bias) {
    x += p.bias[column];
    if (both) y += p.bias[column + 1];
  }
  const int64_t at = row * a.columns + column;
  if (pairs) {
    if (p.out_type == DType::kFloat32) static_cast<float2*>(p.out)[at / 2] = make_float2(x, y);
    else if (p.out_type == DType::kBFloat16) static_cast<uint32_t*>(p.out)[at / 2] = pack_any<DType::kBFloat16>(x, y);
    else static_cast<uint32_t*>(p.out)[at / 2] = pack_any<DType::kFloat16>(x, y);
    return;
  }
  const float values[2] = {x, y};
#pragma unroll 1
  for (int i = 0; i <= static_cast<int>(both); ++i) {
    const float v = i == 0 ? values[0] : values[1];
    if (p.out_type == DType::kFloat32) store_float<DType::kFloat32>(p.out, at + i, v);
    else if (p.out_type == DType::kBFloat16) store_float<DType::kBFloat16>(p.out, at + i, v);
    else store_float<DType::kFloat16>(p.out, at + i, v);
  }
}

// Weights whose rows can be read 16 bytes at a time.
struct Weights {
  const void* data;
  int64_t pitch;  // elements, a multiple of 8
};

// Four warps: with TokenWarps = 2 each has 32 tokens and 64 outputs, with 1 it has 32 and 32.
template <class P, DType W, int TokenWarps>
__global__ void __launch_bounds__(kThreads, 3) patch_matrix_kernel(PatchEmbedDeviceArgs a, InputOrder o, Weights w, bool pairs) {
  constexpr int kTokens = 32 * TokenWarps, kWarpOutputs = 32 * TokenWarps, kEights = kWarpOutputs / 8;
  HEDDLE_DYNAMIC_SHARED(uint16_t, shared);
  __shared__ TokenRows<kTokens> rows;
  uint16_t* pixels = shared;                          // [2][kTokens][kPitch]
  uint16_t* weights = shared + 2 * kTokens * kPitch;  // [kStages][kOutputs][kPitch]
  const int thread = static_cast<int>(threadIdx.x), lane = thread % kWarp, warp = thread / kWarp;
  const int64_t across = ceil_div(a.columns, kOutputs), column0 = blockIdx.x % across * kOutputs;
  find_tokens(a.problem, a.rows, blockIdx.x / across * kTokens, &rows);
  __syncthreads();

  // This thread's share of a step: the same 8 inputs of TokenWarps tokens and of 4 outputs.
  const int own = thread % 4 * 8, line = thread / 4;
  constexpr int kLines = kThreads / 4;
  int64_t first[TokenWarps];
#pragma unroll
  for (int i = 0; i < TokenWarps; ++i) first[i] = rows.first[line + i * kLines];
  Gather<P, TokenWarps> gather;
  Digits at(o, own);
  auto put_pixels = [&](int step) {
    float v[TokenWarps][8];
    gather.values(a.problem, o, at, step * kMatrixStep + own, first, v);
#pragma unroll
    for (int i = 0; i < TokenWarps; ++i) {
      auto* to = reinterpret_cast<uint4*>(pixels + (step % 2 * kTokens + line + i * kLines) * kPitch + own);
      *to = make_uint4(pack_any<W>(v[i][0], v[i][1]), pack_any<W>(v[i][2], v[i][3]), pack_any<W>(v[i][4], v[i][5]),
                       pack_any<W>(v[i][6], v[i][7]));
    }
  };
  const int steps = (o.k + kMatrixStep - 1) / kMatrixStep;
  auto load_weights = [&](int step) {
    uint16_t* stage = weights + step % kStages * kOutputs * kPitch;
    const int k = step * kMatrixStep + own;
    if (step < steps) {
#pragma unroll
      for (int i = 0; i < kOutputs / kLines; ++i) {
        const int64_t n = column0 + line + i * kLines;
        const bool there = n < a.columns && k < w.pitch;
        const auto* from = static_cast<const uint16_t*>(w.data) + (there ? n * w.pitch + k : 0);
        cp_async_16(stage + (line + i * kLines) * kPitch + own, from, there ? 16 : 0);
      }
    }
    cp_async_commit();
  };

  load_weights(0);
  load_weights(1);
  gather.load(a.problem, o, at, own, first);
  put_pixels(0);
  float sums[2][kEights][4] = {};
  const int token0 = warp % TokenWarps * 32, output0 = warp / TokenWarps * kWarpOutputs;
#pragma unroll 1
  for (int step = 0; step < steps; ++step) {
    cp_async_wait<1>();
    __syncthreads();  // this step's rows are there, and the last step's are read
    load_weights(step + 2);
    at.advance(o);
    gather.load(a.problem, o, at, (step + 1) * kMatrixStep + own, first);
    const uint16_t* x = pixels + (step % 2 * kTokens + token0 + lane % 16) * kPitch + lane / 16 * 8;
    const uint16_t* y = weights + (step % kStages * kOutputs + output0 + lane / 16 * 8 + lane % 8) * kPitch + lane / 8 % 2 * 8;
#pragma unroll
    for (int k = 0; k < kMatrixStep; k += 16) {
      uint32_t q[2][4];
#pragma unroll
      for (int i = 0; i < 2; ++i) ldmatrix_x4(q[i], x + i * 16 * kPitch + k);
#pragma unroll
      for (int n = 0; n < kEights / 2; ++n) {
        uint32_t r[4];
        ldmatrix_x4(r, y + n * 16 * kPitch + k);
        const uint32_t low[2] = {r[0], r[1]}, high[2] = {r[2], r[3]};
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          mma_any<W>(sums[i][2 * n], q[i], low);
          mma_any<W>(sums[i][2 * n + 1], q[i], high);
        }
      }
    }
    put_pixels(step + 1);
  }
  cp_async_wait<0>();
#pragma unroll
  for (int i = 0; i < 2; ++i) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int token = token0 + i * 16 + half * 8 + lane / 4;
      if (rows.first[token] == kNoPixel) continue;
#pragma unroll
      for (int n = 0; n < kEights; ++n) {
        store_pair(a, pairs, rows.out[token], column0 + output0 + n * 8 + lane % 4 * 2, sums[i][n][2 * half],
                   sums[i][n][2 * half + 1]);
      }
    }
  }
}

// A thread has 8 tokens and 8 outputs, in two groups of 4 each.
template <class P>
__global__ void __launch_bounds__(kThreads, 3) patch_exact_kernel(PatchEmbedDeviceArgs a, InputOrder o, Weights w, bool pairs) {
  constexpr int kTokenPitch = kExactTokens + 4, kOutputPitch = kOutputs + 4, kHalf = kThreads / 2;
  __shared__ TokenRows<kExactTokens> rows;
  __shared__ float4 pixels4[2][kExactStep * kTokenPitch / 4], weights4[2][kExactStep * kOutputPitch / 4];
  const int thread = static_cast<int>(threadIdx.x);
  const int64_t across = ceil_div(a.columns, kOutputs), column0 = blockIdx.x % across * kOutputs;
  find_tokens(a.problem, a.rows, blockIdx.x / across * kExactTokens, &rows);
  __syncthreads();

  // This thread's share of a step: 8 inputs of a token, and all 16 of an output.
  static_assert(kHalf == kExactTokens && kThreads == kOutputs && kExactStep == 16, "one token, one output a thread");
  const int own = thread / kHalf * 8;
  const int64_t first[1] = {rows.first[thread % kHalf]}, n = column0 + thread;
  const auto* matrix = static_cast<const float*>(w.data) + (n < a.columns ? n : 0) * w.pitch;
  Gather<P, 1> gather;
  Digits at(o, own);
  float4 y[4];
  auto load = [&](int k) {
    gather.load(a.problem, o, at, k + own, first);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const bool there = n < a.columns && k + 4 * i < w.pitch;
      y[i] = there ? reinterpret_cast<const float4*>(matrix + k)[i] : make_float4(0.0f, 0.0f, 0.0f, 0.0f);
    }
  };
  auto put = [&](int k) {
    const int stage = k / kExactStep % 2;
    auto* pixels = reinterpret_cast<float*>(pixels4[stage]) + thread % kHalf;
    auto* weights = reinterpret_cast<float*>(weights4[stage]) + thread;
    float v[1][8];
    gather.values(a.problem, o, at, k + own, first, v);
#pragma unroll
    for (int j = 0; j < 8; ++j) pixels[(own + j) * kTokenPitch] = v[0][j];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      weights[(4 * i) * kOutputPitch] = y[i].x;
      weights[(4 * i + 1) * kOutputPitch] = y[i].y;
      weights[(4 * i + 2) * kOutputPitch] = y[i].z;
      weights[(4 * i + 3) * kOutputPitch] = y[i].w;
    }
  };

  float sums[8][8] = {};
  const int token0 = thread / 16 * 4, output0 = thread % 16 * 4;
  load(0);
  put(0);
#pragma unroll 1
  for (int k = 0; k < o.k; k += kExactStep) {
    __syncthreads();  // this step's rows are there, and the last step's are read
    at.advance(o);
    load(k + kExactStep);
    const float4* p = pixels4[k / kExactStep % 2] + token0 / 4;
    const float4* q = weights4[k / kExactStep % 2] + output0 / 4;
#pragma unroll 4
    for (int d = 0; d < kExactStep; ++d) {
      const float4 p0 = p[d * kTokenPitch / 4], p1 = p[d * kTokenPitch / 4 + 8];
      const float4 q0 = q[d * kOutputPitch / 4], q1 = q[d * kOutputPitch / 4 + 16];
      const float x[8] = {p0.x, p0.y, p0.z, p0.w, p1.x, p1.y, p1.z, p1.w};
      const float z[8] = {q0.x, q0.y, q0.z, q0.w, q1.x, q1.y, q1.z, q1.w};
#pragma unroll
      for (int i = 0; i < 8; ++i) {
#pragma unroll
        for (int j = 0; j < 8; ++j) sums[i][j] = fmaf(x[i], z[j], sums[i][j]);
      }
    }
    put(k + kExactStep);
  }
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    const int token = token0 + i / 4 * 32 + i % 4;
    if (rows.first[token] == kNoPixel) continue;
#pragma unroll
    for (int j = 0; j < 8; j += 2) {
      store_pair(a, pairs, rows.out[token], column0 + output0 + j / 4 * 64 + j % 4, sums[i][j], sums[i][j + 1]);
    }
  }
}

// Rows of `pitch` elements, zeros behind k. to[n][i C + c] = from[n][c V + i] of V positions and C channels, or
// to[n][c V + i] = from[n][i C + c]: `inner` is what runs fastest in `from`. 1: as they are.
template <class T>
__global__ void __launch_bounds__(256) patch_weights_kernel(const T* from, T* to, int64_t columns, int64_t k, int64_t pitch,
                                                            int64_t inner) {
  const int64_t outer = k / inner;
  for (int64_t i = int64_t{blockIdx.x} * 256 + threadIdx.x; i < columns * pitch; i += int64_t{gridDim.x} * 256) {
    const int64_t n = i / pitch, at = i - n * pitch;
    to[i] = at < k ? from[n * k + at % outer * inner + at / outer] : T{};
  }
}

// k in the order in which the video has the channels.
template <class P>
InputOrder input_order(const PatchEmbedDeviceArgs& a, bool interleaved, int step) {
  const PatchProblem& p = a.problem;
  const int64_t *s = p.pixel_stride, run = p.size[2] * p.channels;
  InputOrder o{};
  const int64_t radix[3] = {interleaved ? run : p.size[2], p.size[1], p.size[0]};
  const int64_t stride[4] = {interleaved ? 1 : s[2], s[1], s[0], p.channel_stride};
  for (int i = 0, rest = step; i < 4; ++i) {
    o.stride[i] = stride[i];
    o.step[i] = rest;
    if (i == 3) break;
    o.radix[i] = static_cast<int32_t>(radix[i] > 0 ? radix[i] : 1);
    o.step[i] = rest % o.radix[i];
    rest /= o.radix[i];
  }
  o.k = static_cast<int32_t>(a.k);
  o.channels = static_cast<int32_t>(p.channels);
  o.by_channel = !interleaved;
  const int64_t strides = p.start | p.batch_stride | p.step[0] * s[0] | p.step[1] * s[1] | p.step[2] * s[2] | stride[1] |
                          stride[2] | stride[3];
  o.vector = stride[0] == 1 && radix[0] % 8 == 0 && strides % 8 == 0 && is_aligned(sizeof(P) == 1 ? 8 : 16, {p.video}, 0);
  return o;
}

template <class P, DType W, int TokenWarps>
void launch_matrix(const PatchEmbedDeviceArgs& a, const InputOrder& o, const Weights& w, bool pairs, heddle_cuda_job& job) {
  constexpr int64_t kTokens = 32 * TokenWarps, kBytes = 2 * kPitch * (2 * kTokens + kStages * kOutputs);
  const auto blocks = static_cast<unsigned>(ceil_div(a.rows, kTokens) * ceil_div(a.columns, kOutputs));
  HEDDLE_LAUNCH((patch_matrix_kernel<P, W, TokenWarps>), dim3(blocks), dim3(kThreads), kBytes, job.stream, a, o, w, pairs);
}

template <class P, DType W>
int64_t launch_typed(const PatchEmbedDeviceArgs& a, heddle_cuda_job& job) {
  using T = typename Storage<W>::type;
  const PatchProblem& p = a.problem;
  const bool interleaved = p.channels > 1 && p.channel_stride == 1 && p.pixel_stride[2] == p.channels;
  Weights w{a.weight, a.k};
  const bool reorder = p.channels > 1 && interleaved != p.channels_last;
  if (a.k > 0 && (reorder || a.k % 8 != 0 || !is_aligned(16, {a.weight}, 0))) {
    w.pitch = ceil_div(a.k, 8) * 8;
    T* copy = job.scratch<T>(a.columns * w.pitch);
    if (!copy) return kNoMemory;
    const int64_t blocks = ceil_div(a.columns * w.pitch, 256), inner = !reorder ? 1 : p.channels_last ? p.channels : a.k / p.channels;
    HEDDLE_LAUNCH((patch_weights_kernel<T>), dim3(static_cast<unsigned>(blocks < 65536 ? blocks : 65536)), dim3(256), 0,
                  job.stream, static_cast<const T*>(a.weight), copy, a.columns, a.k, w.pitch, inner);
    w.data = copy;
  }
  const bool pairs = a.columns % 2 == 0 && is_aligned(2 * dtype_size(p.out_type), {p.out}, 0);
  const int64_t blocks = ceil_div(a.rows, 64) * ceil_div(a.columns, kOutputs);
  if constexpr (W == DType::kFloat32) {
    HEDDLE_LAUNCH((patch_exact_kernel<P>), dim3(static_cast<unsigned>(blocks)), dim3(kThreads), 0, job.stream, a,
                  input_order<P>(a, interleaved, kExactStep), w, pairs);
  } else {
    const InputOrder o = input_order<P>(a, interleaved, kMatrixStep);
    if (blocks < cuda::multiprocessors()) launch_matrix<P, W, 1>(a, o, w, pairs, job);
    else launch_matrix<P, W, 2>(a, o, w, pairs, job);
  }
  return job.launched();
}

}  // namespace

template <DType W>
int64_t launch_patches(const PatchEmbedDeviceArgs& a, heddle_cuda_job& job) {
  if (a.problem.type == DType::kUint8) return launch_typed<uint8_t, W>(a, job);
  if (a.problem.type == DType::kBFloat16) return launch_typed<uint16_t, W>(a, job);
  return launch_typed<float, W>(a, job);
}

}  // namespace heddle
