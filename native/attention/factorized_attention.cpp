// See factorized_attention.h. No SIMD here: axes become problems, and class tokens are averaged.
#include "attention/factorized_attention.h"

namespace heddle {
namespace {

const void* moved(const void* p, DType type, int64_t elements) {
  return p ? static_cast<const char*>(p) + elements * dtype_size(type) : nullptr;
}
void* moved(void* p, DType type, int64_t elements) {
  return p ? static_cast<char*>(p) + elements * dtype_size(type) : nullptr;
}

// Strides [batch, position, head, element] and over the sequences of a batch entry.
void set_strides(Axis axis, const int64_t* from, bool packed, int64_t* to, int64_t* inner) {
  to[0] = packed ? 0 : from[0];
  to[1] = packed || axis != Axis::kTime ? from[2] : from[1];
  to[2] = from[3];
  *inner = packed || axis == Axis::kJoint ? 0 : axis == Axis::kTime ? from[2] : from[1];
}

int64_t elements_between(const void* a, const void* b, DType type) {
  return (reinterpret_cast<intptr_t>(b) - reinterpret_cast<intptr_t>(a)) / dtype_size(type);
}

// Heads [first, first + heads) over one axis. Joint needs frames that follow each other: the front sees to it.
AttentionProblem axis_problem(const FactorizedProblem& f, Axis axis, int32_t first, int32_t heads) {
  AttentionProblem p;
  const bool packed = f.batch_offsets != nullptr, time = axis == Axis::kTime, joint = axis == Axis::kJoint;
  const int32_t group = f.key_heads ? f.query_heads / f.key_heads : 1, first_key = first / group;
  p.query_heads = heads;
  p.key_heads = f.key_heads ? heads / group : 0;
  p.head_dim = f.head_dim;
  p.value_dim = f.value_dim;
  p.type = f.type;
  p.query = moved(f.query, f.type, first * f.query_stride[3]);
  p.key = moved(f.key, f.type, first_key * f.key_stride[3]);
  p.value = moved(f.value, f.type, first_key * f.value_stride[3]);
  set_strides(axis, f.query_stride, packed, p.query_stride, &p.inner_stride.query);
  set_strides(axis, f.key_stride, packed, p.key_stride, &p.inner_stride.key);
  set_strides(axis, f.value_stride, packed, p.value_stride, &p.inner_stride.value);
  p.query_stride[3] = f.query_stride[4];
  p.key_stride[3] = f.key_stride[4];
  p.value_stride[3] = f.value_stride[4];
  set_strides(axis, f.output_stride, packed, p.output_stride, &p.inner_stride.output);

  const int64_t tokens = f.frames * f.patches;
  const int64_t lse[5] = {f.query_heads * tokens, f.patches, 1, tokens, 0}, row[5] = {tokens, f.patches, 1, 0, 0};
  set_strides(axis, lse, false, p.lse_stride, &p.inner_stride.lse);
  int64_t token[3];
  set_strides(axis, row, packed, token, &p.inner_stride.token);
  for (int i = 0; i < 2; ++i) p.query_token[i] = p.key_token[i] = token[i];

  p.batch = f.batch;
  p.queries = joint ? tokens : time ? f.frames : f.patches;
  p.inner = joint ? 1 : time ? f.patches : f.frames;
  if (packed) {
    p.lse_stride[0] = f.lse_batch;
    p.lse_stride[1] = 1;
    p.lse_stride[2] = f.lse_head;
    p.inner_stride.lse = 0;
    p.batch_segments = p.inner;
    p.segments = f.batch * p.inner;
    p.inner = 1;
    p.batch = 1;
    p.queries = f.tokens;
    p.query_offsets = p.key_offsets = joint ? f.batch_offsets : time ? f.patch_offsets : f.frame_offsets;
    p.order = time ? f.order : nullptr;
  }
  if (f.class_query && axis == Axis::kSpace) {
    Prefix& x = p.prefix;
    x.present = true;
    x.query = elements_between(f.query, f.class_query, f.type);
    x.key = elements_between(f.key, f.class_key, f.type);
    x.value = elements_between(f.value, f.class_value, f.type);
    for (int i = 0; i < 2; ++i) {
      x.query_stride[i] = f.class_query_stride[i];
      x.key_stride[i] = f.class_key_stride[i];
      x.value_stride[i] = f.class_value_stride[i];
    }
    ++p.queries;
  }
  p.keys = p.queries;

  p.bias = moved(f.bias, f.bias_type, first * f.bias_stride[2]);
  p.bias_type = f.bias_type;
  p.mask = f.mask ? f.mask + first * f.mask_stride[2] : nullptr;
  p.bias_stride[0] = f.bias_stride[0];
  p.mask_stride[0] = f.mask_stride[0];
  p.inner_stride.bias = f.bias_stride[1];
  p.inner_stride.mask = f.mask_stride[1];
  for (int i = 1; i < 3; ++i) {
    p.bias_stride[i] = f.bias_stride[i + 1];
    p.mask_stride[i] = f.mask_stride[i + 1];
  }
  p.alibi = f.alibi ? f.alibi + first : nullptr;
  p.sinks = f.sinks ? f.sinks + first : nullptr;
  // Split heads: causal and window speak of time.
  if (!(f.axis == Axis::kSplitHeads && axis == Axis::kSpace)) {
    p.left = f.left;
    p.right = f.right;
  }
  if (joint) p.step = f.patches;
  p.scale = f.scale;
  p.softcap = f.softcap;
  p.uniform_empty = f.uniform_empty;
  return p;
}

struct Pass {
  Axis axis;
  int32_t first, heads;
};

int passes_of(const FactorizedProblem& f, Pass* passes) {
  passes[0] = {f.axis, 0, f.query_heads};
  if (f.axis != Axis::kSplitHeads) return 1;
  const int32_t half = f.query_heads / 2;
  passes[0] = {Axis::kTime, 0, half};
  passes[1] = {Axis::kSpace, half, half};
  return 2;
}

int64_t lse_head_stride(const FactorizedProblem& f) {
  return f.batch_offsets ? f.lse_head : f.frames * f.patches;
}

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

float frame_weight(const FactorizedProblem& f) { return f.frames ? 1.0f / static_cast<float>(f.frames) : 0.0f; }

}  // namespace

Status factorized_attention(const FactorizedAttentionArgs& a, const Exec& exec) {
  const FactorizedProblem& f = a.problem;
  AlignedBuffer<float> class_output;
  if (f.class_query &&
      !class_output.reset(static_cast<size_t>(f.batch * f.frames * f.query_heads * f.value_dim))) {
    return kNoMemory;
  }
  Pass passes[2];
  const int count = passes_of(f, passes);
  for (int i = 0; i < count; ++i) {
    const Pass& pass = passes[i];
    AttentionArgs args;
    args.problem = axis_problem(f, pass.axis, pass.first, pass.heads);
    args.output = moved(a.output, f.type, pass.first * f.output_stride[3]);
    args.log_sum_exp = a.log_sum_exp ? a.log_sum_exp + pass.first * lse_head_stride(f) : nullptr;
    args.prefix_output = class_output.data();
    const Status status = attention(args, exec);
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
  // Of the class token in each frame: output, log-sum-exp, and the gradients of q, k and v.
  AlignedBuffer<float> output, lse, query, key, value;
  if (f.class_query) {
    const auto size = [&](int64_t n) { return static_cast<size_t>(rows * n); };
    if (!output.reset(size(f.query_heads * value_dim)) || !lse.reset(size(f.query_heads)) ||
        !query.reset(size(int64_t{f.query_heads} * f.head_dim)) || !key.reset(size(int64_t{f.key_heads} * f.head_dim)) ||
        !value.reset(size(f.key_heads * value_dim))) {
      return kNoMemory;
    }
    AttentionArgs forward;  // the class token alone as query
    forward.problem = axis_problem(f, Axis::kSpace, 0, f.query_heads);
    forward.problem.queries = 1;
    forward.prefix_output = output.data();
    forward.prefix_lse = lse.data();
    const Status status = attention(forward, exec);
    if (status != kOk) return status;
  }
  Pass passes[2];
  const int count = passes_of(f, passes);
  for (int i = 0; i < count; ++i) {
    const Pass& pass = passes[i];
    AttentionBackwardArgs args;
    args.problem = axis_problem(f, pass.axis, pass.first, pass.heads);
    args.first_head = pass.first;
    args.heads = f.query_heads;
    args.upstream = a.upstream;
    args.output = moved(a.output, f.type, pass.first * f.output_stride[3]);
    args.log_sum_exp = a.log_sum_exp + pass.first * lse_head_stride(f);
    args.query_grad = a.query_grad;
    args.key_grad = a.key_grad;
    args.value_grad = a.value_grad;
    args.bias_grad = a.bias_grad;
    args.prefix_upstream = a.class_upstream;
    args.prefix_weight = frame_weight(f);
    args.prefix_output = output.data();
    args.prefix_lse = lse.data();
    args.prefix_query_grad = query.data();
    args.prefix_key_grad = key.data();
    args.prefix_value_grad = value.data();
    const Status status = attention_backward(args, exec);
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
