// Rotary position embedding.
//
// Definition: per token, angle_i = position[axis_i] * frequency_i. Element e with partner p = partner[e] >= 0 and angle
// a = angle[e]:  out[e] = factor * (x[e] cos(a) -+ x[p] sin(a)), minus for the first of the pair (p > e). Elements
// without a partner are copied. Layouts (halves, interleaved, axes) are maps from the front.
//
// Precision: angles and their reduction to [-pi/4, pi/4] in float64, polynomials of sine and cosine in float32; 2e-7 of
// the pair's length, at any int32 position.
//
// Cost: reads and writes each element once. Sines and cosines are taken once per token and shared by its heads.
#pragma once
#include "core/dtype.h"
#include "simd/dispatch.h"

namespace heddle {

struct RotaryEmbeddingArgs {
  const void* x = nullptr;  // [batch, length, heads, dim], as out
  DType type = DType::kFloat32;
  int64_t batch = 0, length = 0, heads = 0;
  int32_t dim = 0;
  const int32_t* positions = nullptr;  // [axes][batch or 1][length]; null: offset + index
  int64_t axis_stride = 0, batch_stride = 0, offset = 0;
  const double* frequency = nullptr;  // [count]
  const int32_t* axis = nullptr;      // [count]
  int32_t count = 0;
  const int32_t *angle = nullptr, *partner = nullptr;  // [dim]
  float factor = 1.0f;
  void* out = nullptr;
};

constexpr int kMaxRotaryDim = 512;

HEDDLE_DECLARE_OP(rotary_embedding, RotaryEmbeddingArgs)

}  // namespace heddle
