// Integer tiles on sdot (4 k, 4 columns) or, with kMatrix, smmla (8 k, 2 rows x 2 columns). See neon_dot.cpp.
// Integer sums are exact, so both give the same bits.

#include "gemm/kernels-inl.h"

struct Quads {
  int8x16_t low, high;  // 4 columns each: k 0..3 and k 4..7
};

// Four columns of one run of 8 k: two steps of int8 (the second may lie beyond the end), or the nibbles of one.
template <PackType type>
HEDDLE_INLINE Quads load_quads(const char* b, bool pair) {
  if (type == PackType::kInt8) {
    const int8x16_t first = vld1q_s8(reinterpret_cast<const int8_t*>(b));
    return {first, pair ? vld1q_s8(reinterpret_cast<const int8_t*>(b) + kStepBytes) : vdupq_n_s8(0)};
  }
  const uint8x16_t w = vld1q_u8(reinterpret_cast<const uint8_t*>(b));
  const uint8x16_t low = vandq_u8(w, vdupq_n_u8(15)), high = vshrq_n_u8(w, 4);
  if (type == PackType::kInt4) return {vreinterpretq_s8_u8(low), vreinterpretq_s8_u8(high)};
  // 2 * E2M1 by code.
  const int8_t values[16] = {0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12};
  const int8x16_t table = vld1q_s8(values);
  return {vqtbl1q_s8(table, low), vqtbl1q_s8(table, high)};
}

template <PackType type>
HEDDLE_INLINE float32x4_t column_scale(const TileCall& t, int64_t at) {
  if (type != PackType::kMxfp4) return vld1q_f32(t.b_scale + at);
  int32_t e[4];
  for (int i = 0; i < 4; ++i) e[i] = e8m0_half(t.b_exponent[at + i]);
  return vreinterpretq_f32_s32(vld1q_s32(e));
}

template <int MR, PackType type>
void tile_integer(const TileCall& t) {
  constexpr int kVectors = 4;  // 16 columns at once: 6 rows take 24 accumulators
  constexpr bool kPairs = kMatrix && MR > 1;
  constexpr int kRuns = type == PackType::kInt8 ? 2 : 1;  // steps per run of 8 k
  const int32_t* HEDDLE_RESTRICT a = static_cast<const int32_t*>(t.a);
  const int64_t per_group = t.group_steps ? t.group_steps : t.steps;
  for (int c0 = 0; c0 < kPanel; c0 += 4 * kVectors) {
    const char* HEDDLE_RESTRICT b = static_cast<const char*>(t.b) + c0 * 4;
    for (int m = 0; m < MR; ++m) {
      for (int j = 0; j < kVectors; ++j) vst1q_f32(t.c + m * kPanel + c0 + 4 * j, vdupq_n_f32(0.0f));
    }
    for (int64_t s0 = 0, g = 0; s0 < t.steps; s0 += per_group, ++g) {
      const int64_t s1 = s0 + per_group < t.steps ? s0 + per_group : t.steps;
      // sdot: [row][vector]. smmla: [row pair][2 * vector + half], lanes (row 0, row 1) x (column 0, column 1).
      constexpr int kRowsOfAcc = kPairs ? (MR + 1) / 2 : MR, kAcc = kPairs ? 2 * kVectors : kVectors;
      int32x4_t acc[kRowsOfAcc][kAcc];
      HEDDLE_UNROLL(8)
      for (int m = 0; m < kRowsOfAcc; ++m) {
        HEDDLE_UNROLL(8)
        for (int j = 0; j < kAcc; ++j) acc[m][j] = vdupq_n_s32(0);
      }
      for (int64_t s = s0; s < s1; s += kRuns) {
        if (c0 == 0 && (s & 1) == 0) prefetch_steps<2>(t, b, s);
        const bool pair = kRuns == 1 || s + 1 < s1;
        const int32_t* x = a + (kRuns == 1 ? 2 * s : s) * MR;
        Quads w[kVectors];
        HEDDLE_UNROLL(4)
        for (int j = 0; j < kVectors; ++j) w[j] = load_quads<type>(b + s * kStepBytes + 16 * j, pair);
        if constexpr (kPairs) {
          int8x16_t columns[kAcc];  // 2 columns of 8 k
          HEDDLE_UNROLL(4)
          for (int j = 0; j < kVectors; ++j) {
            const int32x4_t l = vreinterpretq_s32_s8(w[j].low), h = vreinterpretq_s32_s8(w[j].high);
            columns[2 * j] = vreinterpretq_s8_s32(vzip1q_s32(l, h));
            columns[2 * j + 1] = vreinterpretq_s8_s32(vzip2q_s32(l, h));
          }
          HEDDLE_UNROLL(8)
          for (int m = 0; m < kRowsOfAcc; ++m) {
            const bool two = 2 * m + 1 < MR;
            const int32_t row[4] = {x[2 * m], pair ? x[MR + 2 * m] : 0, two ? x[2 * m + 1] : 0,
                                    two && pair ? x[MR + 2 * m + 1] : 0};
            const int8x16_t rows = vreinterpretq_s8_s32(vld1q_s32(row));
            HEDDLE_UNROLL(8)
            for (int j = 0; j < kAcc; ++j) acc[m][j] = multiply_pairs(acc[m][j], rows, columns[j]);
          }
        } else {
          HEDDLE_UNROLL(8)
          for (int m = 0; m < MR; ++m) {
            const int8x16_t low = vreinterpretq_s8_s32(vdupq_n_s32(x[m]));
            const int8x16_t high = vreinterpretq_s8_s32(vdupq_n_s32(pair ? x[MR + m] : 0));
            HEDDLE_UNROLL(4)
            for (int j = 0; j < kVectors; ++j) acc[m][j] = vdotq_s32(vdotq_s32(acc[m][j], w[j].low, low), w[j].high, high);
          }
        }
      }
      HEDDLE_UNROLL(4)
      for (int j = 0; j < kVectors; ++j) {
        const int64_t at = g * kPanel + c0 + 4 * j;
        const float32x4_t scale = column_scale<type>(t, at);
        int32x4_t zero = vdupq_n_s32(8);
        if (type == PackType::kInt4 && t.b_zero) {
          const int32_t z[4] = {t.b_zero[at], t.b_zero[at + 1], t.b_zero[at + 2], t.b_zero[at + 3]};
          zero = vld1q_s32(z);
        }
        HEDDLE_UNROLL(8)
        for (int m = 0; m < MR; ++m) {
          int32x4_t sum;
          if constexpr (kPairs) {
            const int32x4_t left = acc[m / 2][2 * j], right = acc[m / 2][2 * j + 1];
            sum = m % 2 ? vcombine_s32(vget_high_s32(left), vget_high_s32(right))
                        : vcombine_s32(vget_low_s32(left), vget_low_s32(right));
          } else {
            sum = acc[m][j];
          }
          if (type == PackType::kInt4) sum = vmlsq_s32(sum, zero, vdupq_n_s32(t.a_sum[g * MR + m]));
          float* c = t.c + m * kPanel + c0 + 4 * j;
          const float32x4_t v = vmulq_n_f32(vcvtq_f32_s32(sum), t.a_scale[g * MR + m]);
          vst1q_f32(c, vfmaq_f32(vld1q_f32(c), v, scale));
        }
      }
    }
  }
}

template <PackType type>
struct Integer {
  template <int MR>
  struct Kernel {
    static void run(const TileCall& t) { tile_integer<MR, type>(t); }
  };
};

const TileKernels& dot_kernels(PackType type) {
  static const TileKernels int8 = make_kernels<Integer<PackType::kInt8>::Kernel, 6>();
  static const TileKernels int4 = make_kernels<Integer<PackType::kInt4>::Kernel, 6>();
  static const TileKernels mxfp4 = make_kernels<Integer<PackType::kMxfp4>::Kernel, 6>();
  return type == PackType::kInt8 ? int8 : type == PackType::kInt4 ? int4 : mxfp4;
}
