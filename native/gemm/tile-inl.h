// Tile products on the vector vocabulary: MR rows times one panel of 32 columns. See packed.h.

// Vectors taken from each half panel at once: with few rows, enough chains to hide the FMA's latency.
template <int MR>
constexpr int half_vectors() {
  constexpr int all = kHalfPanel / W;
  constexpr int budget = W == 16 ? 28 : W == 8 ? 12 : W == 4 ? 24 : 8;  // accumulators that fit the registers
  int u = all;
  while (u > 1 && 2 * u * MR > budget) u /= 2;
  return u;
}

#include "gemm/kernels-inl.h"

// acc + *a * b. On avx512 the broadcast is part of the instruction: 28 instead of 41 micro-operations per step of 13
// rows. No difference on a quiet host (98 % of the FMA peak); in the slowest twentieth of samples on a shared one 79 to 87
// instead of 70 to 81 %. Compilers split it because a is used twice.
template <class V>
HEDDLE_INLINE V fma_broadcast(const float* a, V b, V acc) {
#if defined(HEDDLE_TARGET_X86) && (defined(__GNUC__) || defined(__clang__))
  if constexpr (sizeof(V) == 64) {
    __asm__("vfmadd231ps %2%{1to16%}, %1, %0" : "+v"(acc) : "v"(b), "m"(*a));
    return acc;
  }
#endif
  return fma(set1(*a), b, acc);
}

// Column of accumulator u when U vectors of each half panel are taken, from column c0 on.
template <int U>
HEDDLE_INLINE int column_of(int c0, int u) {
  return c0 + (u < U ? u * W : kHalfPanel + (u - U) * W);
}

// Accumulators from and to c; zero for a chain that begins.
template <int MR, int U>
HEDDLE_INLINE void load_tile(const TileCall& t, int c0, vf (&acc)[MR][2 * U]) {
  HEDDLE_UNROLL(16)
  for (int m = 0; m < MR; ++m) {
    HEDDLE_UNROLL(8)
    for (int u = 0; u < 2 * U; ++u) acc[m][u] = t.accumulate ? load(t.c + m * kPanel + column_of<U>(c0, u)) : set1(0.0f);
  }
}
template <int MR, int U>
HEDDLE_INLINE void clear_tile(vf (&acc)[MR][2 * U]) {
  HEDDLE_UNROLL(16)
  for (int m = 0; m < MR; ++m) {
    HEDDLE_UNROLL(8)
    for (int u = 0; u < 2 * U; ++u) acc[m][u] = set1(0.0f);
  }
}
template <int MR, int U>
HEDDLE_INLINE void store_tile(const TileCall& t, int c0, const vf (&acc)[MR][2 * U]) {
  HEDDLE_UNROLL(16)
  for (int m = 0; m < MR; ++m) {
    HEDDLE_UNROLL(8)
    for (int u = 0; u < 2 * U; ++u) store(t.c + m * kPanel + column_of<U>(c0, u), acc[m][u]);
  }
}

// One k: accumulators of U vectors of each half panel.
template <int MR, int U>
HEDDLE_INLINE void step_f32(const float* a, const float* b, vf (&acc)[MR][2 * U]) {
  vf bv[2 * U];
  HEDDLE_UNROLL(8)
  for (int u = 0; u < 2 * U; ++u) bv[u] = load(b + column_of<U>(0, u));
  HEDDLE_UNROLL(16)
  for (int m = 0; m < MR; ++m) {
    HEDDLE_UNROLL(8)
    for (int u = 0; u < 2 * U; ++u) acc[m][u] = fma_broadcast(a + m, bv[u], acc[m][u]);
  }
}

// c = scale tile, or c + scale tile: the chains of one scale group of widened float8. Unrolled, or the accumulators live on the
// stack (a third of the speed).
template <int MR, int U>
HEDDLE_INLINE void add_scaled_tile(const TileCall& t, int c0, const vf (&acc)[MR][2 * U]) {
  HEDDLE_UNROLL(8)
  for (int u = 0; u < 2 * U; ++u) {
    const int column = column_of<U>(c0, u);
    const vf scale = load(t.b_scale + column);
    HEDDLE_UNROLL(16)
    for (int m = 0; m < MR; ++m) {
      float* c = t.c + m * kPanel + column;
      store(c, t.accumulate ? fma(acc[m][u], scale, load(c)) : mul(acc[m][u], scale));
    }
  }
}

// Four steps a turn: pointers, counter and prefetch conditions share ports with the FMAs.
template <int MR, bool kScaled = false>
void tile_f32(const TileCall& t) {
  constexpr int U = half_vectors<MR>();
  constexpr int kTurn = 4;
  for (int c0 = 0; c0 < kHalfPanel; c0 += U * W) {
    const float* HEDDLE_RESTRICT a = static_cast<const float*>(t.a);
    const float* HEDDLE_RESTRICT b = static_cast<const float*>(t.b) + c0;
    vf acc[MR][2 * U];
    if constexpr (kScaled) clear_tile<MR, U>(acc); else load_tile<MR, U>(t, c0, acc);
    int64_t k = 0;
    for (; k + kTurn <= t.steps; k += kTurn, a += kTurn * MR, b += kTurn * kPanel) {
      if (c0 == 0) prefetch_steps<kTurn>(t, static_cast<const char*>(t.b), k);
      HEDDLE_UNROLL(4)
      for (int i = 0; i < kTurn; ++i) step_f32<MR, U>(a + i * MR, b + i * kPanel, acc);
    }
    for (; k < t.steps; ++k, a += MR, b += kPanel) step_f32<MR, U>(a, b, acc);
    if constexpr (kScaled) add_scaled_tile<MR, U>(t, c0, acc); else store_tile<MR, U>(t, c0, acc);
  }
}

// bf16 weights widened in registers, fp32 activations [K][rows].
template <int MR>
void tile_bf16(const TileCall& t) {
  constexpr int U = half_vectors<(MR > 1 ? MR : 1)>();
  const float* HEDDLE_RESTRICT a = static_cast<const float*>(t.a);
  for (int c0 = 0; c0 < kHalfPanel; c0 += U * W) {
    const int32_t* HEDDLE_RESTRICT b = static_cast<const int32_t*>(t.b) + c0;
    vf acc[MR][2 * U];
    load_tile<MR, U>(t, c0, acc);
    for (int64_t k = 0; k < t.steps; ++k) {
      if (c0 == 0 && (k & 1) == 0) prefetch_steps<2>(t, static_cast<const char*>(t.b), k);
      HEDDLE_UNROLL(2)
      for (int odd = 0; odd < 2; ++odd) {
        vf bv[2 * U];
        HEDDLE_UNROLL(8)
        for (int u = 0; u < U; ++u) {
          const vi x = loadi(b + k * kPanel + u * W), y = loadi(b + k * kPanel + kHalfPanel + u * W);
          bv[u] = as_float(odd ? andi(x, set1i(static_cast<int32_t>(0xffff0000u))) : shl<16>(x));
          bv[U + u] = as_float(odd ? andi(y, set1i(static_cast<int32_t>(0xffff0000u))) : shl<16>(y));
        }
        HEDDLE_UNROLL(16)
        for (int m = 0; m < MR; ++m) {
          const float* av = &a[(2 * k + odd) * MR + m];
          HEDDLE_UNROLL(8)
          for (int u = 0; u < 2 * U; ++u) acc[m][u] = fma_broadcast(av, bv[u], acc[m][u]);
        }
      }
    }
    store_tile<MR, U>(t, c0, acc);
  }
}

static void widen_bf16_steps(const char* from, int64_t steps, float* out) {
  const int32_t* b = reinterpret_cast<const int32_t*>(from);
  for (int64_t s = 0; s < steps; ++s, b += kPanel, out += 2 * kPanel) {
    prefetch_near(b);
    HEDDLE_UNROLL(8)
    for (int i = 0; i < kPanel; i += W) {
      const vi x = loadi(b + i);
      store(out + i, as_float(shl<16>(x)));
      store(out + kPanel + i, as_float(andi(x, set1i(static_cast<int32_t>(0xffff0000u)))));
    }
  }
}

// Integer weights without an integer dot product: bytes and nibbles widened to floats in registers, operand
// Operand::kIntFloat. Exact products; sums rounded as fp32.
HEDDLE_INLINE vf byte_of(vi quad, int i) {
  switch (i) {
    case 0: return to_float(sra<24>(shl<24>(quad)));
    case 1: return to_float(sra<24>(shl<16>(quad)));
    case 2: return to_float(sra<24>(shl<8>(quad)));
    default: return to_float(sra<24>(quad));
  }
}

// Twice the E2M1 value of the code in the low 4 bits of each lane; the bits above are ignored.
template <class V>
HEDDLE_INLINE vf doubled_e2m1(V code) {
#if defined(HEDDLE_TARGET_X86)
  if constexpr (sizeof(V) == 64) {
    return _mm512_permutexvar_ps(code, _mm512_setr_ps(0, 1, 2, 3, 4, 6, 8, 12, -0.0f, -1, -2, -3, -4, -6, -8, -12));
  } else if constexpr (sizeof(V) == 32) {  // the permutation reads 3 bits
    const vf v = _mm256_permutevar8x32_ps(_mm256_setr_ps(0, 1, 2, 3, 4, 6, 8, 12), code);
    return as_float(xori(as_int(v), andi(shl<28>(code), set1i(INT32_MIN))));
  }
#endif
  const vi t = andi(code, set1i(7));
  const vi over6 = maxi(subi(t, set1i(6)), set1i(0));
  const vi v = addi(addi(t, maxi(subi(t, set1i(4)), set1i(0))), addi(over6, over6));
  const vf f = to_float(v);
  return select(eqi(andi(code, set1i(8)), set1i(8)), neg(f), f);
}

template <PackType type>
HEDDLE_INLINE vf nibble_of(vi quad, int i) {
  vi code;
  switch (i) {  // byte i % 4, low nibble for i < 4
    case 0: code = quad; break;
    case 1: code = srl<8>(quad); break;
    case 2: code = srl<16>(quad); break;
    case 3: code = srl<24>(quad); break;
    case 4: code = srl<4>(quad); break;
    case 5: code = srl<12>(quad); break;
    case 6: code = srl<20>(quad); break;
    default: code = srl<28>(quad); break;
  }
  if constexpr (type == PackType::kInt4) return to_float(andi(code, set1i(15)));
  return doubled_e2m1(code);
}

template <int MR, PackType type>
void tile_int(const TileCall& t) {
  constexpr int U = half_vectors<(MR < 3 ? 3 : MR)>();
  constexpr int unit = type == PackType::kInt8 ? 4 : 8;
  const float* HEDDLE_RESTRICT a = static_cast<const float*>(t.a);
  const int64_t per_group = t.group_steps ? t.group_steps : t.steps;
  for (int c0 = 0; c0 < kHalfPanel; c0 += U * W) {
    const int32_t* HEDDLE_RESTRICT b = static_cast<const int32_t*>(t.b) + c0;
    for (int m = 0; m < MR; ++m) {
      for (int u = 0; u < U; ++u) {
        store(t.c + m * kPanel + c0 + u * W, set1(0.0f));
        store(t.c + m * kPanel + c0 + kHalfPanel + u * W, set1(0.0f));
      }
    }
    for (int64_t s0 = 0, g = 0; s0 < t.steps; s0 += per_group, ++g) {
      const int64_t s1 = s0 + per_group < t.steps ? s0 + per_group : t.steps;
      vf acc[MR][2 * U];
      HEDDLE_UNROLL(8)
      for (int u = 0; u < 2 * U; ++u) {
        vf zero = set1(0.0f);  // int4: nibbles multiply as they are; zero point * sum(x) starts the chain, all integers
        if constexpr (type == PackType::kInt4) {
          zero = set1(-8.0f);
          if (t.b_zero) {
            float z[W];
            for (int i = 0; i < W; ++i) z[i] = -static_cast<float>(t.b_zero[g * kPanel + column_of<U>(c0, u) + i]);
            zero = load(z);
          }
        }
        HEDDLE_UNROLL(16)
        for (int m = 0; m < MR; ++m) {
          acc[m][u] = type == PackType::kInt4 ? mul(zero, set1(static_cast<float>(t.a_sum[g * MR + m]))) : zero;
        }
      }
      for (int64_t s = s0; s < s1; ++s) {
        if (c0 == 0 && (s & 1) == 0) prefetch_steps<2>(t, static_cast<const char*>(t.b), s);
        vi quad[2 * U];
        HEDDLE_UNROLL(8)
        for (int u = 0; u < U; ++u) {
          quad[u] = loadi(b + s * kPanel + u * W);
          quad[U + u] = loadi(b + s * kPanel + kHalfPanel + u * W);
        }
        HEDDLE_UNROLL(8)
        for (int i = 0; i < unit; ++i) {
          vf bv[2 * U];
          HEDDLE_UNROLL(8)
          for (int u = 0; u < 2 * U; ++u) {
            if constexpr (type == PackType::kInt8) bv[u] = byte_of(quad[u], i); else bv[u] = nibble_of<type>(quad[u], i);
          }
          HEDDLE_UNROLL(16)
          for (int m = 0; m < MR; ++m) {
            const float* av = &a[(s * unit + i) * MR + m];
            HEDDLE_UNROLL(8)
            for (int u = 0; u < 2 * U; ++u) acc[m][u] = fma_broadcast(av, bv[u], acc[m][u]);
          }
        }
      }
      for (int u = 0; u < 2 * U; ++u) {
        const int column = column_of<U>(c0, u);
        vf scale;
        if constexpr (type == PackType::kMxfp4) {
          int32_t e[W];
          for (int i = 0; i < W; ++i) e[i] = e8m0_half(t.b_exponent[g * kPanel + column + i]);
          scale = as_float(loadi(e));
        } else {
          scale = load(t.b_scale + g * kPanel + column);
        }
        for (int m = 0; m < MR; ++m) {
          float* c = t.c + m * kPanel + column;
          store(c, fma(mul(acc[m][u], set1(t.a_scale[g * MR + m])), scale, load(c)));
        }
      }
    }
  }
}

// E4M3 in byte i of a quad: the byte moved to the top and shifted right by 4 with its sign puts the exponent in the
// float's field with bias 7 instead of 127; 2^120 makes up for it. Exact for every code, subnormals included.
HEDDLE_INLINE vf e4m3_of(vi quad, int i) {
  const vi top = i == 0 ? shl<24>(quad) : i == 1 ? shl<16>(quad) : i == 2 ? shl<8>(quad) : quad;
  return mul(as_float(andi(sra<4>(top), set1i(static_cast<int32_t>(0x87f00000u)))), set1(0x1p120f));
}

static void widen_f8_steps(const char* from, int64_t steps, float* out) {
  const int32_t* b = reinterpret_cast<const int32_t*>(from);
  for (int64_t s = 0; s < steps; ++s, b += kPanel, out += 4 * kPanel) {
    prefetch_near(b);
    for (int i = 0; i < kPanel; i += W) {
      const vi quad = loadi(b + i);
      HEDDLE_UNROLL(4)
      for (int j = 0; j < 4; ++j) store(out + j * kPanel + i, e4m3_of(quad, j));
    }
  }
}

// float8 weights decoded in registers, fp32 activations [K][rows]; a block of 128 k is one chain, scaled at its end.
template <int MR>
void tile_f8(const TileCall& t) {
  constexpr int U = half_vectors<(MR < 3 ? 3 : MR)>();
  const float* HEDDLE_RESTRICT a = static_cast<const float*>(t.a);
  for (int c0 = 0; c0 < kHalfPanel; c0 += U * W) {
    const int32_t* HEDDLE_RESTRICT b = static_cast<const int32_t*>(t.b) + c0;
    for (int64_t s0 = 0, g = 0; s0 < t.steps; s0 += t.group_steps, ++g) {
      const int64_t s1 = s0 + t.group_steps < t.steps ? s0 + t.group_steps : t.steps;
      vf acc[MR][2 * U];
      HEDDLE_UNROLL(16)
      for (int m = 0; m < MR; ++m) {
        HEDDLE_UNROLL(8)
        for (int u = 0; u < 2 * U; ++u) acc[m][u] = set1(0.0f);
      }
      for (int64_t s = s0; s < s1; ++s) {
        if (c0 == 0 && (s & 1) == 0) prefetch_steps<2>(t, static_cast<const char*>(t.b), s);
        vi quad[2 * U];
        HEDDLE_UNROLL(8)
        for (int u = 0; u < U; ++u) {
          quad[u] = loadi(b + s * kPanel + u * W);
          quad[U + u] = loadi(b + s * kPanel + kHalfPanel + u * W);
        }
        HEDDLE_UNROLL(4)
        for (int i = 0; i < 4; ++i) {
          vf bv[2 * U];
          HEDDLE_UNROLL(8)
          for (int u = 0; u < 2 * U; ++u) bv[u] = e4m3_of(quad[u], i);
          HEDDLE_UNROLL(16)
          for (int m = 0; m < MR; ++m) {
            const float* av = &a[(s * 4 + i) * MR + m];
            HEDDLE_UNROLL(8)
            for (int u = 0; u < 2 * U; ++u) acc[m][u] = fma_broadcast(av, bv[u], acc[m][u]);
          }
        }
      }
      for (int u = 0; u < 2 * U; ++u) {
        const int column = column_of<U>(c0, u);
        const vf scale = load(t.b_scale + g * kPanel + column);
        for (int m = 0; m < MR; ++m) {
          float* c = t.c + m * kPanel + column;
          store(c, g == 0 ? mul(acc[m][u], scale) : fma(acc[m][u], scale, load(c)));
        }
      }
    }
  }
}

// Largest tile: accumulators + 2 panel vectors + 1 broadcast fit the register file. On avx512 the broadcast is
// folded into the FMA's memory operand, which leaves room for 14 x 2.
constexpr int kTileRows = W == 16 ? 14 : W == 8 ? 6 : W == 4 ? 6 : 4;

template <int MR>
struct F32Kernel {
  static void run(const TileCall& t) { tile_f32<MR>(t); }
};
template <int MR>
struct Bf16Kernel {
  static void run(const TileCall& t) { tile_bf16<MR>(t); }
};
template <int MR>
struct Int8Kernel {
  static void run(const TileCall& t) { tile_int<MR, PackType::kInt8>(t); }
};
template <int MR>
struct Int4Kernel {
  static void run(const TileCall& t) { tile_int<MR, PackType::kInt4>(t); }
};
template <int MR>
struct Mxfp4Kernel {
  static void run(const TileCall& t) { tile_int<MR, PackType::kMxfp4>(t); }
};

template <int MR>
struct ScaledKernel {
  static void run(const TileCall& t) { tile_f32<MR, true>(t); }
};
template <int MR>
struct F8Kernel {
  static void run(const TileCall& t) { tile_f8<MR>(t); }
};

HEDDLE_INLINE TileKernels with_widened(TileKernels t, void (*widen)(const char*, int64_t, float*), const TileKernels& widened) {
  t.widen = widen;
  t.widened = &widened;
  return t;
}

const TileKernels& region_kernels(PackType type) {
  static const TileKernels f32 = make_kernels<F32Kernel, kTileRows>();
  static const TileKernels bf16 = with_widened(make_kernels<Bf16Kernel, kTileRows>(), widen_bf16_steps, f32);
  static const TileKernels int8 = make_kernels<Int8Kernel, kTileRows>();
  static const TileKernels int4 = make_kernels<Int4Kernel, kTileRows>();
  static const TileKernels mxfp4 = make_kernels<Mxfp4Kernel, kTileRows>();
  static const TileKernels scaled = make_kernels<ScaledKernel, kTileRows>();
  static const TileKernels f8 = with_widened(make_kernels<F8Kernel, kTileRows>(), widen_f8_steps, scaled);
  switch (type) {
    case PackType::kFloat8: return f8;
    case PackType::kBFloat16: return bf16;
    case PackType::kInt8: return int8;
    case PackType::kInt4: return int4;
    case PackType::kMxfp4: return mxfp4;
    default: return f32;
  }
}
