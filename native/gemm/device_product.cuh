// The grouped product; see device_product.h.
#pragma once
#include "gemm/device_activation.cuh"
#include "gemm/device_rows.cuh"

namespace heddle {

template <int WarpsM, int WarpsN, int TilesPerWarp, int EightsPerWarp, int Stages, int BlocksPerMultiprocessor>
struct ProductShape {
  static constexpr int kWarpsN = WarpsN, kM = TilesPerWarp, kN = EightsPerWarp, kStages = Stages;
  static constexpr int kBlocks = BlocksPerMultiprocessor;
  static constexpr int kThreads = WarpsM * WarpsN * kWarp;
  static constexpr int kTiles = WarpsM * TilesPerWarp;     // of 16 outputs
  static constexpr int kRows = WarpsN * EightsPerWarp * 8;
  static constexpr int kPitch = kTiles * 16 + 4;           // of the sums in shared memory
};
// Few rows: four warps with a tile each; five stages on their way in six blocks a multiprocessor are 140 KB in flight.
using FewRows = ProductShape<4, 1, 1, 1, 6, 6>;
using SomeRows = ProductShape<4, 1, 2, 4, 4, 3>;
// 64 outputs x 64 rows a warp: 128 bytes of shared memory for each m16n8k16, where 32 x 64 would need 192. Types with scales
// inside k are bound by scaling their sums and by registers: 64 x 32, and one block of twice the warps.
template <class K>
using ManyRows = std::conditional_t<(K::kGroups > 0), ProductShape<2, 4, 4, 4, 4, 1>, ProductShape<2, 2, 4, 8, 4, 2>>;

template <class K, class S>
constexpr int product_shared() {
  const int stages = S::kStages * ProductStage<K, S::kTiles, S::kRows>::kBytes;
  const int sums = S::kRows * S::kPitch * 4;
  return stages > sums ? stages : sums;
}

// Which rows of which expert, and which outputs, tile i of the list is. Rows run innermost, up to kRowRun tiles of them:
// blocks that run at once share weights and rows in L2.
constexpr int kRowRun = 16;
struct ProductTile {
  int32_t expert, row, end;  // rows [row, end)
  int32_t outputs;           // tiles of 16 outputs before it
};
// Row tiles of the only expert.
template <class S>
__device__ __forceinline__ int32_t row_tiles(const GroupedProduct& p) {
  return static_cast<int32_t>(ceil_div(p.all, S::kRows));
}
template <class S>
__device__ __forceinline__ ProductTile find_tile(const GroupedProduct& p, int32_t i, int32_t across) {
  ProductTile t{};
  int32_t before = 0, down = row_tiles<S>(p), first = 0, end = p.all;
  if (p.offsets) {
    t.expert = p.tile_expert[i / across];
    before = p.first_tile[t.expert], down = p.first_tile[t.expert + 1] - before;
    first = p.offsets[t.expert], end = p.offsets[t.expert + 1];
  }
  int32_t j = i - before * across;
  const int32_t run = j / (kRowRun * across);
  j -= run * kRowRun * across;
  const int32_t height = min(down - run * kRowRun, kRowRun);
  t.row = first + (run * kRowRun + j % height) * S::kRows;
  t.end = min(end, t.row + S::kRows);
  t.outputs = j / height * S::kTiles;
  return t;
}

// Step s of a tile to one stage, in the background. Unrolled, the addresses of all chunks stay in registers.
template <class K, class S>
__device__ __forceinline__ void load_stage(const GroupedProduct& p, const char* expert, int32_t outputs, const int32_t* row_of,
                                           int32_t s, char* stage) {
  using Stage = ProductStage<K, S::kTiles, S::kRows>;
  const auto left = static_cast<int32_t>(p.matrix.tiles) - outputs;
  // `count` 16-byte chunks for each tile of outputs, whose bytes stand at from + tile * pitch.
  auto tiles = [&](auto count, char* to, const char* from, int64_t pitch) {
    constexpr int kCount = decltype(count)::value;
#pragma unroll (K::kGroups > 0 ? 1 : 8)
    for (int c = static_cast<int>(threadIdx.x); c < S::kTiles * kCount; c += S::kThreads) {
      const bool exists = c / kCount < left;
      const int64_t tile = exists ? outputs + c / kCount : 0;
      cp_async_16(to + c * 16, from + tile * pitch + c % kCount * 16, exists ? 16 : 0);
    }
  };
  tiles(std::integral_constant<int, K::kCodeBytes / 16>{}, stage, expert + p.matrix.codes + int64_t{s} * K::kCodeBytes,
        p.matrix.steps * K::kCodeBytes);
  if constexpr (K::kGroups > 0) {
    constexpr int kUnit = K::kScaleBytes / K::kGroups;
    const int32_t group = K::kFloat8 ? s / 4 : K::kSmall ? s * 2 : p.group == 128 ? s / 2 : s;
    tiles(std::integral_constant<int, K::kScaleBytes / 16>{}, stage + Stage::kScales, expert + p.matrix.scales + int64_t{group} * kUnit,
          p.matrix.groups * kUnit);
    if constexpr (K::kPointBytes > 0) {
      tiles(std::integral_constant<int, K::kPointBytes / 16>{}, stage + Stage::kPoints, expert + p.matrix.points + int64_t{group} * 16,
            p.matrix.groups * 16);
    }
  }
  constexpr int kChunks = K::kRowBytes / 16;
#pragma unroll (K::kGroups > 0 ? 1 : 8)
  for (int c = static_cast<int>(threadIdx.x); c < S::kRows * kChunks; c += S::kThreads) {
    const int row = c / kChunks, chunk = c % kChunks;
    const int32_t from = row_of[row];
    const int at = K::kFourBits && chunk == 4 ? Stage::kMeta + row * 16
                                              : Stage::kRows + chunk / 4 * S::kRows * 64 + row_chunk(row, chunk % 4);
    cp_async_16(stage + at, p.rows + (from < 0 ? 0 : from) * p.row_bytes + int64_t{s} * K::kRowBytes + chunk * 16, from < 0 ? 0 : 16);
  }
}

__device__ __forceinline__ float activate(const GroupedProduct& p, float gate, float up) {
  if (!p.clamped) return linear_activation(p.activation, gate) * up;
  const float g = gate > p.limit ? p.limit : gate;
  const float u = up > p.limit ? p.limit : up < -p.limit ? -p.limit : up;
  return g * sigmoid(g * p.alpha) * (u + 1.0f);
}

template <class K>
__device__ __forceinline__ void store_h(const GroupedProduct& p, int64_t row, int64_t column, float v) {
  if constexpr (K::kType == PackType::kBFloat16) {
    static_cast<uint16_t*>(p.out)[row * p.out_pitch + column] = round_bf16(v);
  } else if constexpr (K::kFloat8) {
    uint16_t part[3];
    split_bf16(v, part);
    char* to = static_cast<char*>(p.out) + row * p.out_pitch + column / K::kStep * K::kRowBytes + column % K::kStep * 2;
#pragma unroll
    for (int i = 0; i < 3; ++i) *reinterpret_cast<uint16_t*>(to + i * 64) = part[i];
  } else {
    static_cast<float*>(p.out)[row * p.out_pitch + column] = v;
  }
}

// From the sums [rows][kPitch] in shared memory.
template <class K, class S>
__device__ __forceinline__ void finish_tile(const GroupedProduct& p, const ProductTile& tile, int32_t part, const char* expert,
                                            const float* sums, const int32_t* row_of) {
  const auto* bias = (p.bias ? p.bias : reinterpret_cast<const float*>(expert + p.matrix.bias)) + tile.outputs * 16;
  const auto* scale = reinterpret_cast<const float*>(expert + p.matrix.scales) + tile.outputs * 16;
  const int tiles = min(static_cast<int>(p.matrix.tiles) - tile.outputs, S::kTiles);
  const int rows = tile.end - tile.row, threads = S::kThreads;
  auto value = [&](int row, int output) {
    const float v = sums[row * S::kPitch + output];
    // Explicitly fused: the shapes are compiled apart and must round alike.
    if constexpr (K::kType == PackType::kInt8) return fmaf(v * p.row_scale[row_of[row]], scale[output], bias[output]);
    else return v + bias[output];
  };
  if (!p.is_up) {
    const int64_t columns = p.columns - tile.outputs * 16;
    const int64_t first = (int64_t{part} * p.all + tile.row) * p.out_pitch + tile.outputs * 16;
    auto write = [&](auto put) {
#pragma unroll 1
      for (int i = static_cast<int>(threadIdx.x); i < rows * S::kTiles * 16; i += threads) {
        const int row = i / (S::kTiles * 16), output = i % (S::kTiles * 16);
        if (output < columns) put(first + row * p.out_pitch + output, value(row, output));
      }
    };
    if (p.activation == LinearActivation::kNone && p.out_type == DType::kFloat32) {
      write([&](int64_t i, float v) { static_cast<float*>(p.out)[i] = v; });
    } else {
      write([&](int64_t i, float v) { store_float(p.out, p.out_type, i, linear_activation(p.activation, v)); });
    }
    return;
  }
  const int shift = p.gated ? 3 : 4;  // columns of h in a tile
#pragma unroll 1
  for (int i = static_cast<int>(threadIdx.x); i < rows * (S::kTiles << shift); i += threads) {
    const int row = i / (S::kTiles << shift), column = i % (S::kTiles << shift);
    if (column >= tiles << shift) continue;
    const int output = p.gated ? column / 8 * 16 + column % 8 : column;
    const int32_t to = (tile.outputs << shift) + column;
    const bool exists = to < p.columns;  // what pads k stays 0 where x is not finite
    const float h = exists ? activate(p, value(row, output), p.gated ? value(row, output + 8) : 1.0f) : 0.0f;
    store_h<K>(p, tile.row + row, to, h);
  }
}

template <class K, class S>
__global__ void __launch_bounds__(S::kThreads, S::kBlocks) grouped_product_kernel(GroupedProduct p) {
  using Stage = ProductStage<K, S::kTiles, S::kRows>;
  HEDDLE_DYNAMIC_SHARED(char, shared);
  __shared__ int32_t row_of[S::kRows];  // in p.rows; -1: none
  const int lane = static_cast<int>(threadIdx.x) % kWarp, warp = static_cast<int>(threadIdx.x) / kWarp;
  const int first_tile = warp / S::kWarpsN * S::kM, first_row = warp % S::kWarpsN * S::kN * 8;
  const auto across = static_cast<int32_t>(ceil_div(p.matrix.tiles, S::kTiles));
  const int32_t count = (p.offsets ? p.first_tile[p.experts] : row_tiles<S>(p)) * across;
  for (auto i = static_cast<int32_t>(blockIdx.x); i < count * p.parts; i += static_cast<int32_t>(gridDim.x)) {
    const ProductTile tile = find_tile<S>(p, i % count, across);
    const int32_t part = i / count;
    const char* expert = p.bank + tile.expert * p.expert_bytes;
    for (int r = static_cast<int>(threadIdx.x); r < S::kRows; r += S::kThreads) {
      const int32_t row = tile.row + r;
      row_of[r] = row >= tile.end ? -1 : p.order ? p.order[row] / p.routes_per_row : row;
    }
    __syncthreads();
    const auto begin = static_cast<int32_t>(p.matrix.steps * part / p.parts);
    const auto end = static_cast<int32_t>(p.matrix.steps * (part + 1) / p.parts);
    auto load = [&](int32_t s, int slot) {
      if (s < end) load_stage<K, S>(p, expert, tile.outputs, row_of, s, shared + slot * Stage::kBytes);
      cp_async_commit();
    };
#pragma unroll 1
    for (int s = 0; s < S::kStages - 1; ++s) load(begin + s, s);
    typename K::Sum sums[S::kM][S::kN][4] = {};
    int slot = 0;
#pragma unroll 1
    for (int32_t s = begin; s < end; ++s) {
      cp_async_wait<S::kStages - 2>();
      __syncthreads();  // step s is there for everybody, and step s - 1 is multiplied
      load(s + S::kStages - 1, slot == 0 ? S::kStages - 1 : slot - 1);
      multiply_step<K, Stage, S::kM, S::kN>(sums, shared + slot * Stage::kBytes, first_tile, first_row, lane);
      slot = slot + 1 == S::kStages ? 0 : slot + 1;
    }
    cp_async_wait<0>();
    __syncthreads();
    auto* c = reinterpret_cast<float*>(shared);
#pragma unroll
    for (int m = 0; m < S::kM; ++m) {
#pragma unroll
      for (int n = 0; n < S::kN; ++n) {
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          const int row = first_row + n * 8 + lane % 4 * 2 + e % 2, output = (first_tile + m) * 16 + lane / 4 + e / 2 * 8;
          c[row * S::kPitch + output] = static_cast<float>(sums[m][n][e]);
        }
      }
    }
    __syncthreads();
    finish_tile<K, S>(p, tile, part, expert, c, row_of);
    __syncthreads();
  }
}

template <class K, class S>
int64_t launch_product(const GroupedProduct& p, heddle_cuda_job& job) {
  const int64_t tiles = p.most_tiles * ceil_div(p.matrix.tiles, S::kTiles) * p.parts;
  const int64_t fit = cuda::multiprocessors() * S::kBlocks;
  if (tiles == 0) return kOk;
  if (tiles >= int64_t{1} << 30) return kUnsupported;  // terabytes
  constexpr int kShared = product_shared<K, S>();
  if (kShared > 48 * 1024) HEDDLE_ALLOW_SHARED((grouped_product_kernel<K, S>), kShared);
  HEDDLE_LAUNCH((grouped_product_kernel<K, S>), dim3(static_cast<unsigned>(tiles < fit ? tiles : fit)), dim3(S::kThreads), kShared,
                job.stream, p);
  return job.launched();
}

template <class K>
ProductOps make_product_ops() {
  return {operand_rows<K>, [](BlockShape shape, const GroupedProduct& p, heddle_cuda_job& job) {
            switch (shape) {
              case BlockShape::kFew: return launch_product<K, FewRows>(p, job);
              case BlockShape::kSome: return launch_product<K, SomeRows>(p, job);
              default: return launch_product<K, ManyRows<K>>(p, job);
            }
          }};
}

}  // namespace heddle
