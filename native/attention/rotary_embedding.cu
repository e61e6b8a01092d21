// Rotary embedding on the device; definition in rotary_embedding.h. A block takes a token: its sines and cosines once, in
// shared memory, then as many heads at a time as fit there, so that pairs of any layout are read from memory in words.
// Bound by memory: each element is read and written once.
#include "attention/rotary_embedding.h"

#include "cuda/job.h"
#include "cuda/vector.cuh"

namespace heddle {
namespace {

constexpr int kThreads = 256, kHeld = 4096;

// Reduction in float64 and polynomials in float32, as on the CPU: no argument is large when it gets to them.
__device__ __forceinline__ float2 cos_sin(double a) {
  const double n = rint(a * 0.63661977236758134);
  const auto r = static_cast<float>(fma(n, -6.123233995736766e-17, fma(n, -1.5707963267948966, a)));
  const float z = r * r;
  const float s = fmaf(r * z, fmaf(z, fmaf(z, -1.9515295891e-4f, 8.3321608736e-3f), -1.6666654611e-1f), r);
  const float c = fmaf(z * z, fmaf(z, fmaf(z, 2.443315711809948e-5f, -1.388731625493765e-3f), 4.166664568298827e-2f),
                       fmaf(-0.5f, z, 1.0f));
  switch (static_cast<int64_t>(n) & 3) {
    case 0: return make_float2(c, s);
    case 1: return make_float2(-s, c);
    case 2: return make_float2(-c, -s);
    default: return make_float2(s, -c);
  }
}

template <DType T>
__global__ void __launch_bounds__(kThreads) rotary_kernel(RotaryEmbeddingArgs a, bool words) {
  __shared__ float2 table[kMaxRotaryDim / 2];
  __shared__ float cosine[kMaxRotaryDim], sine[kMaxRotaryDim], held[kHeld];
  __shared__ int32_t partner[kMaxRotaryDim];
  const int thread = static_cast<int>(threadIdx.x);
  const int64_t token = blockIdx.x, b = token / a.length, s = token % a.length;
  for (int i = thread; i < a.count; i += kThreads) {
    const int64_t at = a.axis[i] * a.axis_stride + b * a.batch_stride + s;
    const double position = a.positions ? static_cast<double>(a.positions[at]) : static_cast<double>(a.offset + s);
    table[i] = cos_sin(position * a.frequency[i]);
  }
  __syncthreads();
  for (int e = thread; e < a.dim; e += kThreads) {
    const int32_t p = a.partner[e];
    partner[e] = p < 0 ? e : p;
    cosine[e] = p < 0 ? 1.0f : table[a.angle[e]].x * a.factor;
    sine[e] = p < 0 ? 0.0f : table[a.angle[e]].y * (p > e ? -a.factor : a.factor);
  }
  const auto heads = static_cast<int64_t>(kHeld / a.dim);
  for (int64_t first = 0; first < a.heads; first += heads) {
    const int64_t base = (token * a.heads + first) * a.dim;
    const auto count = static_cast<int>((a.heads - first < heads ? a.heads - first : heads) * a.dim);
    for (int i = thread * 4; i < count; i += kThreads * 4) {
      float v[4];
      load_quad<T>(a.x, base + i, count - i, words, v);
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        if (i + j < count) held[i + j] = v[j];
      }
    }
    __syncthreads();
    for (int i = thread * 4; i < count; i += kThreads * 4) {
      float v[4] = {};
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        if (i + j >= count) continue;
        const int e = (i + j) % a.dim, head = i + j - e;
        v[j] = cosine[e] * held[i + j];
        // What is not rotated is copied, infinities too.
        if (partner[e] != e) v[j] = fmaf(held[head + partner[e]], sine[e], v[j]);
      }
      store_quad<T>(a.out, base + i, count - i, words, v);
    }
    __syncthreads();
  }
}

}  // namespace

HEDDLE_CUDA_OP(rotary_embedding, RotaryEmbeddingArgs) {
  const int64_t tokens = a.batch * a.length;
  if (tokens == 0 || a.heads == 0) return kOk;
  if (tokens >= int64_t{1} << 31) return kUnsupported;
  const bool words = quads_are_words(a.dim, a.x, a.out);
  return with_float_type(a.type, [&](auto type) -> int64_t {
    HEDDLE_LAUNCH((rotary_kernel<decltype(type)::value>), dim3(static_cast<unsigned>(tokens)), dim3(kThreads), 0, job.stream, a, words);
    return job.launched();
  });
}

}  // namespace heddle
