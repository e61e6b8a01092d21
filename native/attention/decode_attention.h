// Attention of the newest tokens of sequences whose keys and values lie in pages.
//
// Definition: attention.h, causal, with key j of batch entry b at slot j % page_size of page table[b][j / page_size];
// pools are [page][key head][slot][dim]; int8 elements are multiplied by the scale of their vector.
//
// The keys of a sequence are split into parts of kDecodePart, each with its own (max, sum, output); the parts are
// merged in key order. Parts depend on the length alone, so a sequence's result is bitwise the same in any batch and
// on any number of threads. Precision as in attention.h; a part more costs one more rounding of the sums.
//
// Cost: every key and value is read once for all heads of its group. With few rows the packing of panels (conversion,
// transpose of K) decides: fp32 comes to 60 % of the stream bandwidth of one core, bf16 and int8 take two thirds of
// fp32's time. Prefetching the next panel inside the micro-kernels gained nothing; kernels that take products straight
// from the pages, without a packed panel, are the next step.
#pragma once
#include "attention/problem.h"
#include "simd/dispatch.h"

namespace heddle {

constexpr int64_t kDecodePart = 1024;

struct DecodeAttentionArgs {
  AttentionProblem problem;  // batch, queries, heads, dims, q, scale, softcap, alibi, sinks, left; no k and v
  DType cache_type = DType::kFloat32;
  const void *keys = nullptr, *values = nullptr;
  const float *key_scales = nullptr, *value_scales = nullptr;  // [page][key head][slot], for int8
  int64_t page_size = 1;
  const int32_t* table = nullptr;  // [batch, table_stride]
  int64_t table_stride = 0;
  const int32_t* lengths = nullptr;  // [batch]
  void* output = nullptr;            // [batch, queries, query_heads, value_dim], in the type of q
  float* log_sum_exp = nullptr;      // [batch, query_heads, queries]
  // Filled in by decode_attention().
  const int64_t* first_part = nullptr;  // [batch + 1]
  float* partial = nullptr;             // [part][key head]: shifts, totals, sums of all rows
  int64_t partial_floats = 0;           // of one part and key head
};

// Floats of one row of a partial result: shift, total and sums, padded so that every vector width fits.
inline int64_t decode_row_floats(const AttentionProblem& p) { return 2 + (p.value_dim + 31) / 32 * 32; }

// kOk, kCancelled or kNoMemory. decode_attention() plans, decode_parts() computes and merges.
Status decode_attention(const DecodeAttentionArgs& args, const Exec& exec);
HEDDLE_DECLARE_OP(decode_parts, DecodeAttentionArgs)

}  // namespace heddle
