// Attention over one axis of video tokens [batch, frames, patches, heads, dim], without a transposed copy.
//
// Definition: the attention of attention.h, of each token over
//   joint  all tokens of its batch entry (causal and window count frames)
//   time   the tokens at its patch:  batch x patches sequences of `frames`
//   space  the tokens of its frame:  batch x frames sequences of `patches`
//   split  time for the first half of the heads, space for the second (ViViT, model 4)
// Kept tokens (masking) are packed, in ascending order of frame and patch; sequences are then ragged.
//
// A class token takes part in space only (TimeSformer): each frame's sequence begins with it, as query, key and value,
// and its output is the mean over the frames. So its gradients are sums over the frames.
//
// Design: an axis is an AttentionProblem with strides (see `inner`, `order` and `prefix` there); the kernels are those
// of attention() and attention_backward().
#pragma once
#include "attention/attention.h"
#include "attention/attention_backward.h"

namespace heddle {

enum class Axis : int32_t { kJoint = 0, kTime = 1, kSpace = 2, kSplitHeads = 3 };

struct FactorizedProblem {
  Axis axis = Axis::kJoint;
  int64_t batch = 0, frames = 0, patches = 0;
  int32_t query_heads = 0, key_heads = 0, head_dim = 0, value_dim = 0;
  DType type = DType::kFloat32;
  const void *query = nullptr, *key = nullptr, *value = nullptr;
  // batch, frame, patch, head, element; of packed tokens: 0, 0, token, head, element
  int64_t query_stride[5] = {}, key_stride[5] = {}, value_stride[5] = {}, output_stride[5] = {};
  const void *class_query = nullptr, *class_key = nullptr, *class_value = nullptr;
  int64_t class_query_stride[2] = {}, class_key_stride[2] = {}, class_value_stride[2] = {};  // batch, head
  int64_t class_output_stride[2] = {};
  const void* bias = nullptr;
  DType bias_type = DType::kFloat32;
  int64_t bias_stride[4] = {}, mask_stride[4] = {};  // batch, sequence, head, query
  const float *alibi = nullptr, *sinks = nullptr;
  const uint8_t* mask = nullptr;
  int64_t left = -1, right = -1;
  float scale = 1.0f, softcap = 0.0f;
  bool uniform_empty = false;
  // Packed tokens: where the batch entries, frames and patches begin; order lists the tokens by patch.
  const int32_t *batch_offsets = nullptr, *frame_offsets = nullptr, *patch_offsets = nullptr, *order = nullptr;
  int64_t tokens = 0, lse_batch = 0, lse_head = 0;  // lse strides of packed tokens
};

struct FactorizedAttentionArgs {
  FactorizedProblem problem;
  void* output = nullptr;
  float* log_sum_exp = nullptr;  // [batch, heads, frames, patches]
  void* class_output = nullptr;  // [batch, heads, value_dim], strided
};
Status factorized_attention(const FactorizedAttentionArgs& args, const Exec& exec);

struct FactorizedAttentionBackwardArgs {
  FactorizedProblem problem;
  const void *upstream = nullptr, *output = nullptr;  // upstream contiguous
  const float* log_sum_exp = nullptr;
  const void* class_upstream = nullptr;  // contiguous
  void *query_grad = nullptr, *key_grad = nullptr, *value_grad = nullptr;
  float* bias_grad = nullptr;
  void *class_query_grad = nullptr, *class_key_grad = nullptr, *class_value_grad = nullptr;
};
Status factorized_attention_backward(const FactorizedAttentionBackwardArgs& args, const Exec& exec);

}  // namespace heddle
