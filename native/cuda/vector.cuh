// Neighbouring elements of a row in one access.
#pragma once
#include "cuda/device.cuh"

namespace heddle {

// V neighbouring elements from element i, which is a multiple of V.
template <DType T, int V>
__device__ __forceinline__ void load_values(const void* p, int64_t i, float (&v)[V]) {
  if constexpr (V == 4 && T == DType::kFloat32) {
    const float4 x = static_cast<const float4*>(p)[i / 4];
    v[0] = x.x, v[1] = x.y, v[2] = x.z, v[3] = x.w;
  } else if constexpr (V == 4) {
    const uint2 x = static_cast<const uint2*>(p)[i / 4];
    const uint32_t words[2] = {x.x, x.y};
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const auto h = static_cast<uint16_t>(words[j / 2] >> (j % 2 * 16));
      v[j] = T == DType::kBFloat16 ? widen_bf16(h) : widen_f16(h);
    }
  } else {
    v[0] = load_as_float<T>(p, i);
  }
}

template <DType T, int V>
__device__ __forceinline__ void store_values(void* p, int64_t i, const float (&v)[V]) {
  if constexpr (V == 4 && T == DType::kFloat32) {
    static_cast<float4*>(p)[i / 4] = make_float4(v[0], v[1], v[2], v[3]);
  } else if constexpr (V == 4) {
    uint32_t words[2];
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      words[j] = T == DType::kBFloat16 ? pack_bf16(v[2 * j], v[2 * j + 1])
                                       : static_cast<uint32_t>(round_f16(v[2 * j])) | static_cast<uint32_t>(round_f16(v[2 * j + 1])) << 16;
    }
    static_cast<uint2*>(p)[i / 4] = make_uint2(words[0], words[1]);
  } else {
#pragma unroll
    for (int j = 0; j < V; ++j) store_float<T>(p, i + j, v[j]);
  }
}

// Four neighbours from element i, of which the first `count` exist; the others read as 0 and are not written. `words`: i is
// a multiple of 4, all exist, and p is aligned to 16 bytes. The lanes that hold an element do not depend on it.
template <DType T>
__device__ __forceinline__ void load_quad(const void* p, int64_t i, int64_t count, bool words, float (&v)[4]) {
  if (words && count > 0) return load_values<T, 4>(p, i, v);
#pragma unroll
  for (int j = 0; j < 4; ++j) v[j] = j < count ? load_as_float<T>(p, i + j) : 0.0f;
}
template <DType T>
__device__ __forceinline__ void store_quad(void* p, int64_t i, int64_t count, bool words, const float (&v)[4]) {
  if (words && count > 0) return store_values<T, 4>(p, i, v);
#pragma unroll
  for (int j = 0; j < 4; ++j) {
    if (j < count) store_float<T>(p, i + j, v[j]);
  }
}
template <class... Pointers>
bool quads_are_words(int64_t width, const Pointers*... p) {
  return width % 4 == 0 && is_aligned(16, {p...}, 16);
}

}  // namespace heddle
