// Packed weight matrices and the tile product every family uses.
//
//   y[m][n] = sum_k x[m][k] W[n][k]          (W is stored [N, K] as on the hub)
//
// Packing: the N outputs are cut into panels of kPanel = 32 columns; inside a panel, k runs slowest:
//   float32   [K]      [32]      floats
//   bfloat16  [K/2]    [32][2]   pairs of consecutive k, as vdpbf16ps wants them
//   int8      [K/4]    [32][4]   quads of consecutive k, as vpdpbusd wants them; scale per column
//   int4      [K/8]    [32][4]   byte b of a quad holds k = b (low nibble) and k = b + 4 (high nibble)
//   float8    [K/4]    [32][4]   E4M3 codes; scale per column and 128 k (a block of 128 x 128 shares one)
// One packing serves every M and every instruction set. A gate/up pair is packed as panels of 16 gate columns
// followed by their 16 up columns, so that the activation finds both in the same tile.
//
// A tile is up to `rows` (M) times one panel. Its operand is packed too: [K][rows] floats (pairs, quads), so a
// tile of one row is the row itself. Every output is one chain of fused multiply-adds in ascending k, whatever
// M, tile or thread: that makes a token's result bitwise the same alone and in a batch.
//
// Floors: M = 1 reads every weight byte once, so the bound is memory; a tile of 12 x 32 does 2*12*32 operations
// per 128 bytes of W and 48 of x, all from L2 after the first tile, so the bound is the FMA units.
#pragma once
#include <cmath>
#include <cstdint>

#include "core/dtype.h"
#include "core/huge.h"
#include "core/status.h"
#include "core/thread_pool.h"
#include "core/workspace.h"

namespace heddle {

constexpr int kPanel = 32;
constexpr int kHalfPanel = 16;
constexpr int kMaxTileRows = 16;

enum class PackType : int32_t { kFloat32 = 0, kBFloat16 = 1, kInt8 = 2, kInt4 = 3, kMxfp4 = 4, kFloat8 = 5 };

inline int64_t round_up_to(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

// k values in one packed step of a panel; a step is 128 bytes for every type (32 columns of 4 bytes).
inline int64_t pack_unit(PackType t) {
  constexpr int64_t unit[] = {1, 2, 4, 8, 8, 4};
  return unit[static_cast<int>(t)];
}
constexpr int64_t kStepBytes = 128;
constexpr int64_t kBlock = 128;  // side of a float8 scale block

// A weight matrix as it comes: element (n, k) at n * n_stride + k * k_stride. kUint8 stands for MXFP4 blocks as
// stored on the hub: row n is n_stride bytes of two E2M1 codes each (the low nibble first) and n_stride / 16
// exponents, one for 32 values.
struct MatrixSource {
  const void* data = nullptr;
  DType type = DType::kFloat32;
  int64_t n_stride = 0, k_stride = 1;
  // float8 sources: one factor per block of 128 x 128, row-major; row0 is this source's first row in that grid.
  const float* scale = nullptr;
  int64_t scale_columns = 0, row0 = 0;
  const uint8_t* exponent = nullptr;  // e8m0 of MXFP4 blocks

  float scale_at(int64_t n, int64_t k) const {
    return scale ? scale[(row0 + n) / kBlock * scale_columns + k / kBlock] : 1.0f;
  }
  float at(int64_t n, int64_t k) const {
    const int64_t i = n * n_stride + k * k_stride;
    switch (type) {
      case DType::kUint8: {
        constexpr float value[] = {0.0f, 0.5f, 1.0f, 1.5f, 2.0f, 3.0f, 4.0f, 6.0f};
        const int code = static_cast<const uint8_t*>(data)[n * n_stride + k / 2] >> (k % 2 * 4) & 15;
        const float v = std::ldexp(value[code & 7], exponent[n * (n_stride / 16) + k / 32] - 127);
        return code & 8 ? -v : v;
      }
      case DType::kBFloat16: return bf16_to_float(static_cast<const uint16_t*>(data)[i]);
      case DType::kFloat16: return f16_to_float(static_cast<const uint16_t*>(data)[i]);
      case DType::kFloat8E4M3: return e4m3_to_float(static_cast<const uint8_t*>(data)[i]) * scale_at(n, k);
      default: return static_cast<const float*>(data)[i];
    }
  }
};

// A packed matrix. Columns are outputs: `halves` = false packs n columns as they come; gate/up packing pairs
// column j of the first source with column j of the second in one panel.
struct PackedMatrix {
  PackType type = PackType::kFloat32;
  int64_t columns = 0;  // outputs, gate and up counted once each
  int64_t k = 0;
  int64_t panels = 0, steps = 0;
  int64_t group = 0;    // k values per scale group (int4, MXFP4, float8); 0: one scale per column (int8)
  bool zero_points = false;  // int4: one zero point per group
  HugeBuffer data;      // [panels][steps][128]
  HugeBuffer scale;     // int8 [panels][32]; int4, float8 [panels][groups][32]
  HugeBuffer zero;      // int8: 128 * sum of the column's q, int32 [panels][32] (see operand.h)
  HugeBuffer point;     // int4 with zero points: [panels][groups][32] uint8; empty: the zero point is 8
  HugeBuffer exponent;  // MXFP4: [panels][groups][32] e8m0

  const char* panel(int64_t p) const { return data.as<char>() + p * steps * kStepBytes; }
  int64_t groups() const { return group ? (steps * pack_unit(type) + group - 1) / group : 1; }
  int64_t bytes() const {
    return static_cast<int64_t>(data.size() + scale.size() + zero.size() + point.size() + exponent.size());
  }
};

// How weights are rounded (quantize.h has the formulas).
struct PackOptions {
  int64_t group = 0;                   // k values per scale (int4, MXFP4); float8 always has 128
  bool symmetric = true;               // int4: false stores a zero point per group
  bool search = false;                 // int4: tries smaller ranges per group, keeps the one with the least error
  const float* mean_square = nullptr;  // [k] weight of each input in that error; nullptr: all 1
  PackOptions(int64_t g = 0) : group(g) {}  // NOLINT: a group alone is the common case
};

// Fills in what follows from type and sizes; data stays empty.
void shape_matrix(PackedMatrix& out, PackType type, bool pair, int64_t n, int64_t k, const PackOptions& options);
// bytes() of a matrix of this shape once it is packed.
int64_t packed_bytes(const PackedMatrix& shape);

// Packs [n, k] (second.data == nullptr), or the pair [n, k] + [n, k] into half panels. Padding is zero.
// kOk, kNoMemory, kCancelled; bad_value(row * k + column), counted on into the second source, for the first NaN or
// infinity of a type that cannot hold it (all but float32 and bfloat16).
Status pack_matrix(PackedMatrix& out, PackType type, const MatrixSource& first, const MatrixSource& second, int64_t n,
                   int64_t k, const PackOptions& options, const Exec& exec);

// One tile: c[rows][32] = operand rows times a panel (scaled to floats for every type). No initialisers: compilers zero
// this many bytes by `rep stos`, 7 % of an int8 product; fill_tile sets every field but c.
struct TileCall {
  const void* a;  // operand of the tile's rows (operand.h)
  const void* b;  // one panel, or a k-range of it
  int64_t steps;
  float* c;
  bool accumulate;          // continue the chains in c (float types), or add to it (widened float8)
  bool resident;            // another tile has just brought this range of the panel to L1
  const char* prefetch;     // what is read after this range, brought to L2 meanwhile
  int64_t prefetch_stride;  // bytes per step, at most 64: a burst fills the line fill buffers and stalls the loads of
                            // this panel
  // Integer types.
  int64_t group_steps;        // steps per scale group; 0: one group
  const float* b_scale;       // int8 [32]; int4, float8 [groups][32]; widened float8 [32]
  const int32_t* b_sum;       // int8 [32]: 128 * column sum
  const uint8_t* b_zero;      // int4 [groups][32]; nullptr: 8
  const uint8_t* b_exponent;  // MXFP4 [groups][32]
  const float* a_scale;       // int8 [rows]; int4, MXFP4 [groups][rows]
  const int32_t* a_sum;       // int4, MXFP4 [groups][rows]: sum of the row's quantised values
};

using TileFn = void (*)(const TileCall&);

struct TileKernels {
  int max_rows = 0;
  TileFn tile[kMaxTileRows + 1] = {};  // by number of rows
  // Types that these kernels widen to floats in registers: `steps` steps of a panel as floats [k][32], and the kernels
  // that give the same bits with those.
  void (*widen)(const char* b, int64_t steps, float* out) = nullptr;
  const TileKernels* widened = nullptr;
};

// The kernels of one type for the chosen instruction set (and the extensions this CPU has beside it).
const TileKernels& tile_kernels(Isa isa, PackType type);

// How the rows of x are stored for a type on an instruction set.
enum class Operand : int32_t {
  kFloat32,      // [k][rows] floats (float32, float8)
  kFloat32Pair,  // [k][rows] floats, k even: bf16 weights widened in registers
  kBFloat16,     // [k/2][rows][2] bf16: bf16 dot product instruction
  kUint8,        // [k/4][rows][4] q + 128, then scale [rows]; q = round(x / scale), scale = max|x| / 127 per row
  kInt8,         // [k/4][rows][4] q, then scale [groups][rows], then sum [groups][rows]; scale per group of k (or row)
  kIntFloat,     // [k][rows] q as floats, then scale and sum as kInt8: without an integer dot product instruction
};
Operand operand_kind(Isa isa, PackType type);
// Whether a value's place in the operand takes nothing but the value: rows may then be packed in parts.
inline bool packs_values(Operand kind) { return kind == Operand::kFloat32 || kind == Operand::kFloat32Pair; }
// Bytes per row of an operand with `k` values (at most 4 per value for k >= 32).
int64_t operand_row_bytes(Operand kind, const PackedMatrix& m);

// Points `t` at panel p and at the operand of `rows` rows, whole k range, and everything else at nothing; c stays.
void fill_tile(TileCall& t, Operand kind, const PackedMatrix& m, int64_t p, const char* operand, int rows);

}  // namespace heddle
