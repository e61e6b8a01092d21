// Rows through one or two products, with everything that lies between two attentions of a transformer layer:
//
//   h = x[index[i]];  h = LayerNorm(h) where normed;  h = act(h U^T + u) where there is a hidden matrix U
//   out[to[i]] = gate act(h W^T + b) + add[0][.] + add[1][.]
//
// Norms as norm.h defines them, products and chains as packed.h: a row's bits are those of layer_norm, linear, gelu and
// add_residual one after the other, whatever is computed beside it.
//
// Design. A thread takes a group of up to kGroupRows rows through everything: it gathers, norms and packs them once
// (258 KiB at a width of 768), and the hidden rows of an MLP are packed as operand of the second product while their
// tile is in L1 (1 MiB at 3072). So neither normed, nor hidden rows, nor updates pass through memory, no row is moved by
// itself, and no buffer grows with the rows. Groups shrink towards the end, so that no thread waits long for the last;
// with fewer tiles than that pays for, threads share the panels instead.
//
// Floor: 2 k n operations per row and product at the FMA peak; beside them x and the residual are read and out is
// written once.
//
// Measured on two cores with a peak of 350 GFLOP/s, 1569 x 768 (bench/videoLayers.ts times a whole layer so): to 2304 with
// norm 316 GFLOP/s, MLP of 3072 with norm, GELU and residual 318, bf16 weights 290, int8 about 1000. The tiles themselves
// run at 97 % of the peak; packing takes 2.5 %, the epilogue 2 %, hidden rows 1.3 %. Lines of out and of the residual are
// asked for one panel ahead: without that the epilogue of the first takes 5.5 %.
#pragma once
#include <memory>

#include "gemm/linear.h"

namespace heddle {

struct FusedLinearArgs {
  const float* x = nullptr;        // rows of k
  int64_t rows = 0;
  const int32_t* index = nullptr;  // [rows] of x; none: row i
  bool normed = false;
  const float *norm_weight = nullptr, *norm_bias = nullptr;  // [k] or none
  bool unit_offset = false;
  double epsilon = 0;
  std::shared_ptr<PackedMatrix> hidden;  // or none
  const float* hidden_bias = nullptr;
  LinearActivation hidden_activation = LinearActivation::kNone;
  std::shared_ptr<PackedMatrix> weight;
  const float* bias = nullptr;
  LinearActivation activation = LinearActivation::kNone;
  float gate = 1.0f;
  const float* add[2] = {nullptr, nullptr};            // tables of rows of n, or none; may be out itself
  const int32_t* add_index[2] = {nullptr, nullptr};    // [rows] of the table; none: the row that is written
  float* out = nullptr;                                // rows of n
  const int32_t* to = nullptr;                         // [rows], -1: not written; none: row i
  // Another product of the same rows, of the same weight type, plain: also_out = h A^T + a. Not with a hidden matrix.
  std::shared_ptr<PackedMatrix> also;
  const float* also_bias = nullptr;
  float* also_out = nullptr;
};

// kOk, kCancelled or kNoMemory. `out` may be x where index and to are the same, each row once.
Status fused_linear(const FusedLinearArgs& args, const Exec& exec);

struct FusedLinearStages {
  // Rows of x, gathered and normed, as operand of the first product. scratch: rows x padded k floats.
  void (*pack)(const FusedLinearArgs& a, int64_t first_row, int rows, const PackedMatrix& w, Operand kind, float* scratch,
               char* out);
  // A tile of the hidden product: activated, then in place in the second operand (kinds that pack value by value).
  void (*pack_hidden)(const FusedLinearArgs& a, int rows, int64_t panel, float* c, char* out);
  // The same as rows, `stride` floats apart, zero beyond the columns up to it; pack_rows makes the operand of them.
  void (*store_hidden)(const FusedLinearArgs& a, int rows, int64_t panel, const float* c, float* out, int64_t stride);
  void (*pack_rows)(const PackedMatrix& w, Operand kind, float* x, int64_t stride, int rows, char* out);
  void (*finish)(const FusedLinearArgs& a, int64_t first_row, int rows, int64_t panel, const float* c);
};
const FusedLinearStages& fused_linear_stages(Isa isa);

}  // namespace heddle
