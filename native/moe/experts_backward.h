// Gradients of experts.h, from the loss's gradient dout by the layer's result. Of route r = (t, j), expert e:
//
//   recomputed   g = x Wg^T + bg     u = x Wu^T + bu     h = act(g, u)
//   dh0 = dout Wd                    dw[r] = <dout, y> = <dh0, h> + <dout, bd>        dh = w dh0
//   dg = dh dact/dg                  du = dh dact/du                                  dx[t] += dg Wg + du Wu
//   dWg = sum_r dg x^T   dWu = sum_r du x^T   dWd = sum_r w dout h^T   dbg = sum_r dg   dbu = sum_r du   dbd = sum_r w dout
//
// Weights come as the caller keeps them: a training step changes them, so each panel is packed by the task that
// uses it, straight or transposed, into that thread's scratch. No packed copy of a layer exists.
//
// Phases, each one parallel region:
//   1. rows of x and dout packed into operands per tile; <dout, bd>
//   2. (expert x 32 columns of f): g, u, dh0 of a tile, and from them h, dg, du and a part of <dh0, h>
//   3. rows of dg and du packed into operands; the parts of dw added in order
//   4. (expert x 32 columns of d): dx of each route
//   5. dx per token, in slot order
//   6. columns of dg, du, w dout packed into operands whose k is the expert's routes; bias gradients
//   7. (expert x 32 columns of d or f): dWg and dWu, dWd
// Scratch: routes * (d + max(d, 2f) + 3f) * 4 bytes, and one panel per matrix and thread.
//
// Precision: fp32 accumulation, one chain per output in ascending k. Products with a bf16 weight round x, dout, dg
// and du to bf16 as operands where the forward does; products for weight gradients are fp32 for every type: both
// factors are activations, and rounding them would gain nothing in memory. Bounds against float64: fp32 1e-5, bf16
// 1e-2. relu's derivative jumps at 0, so bf16 x operands may move single elements of its gradient across.
//
// dx and dw of a token do not depend on the batch; no result depends on the threads. Weight gradients sum an
// expert's routes in ascending order. Every gradient is written: experts without routes get zeros.
#pragma once
#include "moe/experts.h"

namespace heddle {

// Where one expert's gradients go; strides as in its ExpertSource, biases by bias_stride (down: 1).
struct ExpertGradient {
  float *gate = nullptr, *up = nullptr, *down = nullptr;
  float *gate_bias = nullptr, *up_bias = nullptr, *down_bias = nullptr;
};

struct ExpertsBackwardArgs {
  const void* grad_output = nullptr;       // [tokens, d]
  DType grad_type = DType::kFloat32;
  const void* x = nullptr;                 // [tokens, d]
  DType type = DType::kFloat32;
  int64_t tokens = 0, k = 0;
  const int32_t* indices = nullptr;        // [tokens, k], -1 = no expert
  const float* weights = nullptr;          // [tokens, k]
  PackType pack = PackType::kFloat32;      // kFloat32 or kBFloat16: what the forward's weights were packed to
  Activation activation = Activation::kSiLU;
  float alpha = 1.702f, limit = 7.0f;
  bool gated = true;
  int64_t hidden = 0, intermediate = 0;
  std::vector<ExpertSource> sources;
  float* grad_x = nullptr;                 // [tokens, d]
  float* grad_weights = nullptr;           // [tokens, k]
  std::vector<ExpertGradient> gradients;
  int64_t bias_stride = 1;
};
// kOk, kCancelled, kNoMemory, bad_value(route).
Status experts_backward(const ExpertsBackwardArgs& args, const Exec& exec);

// What an instruction set contributes.
struct BackwardStages {
  // 32 columns of `s` from `column` on, as one panel of k (rounded up to a step); k index i is row[i] when given.
  void (*pack_panel)(PackType type, const MatrixSource& s, const int32_t* row, int64_t column, int64_t columns, int64_t k,
                     char* out);
  // Rows of x (token ids given) as an operand; bias_dot[m] = <row, bias> when there is a bias.
  void (*pack_tokens)(const void* x, DType type, const int32_t* token, int rows, const PackedMatrix& shape, Operand kind,
                      const float* bias, float* bias_dot, float* scratch, char* out);
  // Rows of fp32 values, zero-padded to whole steps, as an operand.
  void (*pack_rows)(const PackedMatrix& shape, Operand kind, float* x, int64_t stride, int rows, char* out);
  // g, u, dh0 [rows][32] of columns [column, column + 32) of f -> h, dg, du at row stride `stride`; part[m * part_stride].
  void (*differentiate)(const ExpertsBackwardArgs& a, const ExpertSource& e, int64_t column, const float* g, const float* u,
                        const float* dh0, const float* weight, int rows, float* h, float* dg, float* du, int64_t stride,
                        float* part, int64_t part_stride);
  // `count` columns of x from `column` on as an fp32 operand whose k is the rows, scaled by weight[k] when given.
  // Row i is row[i] when given. sum[m * sum_stride] = column sum when wanted.
  void (*pack_columns)(const void* x, DType type, int64_t stride, const int32_t* row, const float* weight, int64_t column,
                       int count, int64_t k, float* out, float* sum, int64_t sum_stride);
  // c [rows][32] -> out[m * row_stride + i * column_stride], i < columns.
  void (*write)(const float* c, int rows, int64_t columns, float* out, int64_t row_stride, int64_t column_stride);
};
const BackwardStages& backward_stages(Isa isa);

}  // namespace heddle
