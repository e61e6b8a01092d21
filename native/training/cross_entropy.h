// Softmax cross-entropy and its gradient, per row and never averaged:
//   loss = log(sum_c e^{x_c}) - x_label,  dx_c = scale (softmax(x)_c - [c = label]).
// A label of -1 is no label: loss 0, gradient 0. `prediction` is the first largest class. A NaN or an infinite maximum
// among the logits makes the row's loss and gradient NaN (and prediction 0 where every logit is NaN).
//
// Precision: fp32 exponentials summed in fp32 lanes, the logarithm in double; relative error <= 2e-6.
#pragma once
#include "simd/dispatch.h"

namespace heddle {

struct CrossEntropyArgs {
  int64_t rows = 0, classes = 0;
  const float* logits = nullptr;    // [rows, classes]
  const int32_t* labels = nullptr;  // [rows], -1 .. classes - 1
  const float* scale = nullptr;     // [rows]
  float* losses = nullptr;          // [rows]
  float* gradient = nullptr;        // [rows, classes]
  int32_t* prediction = nullptr;    // [rows]
};

// kOk, kCancelled, or bad_value(row) for a label out of range.
HEDDLE_DECLARE_OP(cross_entropy, CrossEntropyArgs)

}  // namespace heddle
