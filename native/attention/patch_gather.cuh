// Pixels of tubelets as rows of a product; see patch_embed.cu.
#pragma once
#include "attention/patch_problem.h"
#include "cuda/matrix.cuh"

namespace heddle {

// Where the pixel of an input of the product lies: the sum of digit * stride over the mixed-radix digits of its index,
// digit 0 fastest, the last one without a bound.
struct InputOrder {
  int32_t radix[3];
  int32_t step[4];    // digits of one step of the kernel
  int64_t stride[4];
  int32_t k, channels;
  bool by_channel;    // the last digit is the channel; else digit 0 modulo channels
  bool vector;        // 8 inputs from a multiple of 8 are one aligned load
};

struct Digits {
  int32_t d[4];
  __device__ __forceinline__ Digits(const InputOrder& o, int32_t index) {
#pragma unroll
    for (int i = 0; i < 3; ++i) {
      d[i] = index % o.radix[i];
      index /= o.radix[i];
    }
    d[3] = index;
  }
  __device__ __forceinline__ void carry(const InputOrder& o) {
#pragma unroll
    for (int i = 0; i < 3; ++i) {
      if (d[i] >= o.radix[i]) {
        d[i] -= o.radix[i];
        ++d[i + 1];
      }
    }
  }
  __device__ __forceinline__ void next(const InputOrder& o) {
    ++d[0];
    carry(o);
  }
  // One carry a digit is enough: digits of a step are below their radix.
  __device__ __forceinline__ void advance(const InputOrder& o) {
#pragma unroll
    for (int i = 0; i < 4; ++i) d[i] += o.step[i];
    carry(o);
  }
  __device__ __forceinline__ int64_t offset(const InputOrder& o) const {
    return d[0] * o.stride[0] + d[1] * o.stride[1] + d[2] * o.stride[2] + d[3] * o.stride[3];
  }
};

// Pixels as they come from memory, 32 bits at a time, and one of them as fp32.
__device__ __forceinline__ uint32_t pixel_bits(uint8_t v) { return v; }
__device__ __forceinline__ uint32_t pixel_bits(uint16_t v) { return v; }
__device__ __forceinline__ uint32_t pixel_bits(float v) { return __float_as_uint(v); }
template <class P>
__device__ __forceinline__ float pixel_of(uint32_t word, int i) {
  if constexpr (sizeof(P) == 1) {  // 2^23 + v, whose conversion takes no conversion instruction
    return __uint_as_float(permute_bytes(word, 0x4b000000u, 0x7440u + static_cast<uint32_t>(i))) - 8388608.0f;
  } else if constexpr (sizeof(P) == 2) {
    return __uint_as_float(i == 0 ? word << 16 : word & 0xffff0000u);
  } else {
    return __uint_as_float(word);
  }
}

constexpr int64_t kNoPixel = -1;

// Eight consecutive inputs of Count tokens, which a thread brings from the video to its rows of the product. `first`:
// element of each token's first pixel, or kNoPixel for a token that does not exist.
template <class P, int Count>
class Gather {
 public:
  // Asks for the pixels of a step that can be loaded as vectors.
  __device__ __forceinline__ void load(const PatchProblem& p, const InputOrder& o, const Digits& at, int32_t index,
                                       const int64_t (&first)[Count]) {
    if (!o.vector || index >= o.k) return;
    const P* from = static_cast<const P*>(p.video) + at.offset(o);
#pragma unroll
    for (int i = 0; i < Count; ++i) {
      if (first[i] == kNoPixel) continue;
      if constexpr (sizeof(P) == 1) {
        const uint2 v = *reinterpret_cast<const uint2*>(from + first[i]);
        words_[i][0] = v.x, words_[i][1] = v.y;
      } else {
#pragma unroll
        for (int w = 0; w < kWords / 4; ++w) {
          const uint4 v = reinterpret_cast<const uint4*>(from + first[i])[w];
          words_[i][4 * w] = v.x, words_[i][4 * w + 1] = v.y, words_[i][4 * w + 2] = v.z, words_[i][4 * w + 3] = v.w;
        }
      }
    }
  }
  // The normalised pixels of the step; zeros where there are none. Those that are no vectors are read here.
  __device__ __forceinline__ void values(const PatchProblem& p, const InputOrder& o, Digits at, int32_t index,
                                         const int64_t (&first)[Count], float (&v)[Count][8]) {
#pragma unroll
    for (int i = 0; i < Count; ++i) {
#pragma unroll
      for (int j = 0; j < 8; ++j) v[i][j] = 0.0f;
    }
    const int32_t left = o.k - index;
    if (left <= 0) return;
    int32_t channel = o.by_channel ? at.d[3] : at.d[0] % o.channels;
    float scale = p.scale[channel], shift = p.shift[channel];
    if (o.vector) {
#pragma unroll
      for (int j = 0; j < 8; ++j) {
#pragma unroll
        for (int i = 0; i < Count; ++i) {
          if (first[i] != kNoPixel) v[i][j] = fmaf(pixel_of<P>(words_[i][j / kPerWord], j % kPerWord), scale, shift);
        }
        if (o.by_channel || j == 7) continue;
        if (++channel == o.channels) channel = 0;
        scale = p.scale[channel], shift = p.shift[channel];
      }
      return;
    }
#pragma unroll
    for (int j = 0; j < 8; ++j) {
      if (j < left) {
        channel = o.by_channel ? at.d[3] : at.d[0] % o.channels;
        scale = p.scale[channel], shift = p.shift[channel];
        const P* from = static_cast<const P*>(p.video) + at.offset(o);
#pragma unroll
        for (int i = 0; i < Count; ++i) {
          if (first[i] != kNoPixel) v[i][j] = fmaf(pixel_of<P>(pixel_bits(from[first[i]]), 0), scale, shift);
        }
        at.next(o);
      }
    }
  }

 private:
  static constexpr int kPerWord = 4 / static_cast<int>(sizeof(P)), kWords = 8 / kPerWord;
  uint32_t words_[Count][kWords];
};

// First pixel and row of the result of the tokens of a block.
template <int Tokens>
struct TokenRows {
  int64_t first[Tokens], out[Tokens];
};

// By the first Tokens threads of a block.
template <int Tokens>
__device__ __forceinline__ void find_tokens(const PatchProblem& p, int64_t rows, int64_t begin, TokenRows<Tokens>* to) {
  const int i = static_cast<int>(threadIdx.x);
  if (i >= Tokens) return;
  const int64_t r = begin + i;
  to->first[i] = kNoPixel;
  if (r >= rows) return;
  if (!p.indices) {
    const int64_t b = r / p.tokens(), token = r - b * p.tokens();
    to->first[i] = p.first_pixel(b, token);
    to->out[i] = b * p.out_rows + p.out_first + token;
    return;
  }
  int64_t b = 0;  // the last batch entry that begins at or before r
  for (int64_t end = p.batch; end - b > 1;) {
    const int64_t middle = (b + end) / 2;
    if (p.batch_offsets[middle] <= r) b = middle;
    else end = middle;
  }
  to->first[i] = p.first_pixel(b, p.indices[r]);
  to->out[i] = r;
}

}  // namespace heddle
