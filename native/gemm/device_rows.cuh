// Rows as operands of grouped products (device_matrix.h): rounded, split or quantised, padded with zeros. A block
// takes a row, so that its bits depend on nothing else.
#pragma once
#include "cuda/warp.cuh"
#include "gemm/device_kinds.cuh"
#include "gemm/device_product.h"

namespace heddle {

constexpr int kRowThreads = 128;

// How a run with these extremes is quantised: int8 = round(v * inverse), v = int8 * scale. A NaN or infinity makes the
// scale NaN.
struct RunScale {
  float inverse, scale;
};
__device__ __forceinline__ RunScale scale_run(float largest, bool finite) {
  const float inverse = finite && largest > 0.0f ? 127.0f / largest : 0.0f;
  return {inverse < HUGE_VALF ? inverse : 0.0f, finite ? largest / 127.0f : __uint_as_float(0x7fc00000u)};
}
__device__ __forceinline__ int quantize(float v, float inverse) {
  return inverse > 0.0f ? static_cast<int>(rintf(v * inverse)) : 0;
}
__device__ __forceinline__ bool is_finite(float v) { return fabsf(v) < HUGE_VALF; }

// The three bf16 whose sum is v: cut off, so that none overflows.
__device__ __forceinline__ void split_bf16(float v, uint16_t (&part)[3]) {
#pragma unroll
  for (int i = 0; i < 3; ++i) {
    part[i] = static_cast<uint16_t>(__float_as_uint(v) >> 16);
    const float left = v - widen_bf16(part[i]);
    v = is_finite(left) ? left : 0.0f;
  }
}

template <class K>
__global__ void __launch_bounds__(kRowThreads) operand_rows_kernel(RowsToOperand r) {
  const int64_t row = blockIdx.x;
  if (r.count && row >= *r.count) return;
  const int64_t base = row * r.pitch;
  char* to = r.to + row * r.steps * K::kRowBytes;
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  auto value = [&](int64_t k) { return k < r.width ? load_as_float(r.from, r.type, base + k) : 0.0f; };
  const int64_t depth = r.steps * K::kStep;
  if constexpr (K::kType == PackType::kFloat32) {
    for (int64_t k = threadIdx.x; k < depth; k += kRowThreads) reinterpret_cast<float*>(to)[k] = value(k);
  } else if constexpr (K::kType == PackType::kBFloat16) {
    for (int64_t k = 2 * threadIdx.x; k < depth; k += 2 * kRowThreads) {
      reinterpret_cast<uint32_t*>(to)[k / 2] = pack_bf16(value(k), value(k + 1));
    }
  } else if constexpr (K::kFloat8) {
    for (int64_t k = 2 * threadIdx.x; k < depth; k += 2 * kRowThreads) {
      uint16_t low[3], high[3];
      split_bf16(value(k), low);
      split_bf16(value(k + 1), high);
      char* step = to + k / K::kStep * K::kRowBytes + k % K::kStep * 2;
#pragma unroll
      for (int i = 0; i < 3; ++i) *reinterpret_cast<uint32_t*>(step + i * 64) = low[i] | static_cast<uint32_t>(high[i]) << 16;
    }
  } else if constexpr (K::kType == PackType::kInt8) {
    __shared__ float words[kRowThreads / kWarp];
    float largest = 0.0f, odd = 0.0f;
    for (int64_t k = threadIdx.x; k < r.width; k += kRowThreads) {
      const float v = value(k);
      largest = fmaxf(largest, fabsf(v));
      if (!is_finite(v)) odd = 1.0f;
    }
    largest = block_max<kRowThreads>(largest, words);
    odd = block_max<kRowThreads>(odd, words);
    const RunScale s = scale_run(largest, odd == 0.0f);
    for (int64_t k = 4 * threadIdx.x; k < depth; k += 4 * kRowThreads) {
      uint32_t q = 0;
#pragma unroll
      for (int i = 0; i < 4; ++i) q |= (static_cast<uint32_t>(quantize(value(k + i), s.inverse)) & 255u) << (8 * i);
      reinterpret_cast<uint32_t*>(to)[k / 4] = q;
    }
    if (threadIdx.x == 0) r.scale[row] = s.scale;
  } else {
    // A warp takes 64 values, or the 128 of a group; a lane has neighbours 2 lane and 2 lane + 1 of each 64. Groups of 32
    // are halves of a warp.
    const int count = r.group == 128 ? 2 : 1;
    for (int64_t step = static_cast<int>(threadIdx.x) / kWarp * count; step < r.steps; step += kRowThreads / kWarp * count) {
      float v[2][2] = {};
      float largest = 0.0f;
      int odd = 0;
      for (int s = 0; s < count; ++s) {
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          v[s][i] = value((step + s) * 64 + 2 * lane + i);
          largest = fmaxf(largest, fabsf(v[s][i]));
          odd |= !is_finite(v[s][i]);
        }
      }
      for (int offset = K::kSmall ? 8 : 16; offset > 0; offset /= 2) {
        largest = fmaxf(largest, __shfl_xor_sync(kFullMask, largest, offset));
        odd |= __shfl_xor_sync(kFullMask, odd, offset);
      }
      const RunScale run = scale_run(largest, odd == 0);
      for (int s = 0; s < count; ++s) {
        const int low = quantize(v[s][0], run.inverse), high = quantize(v[s][1], run.inverse);
        int sum = low + high;
        for (int offset = K::kSmall ? 8 : 16; offset > 0; offset /= 2) sum += __shfl_xor_sync(kFullMask, sum, offset);
        char* at = to + (step + s) * K::kRowBytes;
        reinterpret_cast<uint16_t*>(at)[lane] = static_cast<uint16_t>((low & 255) | (high & 255) << 8);
        if (lane % 16 == 0) {
          auto* meta = reinterpret_cast<float*>(at + 64);
          meta[lane / 16] = run.scale;
          meta[2 + lane / 16] = static_cast<float>(sum);
        }
      }
    }
  }
}

template <class K>
int64_t operand_rows(const RowsToOperand& r, heddle_cuda_job& job) {
  if (r.rows == 0) return kOk;
  HEDDLE_LAUNCH((operand_rows_kernel<K>), dim3(static_cast<unsigned>(r.rows)), dim3(kRowThreads), 0, job.stream, r);
  return job.launched();
}

}  // namespace heddle
