// One block of keys and values added to the running softmax of every query row.
//
// Definition: attention.h with the keys offset .. offset + tokens - 1 of total_keys; query i stands at key
// i + total_keys - queries. int8 elements are multiplied by the scale of their vector. After the last block
//   output = sums / total,  log-sum-exp = (shift + log2(total)) ln 2
// The block's parts of kDecodePart keys (at multiples of it) are computed in fp32 as in decode_attention.h and added
// to the state in key order in float64, so ten million keys lose nothing to one chain; blocks of whole parts give the
// same bits whatever their size. Any number of threads gives the same bits.
//
// Cost: keys are transposed 64 at a time into L1, values that are float32 and of one head are read in place.
#pragma once
#include "attention/decode_attention.h"

namespace heddle {

struct StreamAttentionArgs {
  AttentionProblem problem;  // one batch entry: queries, heads, dims, q, scale, softcap, alibi, left, right; no k and v
  DType block_type = DType::kFloat32;
  const void *keys = nullptr, *values = nullptr;               // [tokens, key_heads, dim]
  const float *key_scales = nullptr, *value_scales = nullptr;  // [tokens, key_heads] or null
  int64_t tokens = 0, offset = 0, total_keys = 0;
  double* state = nullptr;  // [queries][heads]: shift, total, best logit in units of ln 2, its key or -1, sums
  bool want_best = false;
  // Filled in by stream_attention().
  int64_t first_part = 0, parts = 0;
  float* partial = nullptr;
  char* packed = nullptr;
};

constexpr int kStateHead = 4;

Status stream_attention(const StreamAttentionArgs& args, const Exec& exec);
HEDDLE_DECLARE_OP(stream_parts, StreamAttentionArgs)

}  // namespace heddle
