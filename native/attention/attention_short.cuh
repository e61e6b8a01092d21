// attention() for sequences of up to 64 keys in bf16 or fp16, head sizes up to 128: attention over the frames of a video,
// windows, and whatever else is short, in numbers of 10^4 to 10^6.
//
// A warp computes one (sequence, key head) alone, so a block serves several sequences and never waits as a whole: it
// copies its 64 query rows at most and all keys and values to its own shared memory in the background, 16 bytes at a
// time from wherever strides, order and prefix say, then takes 16 rows at a time: q k^T on the matrix cores, one softmax
// in registers (complete after one pass: nothing is rescaled), p v, and the results go back through the query rows'
// memory to 16-byte stores. Warps beside each other take heads beside each other, so that a token is read as a whole.
//
// The floor is memory. A head of T tokens of D elements moves 4 T D values (q, k, v, o) = 8 T D bytes and takes 4 T^2 D
// FLOP: T / 2 FLOP per byte, where an H100 has 295 (990 TFLOP/s over 3.35 TB/s). Time over T frames of 196 patches in a
// batch of B with 12 heads of 64: B T 196 x 12 x 64 x 8 B = 1.2 B T MB, so 23 us at B T = 64, whatever T is. A
// multiprocessor gets 14.5 bytes per cycle: 32 KB (T = 64, D = 64) in 2,260 cycles. Meanwhile its four schedulers have 256
// matrix instructions of about 7 cycles and 4,096 exponentials at 16 per cycle to do: 450 + 256 cycles, and about 2,000
// other warp instructions, 500 cycles, provided that other warps fill the waits of each. To keep 3.35 TB/s busy over 700 ns
// takes 18 KB in flight per multiprocessor; the warps below have 27 KB each at T = 64, of which 8 fit, and 7 KB each
// at T = 16, of which 16 fit (128 registers a thread). No second buffer is needed: one warp's copies run beside another's
// arithmetic.
//
// A row's bits depend on its own sequence alone, and which kernel computes it on the number of its keys alone. Values
// that are not finite meet only weights that are not 0, as attention.h promises. Not measured on a GPU yet.
#pragma once
#include "attention/attention_matrix.cuh"
#include "attention/attention_short_launch.h"

namespace heddle {

constexpr int kShortWarps = 4;

__device__ __forceinline__ bool find_short(const AttentionProblem& p, const ShortShape& shape, int64_t item,
                                           BlockRows* out) {
  if (item >= shape.items) return false;
  const auto heads = static_cast<uint32_t>(p.key_heads), place = static_cast<uint32_t>(item) / heads;
  out->key_head = static_cast<uint32_t>(item) - place * heads;
  if (shape.search) {
    if (!find_rows(p, kShortRows, place, out->key_head, out)) return false;
  } else {
    const uint32_t index = place / static_cast<uint32_t>(shape.each);
    out->sequence = sequence_of(p, index);
    out->count = out->sequence.queries * p.group();
    out->first = (place - index * static_cast<uint32_t>(shape.each)) * int64_t{kShortRows};
  }
  return out->first < out->count && out->sequence.keys <= kShortKeys;
}

// Rows of `dim` elements to shared memory [rows][Width + 8] by one warp, zeros up to Width; `start` gives a row's first
// element, or kNoLine for a row of zeros.
template <int Width, class Start>
__device__ __forceinline__ void load_rows(uint16_t* to, int rows, const void* from, int32_t dim, int64_t step,
                                          bool aligned, Start start) {
  constexpr int kChunks = Width / 8, kRowsPerStep = kWarp / kChunks;
  const auto* data = static_cast<const uint16_t*>(from);
  const int lane = static_cast<int>(threadIdx.x) % kWarp, column = lane % kChunks * 8;
  if (aligned) {
    const int left = dim - column, valid = left >= 8 ? 16 : left > 0 ? 2 * left : 0;
#pragma unroll 4
    for (int row = lane / kChunks; row < rows; row += kRowsPerStep) {
      const int64_t at = start(row);
      const bool any = at != kNoLine && left > 0;
      cp_async_16(to + row * (Width + 8) + column, any ? data + at + column : data, any ? valid : 0);
    }
  } else {
#pragma unroll 1
    for (int row = lane / kChunks; row < rows; row += kRowsPerStep) {
      const int64_t at = start(row);
      const int left = at == kNoLine ? 0 : dim - column;
      uint16_t* target = to + row * (Width + 8) + column;
#pragma unroll
      for (int i = 0; i < 8; ++i) target[i] = i < left ? data[at + (column + i) * step] : uint16_t{0};
    }
  }
}

// Whether any of [rows][Width] elements is infinite or NaN: the exponent's bits of a half word are all set.
template <DType T, int Width>
__device__ __forceinline__ bool any_infinite(const uint16_t* x, int rows) {
  constexpr uint32_t kExponent = T == DType::kBFloat16 ? 0x7f807f80u : 0x7c007c00u;
  constexpr int kChunks = Width / 8;
  uint32_t found = 0;
#pragma unroll 4
  for (int c = static_cast<int>(threadIdx.x) % kWarp; c < rows * kChunks; c += kWarp) {
    const uint4 four = *reinterpret_cast<const uint4*>(x + c / kChunks * (Width + 8) + c % kChunks * 8);
    for (const uint32_t word : {four.x, four.y, four.z, four.w}) {
      // A half that becomes 0 borrows into its top bit, which is 0 otherwise.
      found |= ((~word & kExponent) - 0x00010001u) & 0x80008000u;
    }
  }
  return __any_sync(kFullMask, found != 0);
}

template <DType T, int Width, int Keys>
__global__ void __launch_bounds__(kShortWarps* kWarp) attention_short_kernel(AttentionArgs a, ShortShape shape) {
  constexpr int kPitch = Width + 8;
  static_assert(kPitch >= Keys, "weights take the place of query rows");
  HEDDLE_DYNAMIC_SHARED(char, shared);
  const AttentionProblem& p = a.problem;
  const int warp = static_cast<int>(threadIdx.x) / kWarp, lane = static_cast<int>(threadIdx.x) % kWarp;
  const int g = lane / 4, t = lane % 4;
  BlockRows rows;
  if (!find_short(p, shape, int64_t{blockIdx.x} * (blockDim.x / kWarp) + warp, &rows)) return;
  auto* queries = reinterpret_cast<uint16_t*>(shared + warp * shape.warp_bytes);
  uint16_t* keys = queries + shape.rows * kPitch;
  uint16_t* values = keys + Keys * kPitch;
  auto* logits = reinterpret_cast<float*>(values + Keys * kPitch) + lane;
  const Sequence& s = rows.sequence;
  const int64_t key_head = rows.key_head;
  const auto group = static_cast<uint32_t>(p.group());
  const int count = static_cast<int>(rows.count - rows.first < kShortRows ? rows.count - rows.first : kShortRows);
  const int rows16 = (count + 15) / 16 * 16;
  auto position_of = [&](int r) -> int64_t { return (static_cast<uint32_t>(rows.first) + r) / group; };
  auto head_of = [&](int r) -> int64_t { return key_head * group + (static_cast<uint32_t>(rows.first) + r) % group; };

  load_rows<Width>(queries, rows16, p.query, p.head_dim, p.query_stride[3], shape.aligned, [&](int r) {
    return r < count ? p.query_at(s, position_of(r), head_of(r)) : kNoLine;
  });
  load_rows<Width>(keys, Keys, p.key, p.head_dim, p.key_stride[3], shape.aligned, [&](int j) {
    return j < s.keys ? p.key_at(s, j, key_head) : kNoLine;
  });
  load_rows<Width>(values, Keys, p.value, p.value_dim, p.value_stride[3], shape.aligned, [&](int j) {
    return j < s.keys ? p.value_at(s, j, key_head) : kNoLine;
  });
  cp_async_commit();
  const bool formed = has_transform(p);
  const float unit = formed ? kLog2OfE : p.scale * kLog2OfE;
  cp_async_wait<0>();
  __syncwarp();
  const bool broken = any_infinite<T, Width>(values, Keys);

#pragma unroll 1
  for (int tile = 0; tile < rows16; tile += 16) {
    uint16_t* own_rows = queries + tile * kPitch;
    // The lane's rows: g and g + 8 of the tile.
    int64_t position[2], head[2];
    int lo[2], hi[2];
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const int row = tile + g + 8 * r < count ? tile + g + 8 * r : count - 1;
      position[r] = position_of(row);
      head[r] = head_of(row);
      const KeyRange own = key_range(p, s, position[r]);
      lo[r] = static_cast<int>(own.lo);
      hi[r] = static_cast<int>(own.hi);
    }

    float z[Keys / 8][4] = {};
#pragma unroll
    for (int d = 0; d < Width; d += 16) {
      uint32_t x[4];
      ldmatrix_x4(x, own_rows + lane % 16 * kPitch + d + lane / 16 * 8);
#pragma unroll
      for (int n = 0; n < Keys / 16; ++n) {
        uint32_t y[4];
        ldmatrix_x4(y, keys + (n * 16 + lane / 16 * 8 + lane % 8) * kPitch + d + lane / 8 % 2 * 8);
        const uint32_t low[2] = {y[0], y[1]}, high[2] = {y[2], y[3]};
        mma_any<T>(z[2 * n], x, low);
        mma_any<T>(z[2 * n + 1], x, high);
      }
    }
    if (formed) {
      // By way of shared memory, so that the code for one logit stands here once instead of once per register.
#pragma unroll
      for (int i = 0; i < Keys / 2; ++i) logits[i * kWarp] = z[i / 4][i % 4];
#pragma unroll 1
      for (int i = 0; i < Keys / 2; ++i) {
        const int second = i % 4 / 2;
        const int64_t at = second ? position[1] : position[0], h = second ? head[1] : head[0];
        const KeyRange range{second ? lo[1] : lo[0], second ? hi[1] : hi[0]};
        const int64_t key = i / 4 * 8 + 2 * t + i % 2;
        float* logit = logits + i * kWarp;
        *logit = sees(p, s, at, h, range, key) ? logit_of(p, s, at, h, key, *logit, nullptr) : kNegInf;
      }
#pragma unroll
      for (int i = 0; i < Keys / 2; ++i) z[i / 4][i % 4] = logits[i * kWarp];
    } else {
      const int from = lo[0] > lo[1] ? lo[0] : lo[1], to = hi[0] < hi[1] ? hi[0] : hi[1];
#pragma unroll
      for (int n = 0; n < Keys / 8; ++n) {
        if (n * 8 >= from && n * 8 + 8 <= to) continue;
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          const int key = n * 8 + 2 * t + e % 2;
          if (key < lo[e / 2] || key >= hi[e / 2]) z[n][e] = kNegInf;
        }
      }
    }
    float m[2], total[2];
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      float top = kNegInf;
#pragma unroll
      for (int n = 0; n < Keys / 8; ++n) top = fmaxf(top, fmaxf(z[n][2 * r], z[n][2 * r + 1]));
      top = fmaxf(top, __shfl_xor_sync(kFullMask, top, 1));
      top = fmaxf(top, __shfl_xor_sync(kFullMask, top, 2));
      m[r] = fmaxf(kNegInf, top * unit);
      const float base = m[r] == kNegInf ? 0.0f : m[r];
      float sum = 0.0f;
#pragma unroll
      for (int n = 0; n < Keys / 8; ++n) {
#pragma unroll
        for (int e = 2 * r; e < 2 * r + 2; ++e) {
          z[n][e] = z[n][e] == kNegInf ? 0.0f : exp2f(fmaf(z[n][e], unit, -base));
          sum += z[n][e];
        }
      }
      sum += __shfl_xor_sync(kFullMask, sum, 1);
      sum += __shfl_xor_sync(kFullMask, sum, 2);
      total[r] = sum;
    }

    float out[Width / 8][4] = {};
    if (!broken) {
      add_weighted<T, Keys, Width>(out, z, values, lane);
    } else {
      __syncwarp();
      add_weighted_each<T, Keys, Width, kPitch>(out, z, values, own_rows, lane);
    }

    __syncwarp();  // the tile's query rows are read: its results take their place
    RowEnd end[2];
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      end[r] = end_row(p, head[r], m[r], total[r]);
      if (tile + g + 8 * r >= count) continue;
      const bool prefix = p.is_prefix(position[r]);
      const RowOut<T> to(a, s, position[r], head[r]);
#pragma unroll
      for (int n = 0; n < Width / 8; ++n) {
        const float x = end[r].empty ? 0.0f : out[n][2 * r] * end[r].factor;
        const float y = end[r].empty ? 0.0f : out[n][2 * r + 1] * end[r].factor;
        const int i = n * 8 + 2 * t;
        if (prefix) {
          if (i < p.value_dim) to.put(i, x);
          if (i + 1 < p.value_dim) to.put(i + 1, y);
        } else {
          *reinterpret_cast<uint32_t*>(own_rows + (g + 8 * r) * kPitch + i) = pack_any<T>(x, y);
        }
      }
      if (t == 0) put_lse(a, s, position[r], head[r], end[r].lse);
    }
    __syncwarp();
    if (a.output) {
      constexpr int kChunks = Width / 8, kRowsPerStep = kWarp / kChunks;
      const int column = lane % kChunks * 8, left = p.value_dim - column;
      auto* data = static_cast<uint16_t*>(a.output);
#pragma unroll 1
      for (int r = lane / kChunks; r < 16 && left > 0; r += kRowsPerStep) {
        if (tile + r >= count) break;
        const int64_t at = position_of(tile + r);
        if (p.is_prefix(at)) continue;
        uint16_t* to = data + p.output_at(s, at, head_of(tile + r)) + column;
        const uint16_t* from = own_rows + r * kPitch + column;
        if (shape.aligned_out) {
          *reinterpret_cast<uint4*>(to) = *reinterpret_cast<const uint4*>(from);
        } else {
          for (int i = 0; i < (left < 8 ? left : 8); ++i) to[i] = from[i];
        }
      }
    }
    if (p.uniform_empty) {
      __syncwarp();  // zeros are written: means take their place
#pragma unroll 1
      for (int r = 0; r < 2; ++r) {
        if (tile + g + 8 * r >= count || !(r ? end[1].empty : end[0].empty)) continue;
        const RowOut<T> to(a, s, r ? position[1] : position[0], r ? head[1] : head[0]);
        put_means(p, s, key_head, t, 4, to);
      }
    }
  }
}

template <DType T, int Width, int Keys>
int64_t launch_short(const AttentionArgs& a, ShortShape shape, heddle_cuda_job& job) {
  const int64_t logits = has_transform(a.problem) ? 4 * kWarp * Keys / 2 : 0;
  shape.warp_bytes = static_cast<int32_t>(2 * (shape.rows + 2 * Keys) * (Width + 8) + logits);
  // Blocks of at most 56 KB: four of them share a multiprocessor's 227 KB with little left over.
  int warps = kShortWarps;
  while (warps > 1 && warps * shape.warp_bytes > 56 * 1024) warps /= 2;
  const int64_t bytes = int64_t{warps} * shape.warp_bytes;
  HEDDLE_ALLOW_SHARED((attention_short_kernel<T, Width, Keys>), bytes);
  const dim3 grid(static_cast<unsigned>(ceil_div(shape.items, warps)));
  HEDDLE_LAUNCH((attention_short_kernel<T, Width, Keys>), grid, dim3(warps * kWarp), bytes, job.stream, a, shape);
  return job.launched();
}

template <DType T, int Width>
int64_t launch_short_width(const AttentionArgs& a, const ShortShape& shape, int64_t keys, heddle_cuda_job& job) {
  if (keys <= 16) return launch_short<T, Width, 16>(a, shape, job);
  if (keys <= 32) return launch_short<T, Width, 32>(a, shape, job);
  return launch_short<T, Width, 64>(a, shape, job);
}

}  // namespace heddle
