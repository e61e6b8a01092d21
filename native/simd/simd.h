// Vector regions: how the per-instruction-set code is compiled.
//
// A kernel is written once in `<op>-inl.h` on the vocabulary below and re-included once per instruction set:
//
//   #include "simd/simd.h"            // std headers and intrinsics first, outside any region
//   #include "simd/avx512_begin.h"    // opens target region and namespace heddle::avx512, defines the vocabulary
//   #include "moe/route_top_k-inl.h"
//   #include "simd/end.h"             // closes both
//
// No global -m flags: code outside regions stays runnable on the oldest CPU. Inside a region use no std::
// templates (an inline instantiation there could be merged with one from another file and carry the wide
// instructions with it).
//
// The vocabulary, per namespace: types vf (float32 lanes), vi (int32 lanes), vm (lane mask); constant W (lanes);
//   load/store (unaligned), load_n/store_n (first n lanes; n <= W; missing lanes read `fill`), loadi/storei,
//   load_bf16/load_f16 (+_n), store_bf16/store_f16 (+_n), set1, set1i, iota,
//   add sub mul div fma(a,b,c)=a*b+c fnma(a,b,c)=c-a*b max min sqrt neg abs, addi subi andi ori xori maxi mini,
//   shl<n> sra<n> srl<n>, lt le gt ge eq (vf), eqi gti (vi), not_nan, mask_and mask_or mask_not, mask_bits, first_n(n),
//   select(m, a, b) = m ? a : b, as_int as_float (bit casts), to_int (round to nearest even) to_float,
//   reduce_add reduce_max reduce_maxi reduce_mini, spread_maxi, reciprocal (normal, finite), rotl<n>, transpose(vf[W]).
//   Reductions use a fixed tree, so results do not depend on the run.
// max/min follow x86: if either operand is NaN the second is returned; kernels must not rely on NaN there.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>

#include "core/cpu_features.h"
#include "core/dtype.h"

#if defined(__x86_64__) || defined(_M_X64)
#include <immintrin.h>
#define HEDDLE_TARGET_X86 1
#endif
#if defined(__aarch64__) || defined(_M_ARM64)
#include <arm_neon.h>
#define HEDDLE_TARGET_NEON 1
// Compilers whose arm_neon.h offers dotprod, i8mm and bf16 to functions with those targets (older ones want -march).
#if defined(__clang__) ? __clang_major__ >= 16 : defined(__GNUC__) && __GNUC__ >= 10
#define HEDDLE_ARM_DOT 1
#endif
#endif

#if defined(_MSC_VER) && !defined(__clang__)
#define HEDDLE_INLINE static __forceinline
#define HEDDLE_RESTRICT __restrict
#define HEDDLE_UNROLL(n)
#else
#define HEDDLE_INLINE static inline __attribute__((always_inline))
#define HEDDLE_RESTRICT __restrict__
#define HEDDLE_PRAGMA_(x) _Pragma(#x)
#if defined(__clang__)
#define HEDDLE_UNROLL(n) HEDDLE_PRAGMA_(clang loop unroll_count(n))
#else
#define HEDDLE_UNROLL(n) HEDDLE_PRAGMA_(GCC unroll n)
#endif
#endif

#if defined(__GNUC__) || defined(__clang__)
#define HEDDLE_PREFETCH(p) __builtin_prefetch((p), 0, 3)
#define HEDDLE_PREFETCH_L2(p) __builtin_prefetch((p), 0, 2)
#define HEDDLE_PREFETCH_WRITE(p) __builtin_prefetch((p), 1, 3)
#else
#define HEDDLE_PREFETCH(p)
#define HEDDLE_PREFETCH_L2(p)
#define HEDDLE_PREFETCH_WRITE(p)
#endif
