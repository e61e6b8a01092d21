// Layer and RMS normalisation of rows, with the residual addition in front of it.
//
//   v = x + residual                           (residual may be absent; `sum` receives v)
//   m = mean(v), or 0 for RMS                  r = 1 / sqrt(mean((v - m)^2) + epsilon)
//   out = (v - m) r (weight + unit) + bias     (weight absent: 1; unit: 1 for scales stored as 1 + weight, else 0)
//
// Ba, Kiros and Hinton 2016; Zhang and Sennrich 2019.
//
// Precision: fp32 with the mean in two parts, so that a mean far from 0 costs nothing; 1e-6 relative in fp32. Squares
// are summed in fp32: rows with |v - m| above 1e18 overflow and give 0 (layer norm and RMS alike). A NaN or infinity in
// a row makes that row NaN. Cost: one read and one write; the second and third pass over a row find it in L1.
//
// Backward, with v = x here and xh = (v - m) r, gw = g (weight + unit):
//   dx = r (gw - [centred] mean(gw) - xh mean(gw xh)) + grad_sum          grad_sum: what flows into v beside the norm
//   dweight = sum over rows of g xh            dbias = sum over rows of g
// Sums over rows: fp32 over runs of kNormRun rows, then over the runs in order, whatever the threads.
#pragma once
#include "core/dtype.h"
#include "simd/dispatch.h"

namespace heddle {

struct NormArgs {
  const void* x = nullptr;         // [rows, width]
  const void* residual = nullptr;  // as x, or none
  DType type = DType::kFloat32;
  int64_t rows = 0, width = 0;
  const float* weight = nullptr;  // [width] or none
  const float* bias = nullptr;    // [width] or none
  bool centred = true;            // false: RMS
  bool unit_offset = false;
  double epsilon = 0;
  void* out = nullptr;  // [rows, width]; may be x or residual itself
  DType out_type = DType::kFloat32;
  void* sum = nullptr;  // of x's type; may be x or residual itself
  float* mean = nullptr;  // [rows] or none, as rstd
  float* rstd = nullptr;
};
HEDDLE_DECLARE_OP(norm, NormArgs)

struct NormBackwardArgs {
  const void* grad_out = nullptr;  // [rows, width], all four of one type
  const void* x = nullptr;
  const void* grad_sum = nullptr;
  DType type = DType::kFloat32;
  int64_t rows = 0, width = 0;
  const float* weight = nullptr;
  bool centred = true, unit_offset = false;
  double epsilon = 0;
  const float* mean = nullptr;  // [rows] as the forward op returned them, or computed anew
  const float* rstd = nullptr;
  void* grad_x = nullptr;        // may be grad_out or grad_sum itself; or none
  float* grad_weight = nullptr;  // [width] or none, as grad_bias
  float* grad_bias = nullptr;
  float* partial = nullptr;  // set by norm_backward: [runs][2][width]
};
constexpr int64_t kNormRun = 64;
Status norm_backward(const NormBackwardArgs& args, const Exec& exec);
HEDDLE_DECLARE_OP(norm_backward_rows, NormBackwardArgs)

}  // namespace heddle
