// From words of a cache's pages to the B fragments of bf16 matrix instructions, in registers.
//
// The layout of the pools (decode_attention.h) is the fragment layout of mma.m16n8k16: a word is what one lane holds of
// B, so words go from memory to the matrix cores without shared memory and without shuffles. A lane loads four words at
// a time: of keys four slots (columns of four instructions), of values four dims. The order of slots, dims and depth
// that follows is free, as long as the other operand has the same:
//
//   scores   n-tile r, column g:  slot 16 (g / 4) + 4 (g % 4) + r of the tile, so lane (g, t) gets of rows g and g + 8
//            slots 8t + r and 8t + 4 + r; step s, lane t, half h, element e: dim DimOf(s, t, h, e)
//   values   step m, lane t, half h, element e: slot 8t + 4m + 2h + e; n-tile r, column g: dim 32n + 4g + r
//
// Elements become sums of bf16 pieces: one for bf16, int8 and int4 (exact), two for fp16 (exact), three for fp32 (24
// bits). q and the weights are split the same way, into three pieces unless q is bf16. Products of pieces are exact in
// fp32; those below 2^-24 of the largest are left out.
#pragma once
#include "attention/kv_pages.cuh"
#include "cuda/matrix.cuh"

namespace heddle {

constexpr int kPieceLevels = 3;  // pieces i and j are multiplied where i + j < kPieceLevels

template <CacheType T>
struct WordSteps {
  static constexpr int kPieces = T == CacheType::kFloat32 ? 3 : T == CacheType::kFloat16 ? 2 : 1;
  // Words (columns of the key layout) of one load, and instructions of depth 16 that it feeds.
  static constexpr int kColumns = T == CacheType::kBFloat16 ? 8 : T == CacheType::kFloat32 || T == CacheType::kFloat16 ? 16 : 4;
  static constexpr int kDepth = T == CacheType::kInt4 ? 2 : 1;

  // Dim of lane t's element e in half h of step s.
  __device__ static int dim(int s, int t, int h, int e) {
    if constexpr (T == CacheType::kInt8) return 16 * s + 4 * t + 2 * h + e;
    else if constexpr (T == CacheType::kInt4) return 32 * (s / 2) + 8 * t + 4 * (s % 2) + 2 * h + e;
    else return 16 * s + 2 * t + 8 * h + e;
  }
};
template <CacheType T>
__host__ __device__ inline int key_steps(int64_t words) {  // instructions of depth 16
  return static_cast<int>((words + WordSteps<T>::kColumns - 1) / WordSteps<T>::kColumns) * WordSteps<T>::kDepth;
}

// a + b of two bf16 each; exact wherever this file uses it.
#if defined(HEDDLE_CUDA_HOST)
__device__ inline uint32_t add_bf16x2(uint32_t a, uint32_t b) {
  return pack_bf16(widen_bf16(static_cast<uint16_t>(a)) + widen_bf16(static_cast<uint16_t>(b)),
                   widen_bf16(static_cast<uint16_t>(a >> 16)) + widen_bf16(static_cast<uint16_t>(b >> 16)));
}
#else
__device__ __forceinline__ uint32_t add_bf16x2(uint32_t a, uint32_t b) {
  uint32_t d;
  asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(d) : "r"(a), "r"(0x3f803f80u), "r"(b));
  return d;
}
#endif

// Bytes 0 1 (High: 2 3) of a word of int8. 128 + the low seven bits, less 128 or 256: each exact in bf16.
template <bool High>
__device__ __forceinline__ uint32_t widen_int8(uint32_t word) {
  const uint32_t x = __byte_perm(word, 0x43434343u, High ? 0x4342 : 0x4140);
  return add_bf16x2(x & 0xff7fff7fu, (x & 0x00800080u) | 0xc300c300u);
}
// Elements 0 1, 2 3, 4 5 or 6 7 of a word of int4, which hold x + 8.
template <int Pair>
__device__ __forceinline__ uint32_t widen_int4(uint32_t word) {
  const uint32_t nibbles = (Pair >= 2 ? word >> 4 : word) & 0x0f0f0f0fu;
  return add_bf16x2(__byte_perm(nibbles, 0x43434343u, Pair % 2 ? 0x4342 : 0x4140), 0xc308c308u);
}

// The next bf16 piece of two numbers, which keep what is left. An infinity leaves NaN: such rows are computed again.
__device__ __forceinline__ uint32_t take_piece(float& low, float& high) {
  const uint32_t piece = pack_bf16(low, high);
  low -= widen_bf16(static_cast<uint16_t>(piece));
  high -= widen_bf16(static_cast<uint16_t>(piece >> 16));
  return piece;
}

__device__ __forceinline__ uint32_t pick(const uint4& v, int r) { return r == 0 ? v.x : r == 1 ? v.y : r == 2 ? v.z : v.w; }

// Four words from `column` on (fp16: half as many bytes), zeros where there are none.
template <CacheType T>
__device__ __forceinline__ uint4 load_words(const char* base, int64_t word, bool present) {
  if (!present) return make_uint4(0, 0, 0, 0);
  if constexpr (T == CacheType::kFloat16) {
    const uint2 v = __ldg(reinterpret_cast<const uint2*>(base + word * 2));
    return make_uint4(v.x & 0xffffu, v.x >> 16, v.y & 0xffffu, v.y >> 16);
  } else {
    return __ldg(reinterpret_cast<const uint4*>(base + word * 4));
  }
}

template <CacheType T>
__device__ __forceinline__ float word_float(uint32_t w) {
  if constexpr (T == CacheType::kFloat16) return widen_f16(static_cast<uint16_t>(w));
  else return __uint_as_float(w);
}

// Fragments of one load: B[depth][piece][n-tile][half].
template <CacheType T>
struct Fragments {
  using Steps = WordSteps<T>;
  uint32_t b[Steps::kDepth][Steps::kPieces][4][2];

  // From the words of the lane's slots, or dims: `w` in the order of halves and, for fp32 and fp16, elements.
  template <class Load>
  __device__ __forceinline__ void fill(const Load& load) {
    if constexpr (T == CacheType::kBFloat16) {
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const uint4 v = load(h);
#pragma unroll
        for (int r = 0; r < 4; ++r) b[0][0][r][h] = pick(v, r);
      }
    } else if constexpr (T == CacheType::kInt8) {
      const uint4 v = load(0);
#pragma unroll
      for (int r = 0; r < 4; ++r) {
        b[0][0][r][0] = widen_int8<false>(pick(v, r));
        b[0][0][r][1] = widen_int8<true>(pick(v, r));
      }
    } else if constexpr (T == CacheType::kInt4) {
      const uint4 v = load(0);
#pragma unroll
      for (int r = 0; r < 4; ++r) {
        b[0][0][r][0] = widen_int4<0>(pick(v, r));
        b[0][0][r][1] = widen_int4<1>(pick(v, r));
        b[1][0][r][0] = widen_int4<2>(pick(v, r));
        b[1][0][r][1] = widen_int4<3>(pick(v, r));
      }
    } else {
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const uint4 low = load(2 * h), high = load(2 * h + 1);
#pragma unroll
        for (int r = 0; r < 4; ++r) {
          float x = word_float<T>(pick(low, r)), y = word_float<T>(pick(high, r));
#pragma unroll
          for (int j = 0; j < Steps::kPieces; ++j) b[0][j][r][h] = take_piece(x, y);
        }
      }
    }
  }
};

// d[r] += a times the fragments of one depth, smallest pieces first.
template <int Pieces, CacheType T>
__device__ __forceinline__ void multiply_pieces(float (*d)[4], const uint32_t (&a)[Pieces][4], const Fragments<T>& f,
                                                int depth) {
#pragma unroll
  for (int level = kPieceLevels - 1; level >= 0; --level) {
#pragma unroll
    for (int j = 0; j <= level; ++j) {
      const int i = level - j;
      if (i >= Pieces || j >= WordSteps<T>::kPieces) continue;
#pragma unroll
      for (int r = 0; r < 4; ++r) mma_bf16(d[r], a[i], f.b[depth][j][r]);
    }
  }
}

}  // namespace heddle
