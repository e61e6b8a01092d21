// See factorized_attention.h. No SIMD here: axes become problems, and class tokens are averaged.
#include "attention/axis_problem.h"

namespace heddle {
namespace {

void store_rounded(void* to, DType type, int64_t at, float x) {
  if (type == DType::kFloat32) {
    static_cast<float*>(to)[at] = x;
  } else {
    static_cast<uint16_t*>(to)[at] = type == DType::kBFloat16 ? float_to_bf16(x) : float_to_f16(x);
  }
}

// out[batch][head][i] = factor times the sum over the frames of from[batch][frame][head][i].
void reduce_frames(const FactorizedProblem& f, const float* from, int64_t heads, int64_t dim, float factor,
                   const int64_t* stride, void* out) {
  for (int64_t b = 0; b < f.batch; ++b) {
    for (int64_t h = 0; h < heads; ++h) {
      for (int64_t i = 0; i < dim; ++i) {
        float sum = 0.0f;
        for (int64_t t = 0; t < f.frames; ++t) sum += from[((b * f.frames + t) * heads + h) * dim + i];
        store_rounded(out, f.type, b * stride[0] + h * stride[1] + i, sum * factor);
      }
    }
  }
}

}  // namespace

Status factorized_attention(const FactorizedAttentionArgs& a, const Exec& exec) {
  const FactorizedProblem& f = a.problem;
  AlignedBuffer<float> class_output;
  if (f.class_query &&
      !class_output.reset(static_cast<size_t>(f.batch * f.frames * f.query_heads * f.value_dim))) {
    return kNoMemory;
  }
  AxisPass passes[2];
  const int count = axis_passes(f, passes);
  for (int i = 0; i < count; ++i) {
    const Status status = attention(pass_args(a, passes[i], class_output.data()), exec);
    if (status != kOk) return status;
  }
  if (f.class_query) {
    reduce_frames(f, class_output.data(), f.query_heads, f.value_dim, frame_weight(f), f.class_output_stride,
                  a.class_output);
  }
  return kOk;
}

Status factorized_attention_backward(const FactorizedAttentionBackwardArgs& a, const Exec& exec) {
  const FactorizedProblem& f = a.problem;
  const int64_t rows = f.class_query ? f.batch * f.frames : 0, value_dim = f.value_dim;
  AlignedBuffer<float> output, lse, query, key, value;
  ClassFrames frames;
  if (f.class_query) {
    const auto size = [&](int64_t n) { return static_cast<size_t>(rows * n); };
    if (!output.reset(size(f.query_heads * value_dim)) || !lse.reset(size(f.query_heads)) ||
        !query.reset(size(int64_t{f.query_heads} * f.head_dim)) || !key.reset(size(int64_t{f.key_heads} * f.head_dim)) ||
        !value.reset(size(f.key_heads * value_dim))) {
      return kNoMemory;
    }
    frames = {output.data(), lse.data(), query.data(), key.data(), value.data()};
    const Status status = attention(class_args(f, frames), exec);
    if (status != kOk) return status;
  }
  AxisPass passes[2];
  const int count = axis_passes(f, passes);
  for (int i = 0; i < count; ++i) {
    const Status status = attention_backward(pass_args(a, passes[i], frames), exec);
    if (status != kOk) return status;
  }
  if (f.class_query) {
    const auto reduce = [&](const float* from, int64_t heads, int64_t dim, void* to) {
      const int64_t stride[2] = {heads * dim, dim};
      reduce_frames(f, from, heads, dim, 1.0f, stride, to);
    };
    reduce(query.data(), f.query_heads, f.head_dim, a.class_query_grad);
    reduce(key.data(), f.key_heads, f.head_dim, a.class_key_grad);
    reduce(value.data(), f.key_heads, value_dim, a.class_value_grad);
  }
  return kOk;
}

}  // namespace heddle
