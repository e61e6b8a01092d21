// How each axis of video tokens becomes an attention problem: strides, sequences, order and prefix (see problem.h). The
// CPU, CUDA, and their backward launches all start here.
#pragma once
#include "attention/factorized_attention.h"

namespace heddle {

// Element `elements` of an array, or null where there is none.
inline const void* moved(const void* p, DType type, int64_t elements) {
  return p ? static_cast<const char*>(p) + elements * dtype_size(type) : nullptr;
}
inline void* moved(void* p, DType type, int64_t elements) {
  return p ? static_cast<char*>(p) + elements * dtype_size(type) : nullptr;
}

// Strides [batch, position, head, element] and over the sequences of a batch entry.
inline void set_axis_strides(Axis axis, const int64_t* from, bool packed, int64_t* to, int64_t* inner) {
  to[0] = packed ? 0 : from[0];
  to[1] = packed || axis != Axis::kTime ? from[2] : from[1];
  to[2] = from[3];
  *inner = packed || axis == Axis::kJoint ? 0 : axis == Axis::kTime ? from[2] : from[1];
}

inline int64_t elements_between(const void* a, const void* b, DType type) {
  return (reinterpret_cast<intptr_t>(b) - reinterpret_cast<intptr_t>(a)) / dtype_size(type);
}

// Heads [first, first + heads) over one axis. Joint needs frames that follow each other: the front sees to it.
inline AttentionProblem axis_problem(const FactorizedProblem& f, Axis axis, int32_t first, int32_t heads) {
  AttentionProblem p;
  const bool packed = f.batch_offsets != nullptr, time = axis == Axis::kTime, joint = axis == Axis::kJoint;
  const int32_t group = f.query_heads ? f.query_heads / f.key_heads : 1, first_key = first / group;
  p.query_heads = heads;
  p.key_heads = f.query_heads ? heads / group : f.key_heads;
  p.head_dim = f.head_dim;
  p.value_dim = f.value_dim;
  p.type = f.type;
  p.query = moved(f.query, f.type, first * f.query_stride[3]);
  p.key = moved(f.key, f.type, first_key * f.key_stride[3]);
  p.value = moved(f.value, f.type, first_key * f.value_stride[3]);
  set_axis_strides(axis, f.query_stride, packed, p.query_stride, &p.inner_stride.query);
  set_axis_strides(axis, f.key_stride, packed, p.key_stride, &p.inner_stride.key);
  set_axis_strides(axis, f.value_stride, packed, p.value_stride, &p.inner_stride.value);
  p.query_stride[3] = f.query_stride[4];
  p.key_stride[3] = f.key_stride[4];
  p.value_stride[3] = f.value_stride[4];
  set_axis_strides(axis, f.output_stride, packed, p.output_stride, &p.inner_stride.output);

  const int64_t tokens = f.frames * f.patches;
  const int64_t lse[5] = {f.query_heads * tokens, f.patches, 1, tokens, 0}, row[5] = {tokens, f.patches, 1, 0, 0};
  set_axis_strides(axis, lse, false, p.lse_stride, &p.inner_stride.lse);
  int64_t token[3];
  set_axis_strides(axis, row, packed, token, &p.inner_stride.token);
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
    p.longest = p.queries;
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

// One call of attention(): heads [first, first + heads) over one axis.
struct AxisPass {
  Axis axis;
  int32_t first, heads;
};

// Writes the one pass, or the two of split heads, and returns how many.
inline int axis_passes(const FactorizedProblem& f, AxisPass* passes) {
  passes[0] = {f.axis, 0, f.query_heads};
  if (f.axis != Axis::kSplitHeads) return 1;
  const int32_t half = f.query_heads / 2;
  passes[0] = {Axis::kTime, 0, half};
  passes[1] = {Axis::kSpace, half, half};
  return 2;
}

inline int64_t lse_head_stride(const FactorizedProblem& f) {
  return f.batch_offsets ? f.lse_head : f.frames * f.patches;
}

// Of a frame in the mean that the class token's output is.
inline float frame_weight(const FactorizedProblem& f) { return f.frames ? 1.0f / static_cast<float>(f.frames) : 0.0f; }

// attention() of one pass. `class_output`: the class token's outputs, one a frame.
inline AttentionArgs pass_args(const FactorizedAttentionArgs& a, const AxisPass& pass, float* class_output) {
  const FactorizedProblem& f = a.problem;
  AttentionArgs args;
  args.problem = axis_problem(f, pass.axis, pass.first, pass.heads);
  args.output = moved(a.output, f.type, pass.first * f.output_stride[3]);
  args.log_sum_exp = a.log_sum_exp ? a.log_sum_exp + pass.first * lse_head_stride(f) : nullptr;
  args.prefix_output = class_output;
  return args;
}

// Of the class token in each frame: output, log-sum-exp, and the gradients of q, k and v, [batch, frame, head, ...].
struct ClassFrames {
  float *output = nullptr, *lse = nullptr, *query = nullptr, *key = nullptr, *value = nullptr;
};

// attention() with the class token alone as query: its outputs in the frames again, for the backward.
inline AttentionArgs class_args(const FactorizedProblem& f, const ClassFrames& frames) {
  AttentionArgs args;
  args.problem = axis_problem(f, Axis::kSpace, 0, f.query_heads);
  args.problem.queries = 1;
  args.prefix_output = frames.output;
  args.prefix_lse = frames.lse;
  return args;
}

// attention_backward() of one pass.
inline AttentionBackwardArgs pass_args(const FactorizedAttentionBackwardArgs& a, const AxisPass& pass,
                                       const ClassFrames& frames) {
  const FactorizedProblem& f = a.problem;
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
  args.prefix_output = frames.output;
  args.prefix_lse = frames.lse;
  args.prefix_query_grad = frames.query;
  args.prefix_key_grad = frames.key;
  args.prefix_value_grad = frames.value;
  return args;
}

}  // namespace heddle
