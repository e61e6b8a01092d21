// DotKernels on vpdpbusd (AVX-512 VNNI). Keys are the unsigned operand and q the signed one; weights are not negative, so
// they are the unsigned operand and int8 values the signed one as they stand.
#include "attention/part.h"
#include "simd/simd.h"

#if defined(HEDDLE_TARGET_X86) && !(defined(__GNUC__) && !defined(__clang__) && __GNUC__ < 10)
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx2,fma,f16c,bmi,bmi2"))), apply_to = function)
#elif defined(__GNUC__)
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx2,fma,f16c,bmi,bmi2,prefer-vector-width=512")
#endif
namespace heddle {
namespace decode_dot {

// See gemm/avx512_dot.cpp for why this is not the intrinsic.
#if defined(__GNUC__) || defined(__clang__)
HEDDLE_INLINE void dot(__m512i& acc, __m512i u, __m512i s) { __asm__("vpdpbusd %2, %1, %0" : "+v"(acc) : "v"(u), "v"(s)); }
#else
HEDDLE_INLINE void dot(__m512i& acc, __m512i u, __m512i s) { acc = _mm512_dpbusd_epi32(acc, u, s); }
#endif

// The bytes of a word: nibbles x + 8 of elements 0 to 3 and 4 to 7, or x itself.
template <bool Four>
HEDDLE_INLINE void load_bytes(const char* p, __m512i* u) {
  const __m512i w = _mm512_loadu_si512(p);
  if constexpr (Four) {
    const __m512i low = _mm512_set1_epi8(15);
    u[0] = _mm512_and_si512(w, low);
    u[1] = _mm512_and_si512(_mm512_srli_epi32(w, 4), low);
  } else {
    u[0] = w;
  }
}

// The same as unsigned numbers: x + 128 for int8.
template <bool Four>
HEDDLE_INLINE void load_unsigned(const char* p, __m512i* u) {
  load_bytes<Four>(p, u);
  if constexpr (!Four) u[0] = _mm512_xor_si512(u[0], _mm512_set1_epi8(static_cast<char>(0x80)));
}

template <bool Four, int R, int B>
static void score_tile(const PartChunk& c, int slot, const DotQuery& q, int words, float* scores, int64_t ahead) {
  constexpr int S = Four ? 2 : 1;
  const char* k = c.keys + int64_t{slot} * words * 4;
  const int64_t step = int64_t{words} * kSlotBlock * 4;
  __m512i a[R][3][B];
  HEDDLE_UNROLL(16)
  for (int r = 0; r < R; ++r) {
    HEDDLE_UNROLL(16)
    for (int i = 0; i < 3; ++i) {
      HEDDLE_UNROLL(16)
      for (int b = 0; b < B; ++b) a[r][i][b] = _mm512_set1_epi32(q.start[r * 3 + i]);
    }
  }
  const int32_t* x = q.words;
  for (int w = 0; w < words; ++w) {
    __m512i u[B][2];
    HEDDLE_UNROLL(16)
    for (int b = 0; b < B; ++b) {
      HEDDLE_PREFETCH_L2(k + b * step + ahead);
      load_unsigned<Four>(k + b * step, u[b]);
    }
    HEDDLE_UNROLL(16)
    for (int s = 0; s < S; ++s) {
      HEDDLE_UNROLL(16)
      for (int r = 0; r < R; ++r) {
        HEDDLE_UNROLL(16)
        for (int i = 0; i < 3; ++i) {
          const __m512i y = _mm512_set1_epi32(x[(s * kMicroRows + r) * 3 + i]);
          HEDDLE_UNROLL(16)
          for (int b = 0; b < B; ++b) dot(a[r][i][b], u[b][s], y);
        }
      }
    }
    x += S * kMicroRows * 3;
    k += kSlotBlock * 4;
  }
  HEDDLE_UNROLL(16)
  for (int b = 0; b < B; ++b) {
    const __m512 scale = _mm512_loadu_ps(c.key_scales + slot + b * kSlotBlock);
    HEDDLE_UNROLL(16)
    for (int r = 0; r < R; ++r) {
      __m512 z = _mm512_fmadd_ps(_mm512_cvtepi32_ps(a[r][1][b]), _mm512_set1_ps(256.0f), _mm512_cvtepi32_ps(a[r][2][b]));
      z = _mm512_fmadd_ps(_mm512_cvtepi32_ps(a[r][0][b]), _mm512_set1_ps(65536.0f), z);
      z = _mm512_mul_ps(_mm512_mul_ps(z, _mm512_set1_ps(q.scale[r])), scale);
      _mm512_storeu_ps(scores + r * kPartStride + c.at + slot + b * kSlotBlock, z);
    }
  }
}

template <bool Four, int R>
static void score_rows(const PartChunk& c, const DotQuery& q, int dim, float* scores, int64_t ahead) {
  constexpr int B = R > 2 ? 2 : 4;
  const int words = Four ? (dim + 7) / 8 : (dim + 3) / 4;
  int slot = c.begin / kSlotBlock * kSlotBlock;
  for (; slot + B * kSlotBlock <= c.end; slot += B * kSlotBlock) score_tile<Four, R, B>(c, slot, q, words, scores, ahead);
  for (; slot < c.end; slot += kSlotBlock) score_tile<Four, R, 1>(c, slot, q, words, scores, ahead);
}

static void scores(bool four, const PartChunk& c, const DotQuery& q, int dim, int rows, float* s, int64_t ahead) {
  switch (rows) {
    case 1: return four ? score_rows<true, 1>(c, q, dim, s, ahead) : score_rows<false, 1>(c, q, dim, s, ahead);
    case 2: return four ? score_rows<true, 2>(c, q, dim, s, ahead) : score_rows<false, 2>(c, q, dim, s, ahead);
    case 3: return four ? score_rows<true, 3>(c, q, dim, s, ahead) : score_rows<false, 3>(c, q, dim, s, ahead);
    default: return four ? score_rows<true, 4>(c, q, dim, s, ahead) : score_rows<false, 4>(c, q, dim, s, ahead);
  }
}

template <bool Four, int R, int C>
static void value_tile(const PartChunk* chunks, int count, const uint8_t* part, int dim, int column, int columns,
                       int32_t* sums) {
  constexpr int S = Four ? 2 : 1, G = 4 * S;
  const int left = dim - column;
  __m512i a[R][3][C];
  HEDDLE_UNROLL(16)
  for (int r = 0; r < R; ++r) {
    HEDDLE_UNROLL(16)
    for (int i = 0; i < 3; ++i) {
      HEDDLE_UNROLL(16)
      for (int k = 0; k < C; ++k) a[r][i][k] = _mm512_loadu_si512(sums + (r * 3 + i) * columns + column + k * 16);
    }
  }
  for (int n = 0; n < count; ++n) {
    const PartChunk& c = chunks[n];
    const int words = (c.end + G - 1) / G - c.begin / G;
    const char* v = c.first_value + column * 4;
    const uint8_t* digits = part + (c.at + c.begin) * 4;
    const int64_t ahead = c.ahead;
    for (int w = 0; w < words; ++w) {
      __m512i u[C][2];
      HEDDLE_UNROLL(16)
      for (int k = 0; k < C; ++k) {
        HEDDLE_PREFETCH_L2(v + k * 64 + ahead);
        if (C == 1 && left < 16) {
          alignas(64) char t[64] = {};
          memcpy(t, v, static_cast<size_t>(left) * 4);
          load_bytes<Four>(t, u[k]);
        } else {
          load_bytes<Four>(v + k * 64, u[k]);
        }
      }
      HEDDLE_UNROLL(16)
      for (int s = 0; s < S; ++s) {
        HEDDLE_UNROLL(16)
        for (int r = 0; r < R; ++r) {
          HEDDLE_UNROLL(16)
          for (int i = 0; i < 3; ++i) {
            int32_t x;
            memcpy(&x, digits + r * kDigitStride + s * 16 + i * 4, 4);
            const __m512i y = _mm512_set1_epi32(x);
            HEDDLE_UNROLL(16)
            for (int k = 0; k < C; ++k) dot(a[r][i][k], y, u[k][s]);
          }
        }
      }
      digits += G * 4;
      v += int64_t{dim} * 4;
    }
  }
  HEDDLE_UNROLL(16)
  for (int r = 0; r < R; ++r) {
    HEDDLE_UNROLL(16)
    for (int i = 0; i < 3; ++i) {
      HEDDLE_UNROLL(16)
      for (int k = 0; k < C; ++k) _mm512_storeu_si512(sums + (r * 3 + i) * columns + column + k * 16, a[r][i][k]);
    }
  }
}

struct ValueCall {
  const PartChunk* chunks;
  int count;
  const uint8_t* digits;
  int dim, columns;
  int32_t* sums;
};

template <bool Four, int R>
static void value_rows(const ValueCall& x) {
  constexpr int C = R == 1 ? 8 : R == 2 ? 4 : 2;
  int column = 0;
  for (; column + C * 16 <= x.dim; column += C * 16) {
    value_tile<Four, R, C>(x.chunks, x.count, x.digits, x.dim, column, x.columns, x.sums);
  }
  for (; column < x.dim; column += 16) {
    value_tile<Four, R, 1>(x.chunks, x.count, x.digits, x.dim, column, x.columns, x.sums);
  }
}

static void values(bool four, const PartChunk* chunks, int count, const uint8_t* digits, int dim, int columns, int rows,
                   int32_t* sums) {
  const ValueCall x{chunks, count, digits, dim, columns, sums};
  switch (rows) {
    case 1: return four ? value_rows<true, 1>(x) : value_rows<false, 1>(x);
    case 2: return four ? value_rows<true, 2>(x) : value_rows<false, 2>(x);
    case 3: return four ? value_rows<true, 3>(x) : value_rows<false, 3>(x);
    default: return four ? value_rows<true, 4>(x) : value_rows<false, 4>(x);
  }
}

static void split(const float* x, float factor, int count, int8_t* hi, int8_t* mid, int8_t* lo) {
  const __m512i half = _mm512_set1_epi32(128);
  for (int i = 0; i < count; i += 16) {
    const __m512i n = _mm512_cvtps_epi32(_mm512_mul_ps(_mm512_loadu_ps(x + i), _mm512_set1_ps(factor)));
    const __m512i n8 = _mm512_srai_epi32(_mm512_add_epi32(n, half), 8);
    const __m512i n16 = _mm512_srai_epi32(_mm512_add_epi32(n8, half), 8);
    // Truncation keeps the low byte, which is the balanced digit: n - 256 n8.
    _mm_storeu_si128(reinterpret_cast<__m128i*>(lo + i), _mm512_cvtepi32_epi8(n));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(mid + i), _mm512_cvtepi32_epi8(n8));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(hi + i), _mm512_cvtepi32_epi8(n16));
  }
}

static void digits(const float* x, float factor, int count, uint8_t* out, int32_t* sums) {
  const __m512i order = _mm512_broadcast_i32x4(
      _mm_setr_epi8(2, 6, 10, 14, 1, 5, 9, 13, 0, 4, 8, 12, -128, -128, -128, -128));  // high, middle, low, zeros
  const __m512i one = _mm512_set1_epi8(1);
  __m512i total = _mm512_setzero_si512();
  for (int i = 0; i < count; i += 16) {
    const __m512i n = _mm512_cvtps_epi32(_mm512_mul_ps(_mm512_loadu_ps(x + i), _mm512_set1_ps(factor)));
    const __m512i d = _mm512_shuffle_epi8(n, order);
    _mm512_storeu_si512(out + i * 4, d);
    dot(total, d, one);
  }
  const __m256i half = _mm256_add_epi32(_mm512_castsi512_si256(total), _mm512_extracti64x4_epi64(total, 1));
  const __m128i quarter = _mm_add_epi32(_mm256_castsi256_si128(half), _mm256_extracti128_si256(half, 1));
  alignas(16) int32_t t[4];
  _mm_store_si128(reinterpret_cast<__m128i*>(t), quarter);
  for (int i = 0; i < 3; ++i) sums[i] = t[i];
}

}  // namespace decode_dot
}  // namespace heddle
#if defined(__clang__)
#pragma clang attribute pop
#elif defined(__GNUC__)
#pragma GCC pop_options
#endif

namespace heddle {
const DotKernels* dot_kernels(Isa isa) {
  static const DotKernels kernels{decode_dot::scores, decode_dot::values, decode_dot::split, decode_dot::digits};
  return isa == Isa::kAvx512 && cpu_features().avx512_vnni ? &kernels : nullptr;
}
}  // namespace heddle
#else
namespace heddle {
const DotKernels* dot_kernels(Isa) { return nullptr; }
}  // namespace heddle
#endif
