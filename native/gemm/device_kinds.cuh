// The weight types of products on the device: what a stage of the pipeline holds and how a warp multiplies it. The
// weights are the operand A (16 outputs), the rows the operand B (8 of them): one fragment serves one row and many.
#pragma once
#include "cuda/matrix.cuh"
#include "gemm/device_matrix.h"

namespace heddle {

// Small: int4 and MXFP4 with groups of 32, two in a step. Points: int4 with zero points.
template <PackType P, bool Small = false, bool Points = false>
struct WeightKind {
  static constexpr PackType kType = P;
  static constexpr bool kSmall = Small, kPoints = Points;
  static constexpr bool kFourBits = P == PackType::kInt4 || P == PackType::kMxfp4;
  static constexpr bool kInteger = kFourBits || P == PackType::kInt8;  // quantised activations
  static constexpr bool kFloat8 = P == PackType::kFloat8;
  static constexpr int kStep = static_cast<int>(kImageStep[static_cast<int>(P)]);
  static constexpr int kCodeBytes = static_cast<int>(kImageCodeBytes[static_cast<int>(P)]);
  static constexpr int kRowBytes = static_cast<int>(kImageRowBytes[static_cast<int>(P)]);
  static constexpr int kPlanes = kFloat8 ? 3 : 1;
  static constexpr int kGroups = kFourBits ? (Small ? 2 : 1) : kFloat8 ? 1 : 0;  // groups of scales in a step
  static constexpr int kScaleBytes = kGroups * (P == PackType::kMxfp4 ? 16 : 64);  // of a tile
  static constexpr int kPointBytes = Points ? kGroups * 16 : 0;
  using Sum = std::conditional_t<P == PackType::kInt8, int32_t, float>;
};

// A stage: `Tiles` tiles of 16 outputs and `Rows` rows.
template <class K, int Tiles, int Rows>
struct ProductStage {
  static constexpr int kScales = Tiles * K::kCodeBytes;
  static constexpr int kPoints = kScales + Tiles * K::kScaleBytes;
  static constexpr int kRows = kPoints + Tiles * K::kPointBytes;
  static constexpr int kMeta = kRows + Rows * 64 * K::kPlanes;
  static constexpr int kBytes = kMeta + (K::kFourBits ? Rows * 16 : 0);
};

// Where 16-byte chunk c of a row lies: eight rows of the same c in eight different bank groups.
__device__ __forceinline__ int row_chunk(int row, int c) { return row * 64 + ((c ^ (row >> 1 & 3)) << 4); }

// Two bf16 of E4M3 codes in the high bytes of v's halves. The codes' bits, shifted into place, are the value times 2^-120,
// subnormal numbers included.
__device__ __forceinline__ uint32_t widen_e4m3(uint32_t v) {
  return scale_bf16x2((v & 0x80008000u) | ((v & 0x7f007f00u) >> 4));
}

// Four E2M1 codes in the low half of v as 2 * value in int8: lookup of three bits among positive and among negative
// values, chosen by the fourth.
__device__ __forceinline__ uint32_t widen_e2m1(uint32_t v) {
  const uint32_t index = v & 0x7777u;
  const uint32_t positive = permute_bytes(0x03020100u, 0x0c080604u, index);
  const uint32_t negative = permute_bytes(0xfdfeff00u, 0xf4f8fafcu, index);
  const uint32_t sign = permute_bytes(v << 4, v, 0xd9c8u);  // nibble i's top bit over byte i
  return (positive & ~sign) | (negative & sign);
}

// The operand A of a tile's step in registers: two fragments.
template <class K>
__device__ __forceinline__ void load_weights(uint32_t (&w)[2][4], const char* codes, int lane) {
  if constexpr (K::kCodeBytes == 1024) {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const uint4 v = *reinterpret_cast<const uint4*>(codes + h * 512 + lane * 16);
      w[h][0] = v.x, w[h][1] = v.y, w[h][2] = v.z, w[h][3] = v.w;
    }
  } else {
    const uint4 v = *reinterpret_cast<const uint4*>(codes + lane * 16);
    const uint32_t words[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      uint32_t& even = w[i / 2][i % 2 * 2];
      uint32_t& odd = w[i / 2][i % 2 * 2 + 1];
      if constexpr (K::kType == PackType::kInt4) {
        even = words[i] << 4 & 0xf0f0f0f0u;  // 16 times the code
        odd = words[i] & 0xf0f0f0f0u;
      } else if constexpr (K::kType == PackType::kMxfp4) {
        even = widen_e2m1(words[i]);
        odd = widen_e2m1(words[i] >> 16);
      } else {
        even = widen_e4m3(words[i] << 8);
        odd = widen_e4m3(words[i]);
      }
    }
  }
}

// 2^(code - 127) / 2: MXFP4's weights are multiplied by 2 to be integers.
__device__ __forceinline__ float half_power(uint32_t code) {
  return (code == 0 ? __uint_as_float(0x00400000u) : __uint_as_float(code << 23)) * 0.5f;
}

// Integer products start from this float's bits: the sum is then read as a float by one subtraction. |sum| < 2^22: a
// fold's 64 products of at most 128 * 127.
constexpr int32_t kMagicBits = 0x4b400000;
constexpr float kMagic = 12582912.0f;

// sums += one step of M tiles times N * 8 rows, from row `first`. In each sum k ascends whatever M and N.
template <class K, class Stage, int M, int N>
__device__ __forceinline__ void multiply_step(typename K::Sum (&sums)[M][N][4], const char* stage, int tile, int first,
                                              int lane) {
  const int g = lane / 4, t = lane % 4;
  const char* rows = stage + Stage::kRows;
  if constexpr (K::kType == PackType::kFloat32) {
    const auto* w = reinterpret_cast<const float*>(stage + tile * K::kCodeBytes) + g;
#pragma unroll 1
    for (int c = 0; c < 4; ++c) {
      float v[4][M][2];
#pragma unroll
      for (int i = 0; i < 4 * M * 2; ++i) v[i / 2 % 4][i / 8][i % 2] = w[i / 8 * 256 + (c * 4 + i / 2 % 4) * 16 + i % 2 * 8];
#pragma unroll
      for (int n = 0; n < N; ++n) {
        const int row = first + n * 8 + 2 * t;
        const float4 x = *reinterpret_cast<const float4*>(rows + row_chunk(row, c));
        const float4 y = *reinterpret_cast<const float4*>(rows + row_chunk(row + 1, c));
        const float xs[2][4] = {{x.x, x.y, x.z, x.w}, {y.x, y.y, y.z, y.w}};
#pragma unroll
        for (int i = 0; i < 4 * M * 4; ++i) {
          float& s = sums[i / 16][n][i % 4];
          s = fmaf(v[i / 4 % 4][i / 16][i % 4 / 2], xs[i % 2][i / 4 % 4], s);
        }
      }
    }
    return;
  } else {
    uint32_t w[M][2][4];
#pragma unroll
    for (int m = 0; m < M; ++m) load_weights<K>(w[m], stage + (tile + m) * K::kCodeBytes, lane);
    float scale[M][2][2];  // by group and half of the tile
    if constexpr (K::kGroups > 0) {
#pragma unroll
      for (int i = 0; i < M * K::kGroups * 2; ++i) {
        const int m = i / 2 / K::kGroups, group = i / 2 % K::kGroups, at = ((tile + m) * K::kGroups + group) * 16 + g + i % 2 * 8;
        if constexpr (K::kType == PackType::kMxfp4) {
          scale[m][group][i % 2] = half_power(reinterpret_cast<const uint8_t*>(stage + Stage::kScales)[at]);
        } else {
          const float s = reinterpret_cast<const float*>(stage + Stage::kScales)[at];
          scale[m][group][i % 2] = K::kFourBits ? s * 0.0625f : s;
        }
      }
    }
#pragma unroll
    for (int n = 0; n < N; ++n) {
      const int row = first + n * 8;
      const int chunk = row_chunk(row + lane % 8, lane / 8);
      if constexpr (K::kFloat8) {
        float part[M][4] = {};
#pragma unroll
        for (int plane = 2; plane >= 0; --plane) {  // the smallest part first
          uint32_t x[4];
          ldmatrix_x4(x, rows + plane * ((Stage::kMeta - Stage::kRows) / 3) + chunk);
          const uint32_t low[2] = {x[0], x[1]}, high[2] = {x[2], x[3]};
#pragma unroll
          for (int m = 0; m < M; ++m) {
            mma_bf16(part[m], w[m][0], low);
            mma_bf16(part[m], w[m][1], high);
          }
        }
#pragma unroll
        for (int i = 0; i < M * 4; ++i) sums[i / 4][n][i % 4] = fmaf(part[i / 4][i % 4], scale[i / 4][0][i % 4 / 2], sums[i / 4][n][i % 4]);
      } else {
        uint32_t x[4];
        ldmatrix_x4(x, rows + chunk);
        const uint32_t low[2] = {x[0], x[1]}, high[2] = {x[2], x[3]};
        if constexpr (K::kType == PackType::kBFloat16) {
#pragma unroll
          for (int m = 0; m < M; ++m) {
            mma_bf16(sums[m][n], w[m][0], low);
            mma_bf16(sums[m][n], w[m][1], high);
          }
        } else if constexpr (K::kType == PackType::kInt8) {
#pragma unroll
          for (int m = 0; m < M; ++m) {
            mma_s8(sums[m][n], w[m][0], low);
            mma_s8(sums[m][n], w[m][1], high);
          }
        } else {
          const auto* meta = reinterpret_cast<const float4*>(stage + Stage::kMeta) + row + 2 * t;
          const float4 first_row = meta[0], second_row = meta[1];
          const float xs[2][2] = {{first_row.x, second_row.x}, {first_row.y, second_row.y}};  // by group, row
          const float xsum[2][2] = {{first_row.z, second_row.z}, {first_row.w, second_row.w}};
#pragma unroll
          for (int m = 0; m < M; ++m) {
#pragma unroll
            for (int group = 0; group < K::kGroups; ++group) {
              int32_t part[4] = {kMagicBits, kMagicBits, kMagicBits, kMagicBits};
              if (!K::kSmall || group == 0) mma_s8(part, w[m][0], low);
              if (!K::kSmall || group == 1) mma_s8(part, w[m][1], high);
              float value[4];
#pragma unroll
              for (int e = 0; e < 4; ++e) value[e] = __int_as_float(part[e]) - kMagic;
              if constexpr (K::kPoints) {  // read here, not kept: registers are scarce
                const char* at = stage + Stage::kPoints + ((tile + m) * K::kGroups + group) * 16 + g;
#pragma unroll
                for (int e = 0; e < 4; ++e) {
                  value[e] = fmaf(static_cast<float>(16 * (8 - at[e / 2 * 8])), xsum[group][e % 2], value[e]);
                }
              }
#pragma unroll
              for (int e = 0; e < 4; ++e) {
                sums[m][n][e] = fmaf(value[e] * xs[group][e % 2], scale[m][group][e / 2], sums[m][n][e]);
              }
            }
          }
        }
      }
    }
  }
}

}  // namespace heddle
