// Attention of the newest tokens of sequences whose keys and values lie in pages.
//
// Definition: attention.h, causal, with key j of batch entry b at slot j % page_size of its page j / page_size; the
// page table holds the pages from starts[b] / page_size on, and keys before starts[b] are gone. int8 and int4 elements
// are multiplied by the scale of their vector.
//
// Layout of pools, the same for every instruction set, so that both products are vertical (no sums across lanes):
//   keys    [page][key head][slot / 16][dim / g][slot % 16][dim % g]   a word = g dims of one slot
//   values  [page][key head][slot / g][dim][slot % g]                  a word = g slots of one dim
//   scales  [page][key head][slot]
// g = 1 for float32 and float16, 2 for bfloat16, 4 for int8, 8 for int4; slots are padded to 16, dims of keys to g. In a
// word of int4, byte b holds element b in its low and element b + 4 in its high nibble, each plus 8.
//
// The keys of a sequence are split into parts of kDecodePart at fixed positions, each with its own (max, sum, output);
// the parts are merged in key order in float64. Parts depend on positions alone, so a sequence's result is bitwise the
// same in any batch, on any number of threads, with any page size, and whether pages before its window are still there.
// Precision as in attention.h. With vpdpbusd, q is split into three signed bytes and p into three unsigned ones (24 bits
// below the largest element of q, or of p times scale in the part; so the scales of values must not be negative, and
// KVCache's never are), and the products with int8 and int4 elements are exact.
//
// Cost: every key and value is read once per 16 rows (rows = queries x group). Lessons, measured on a Xeon:
// see the end of decode_attention-inl.h.
#pragma once
#include "attention/problem.h"
#include "simd/dispatch.h"

namespace heddle {

constexpr int kDecodePart = 1024;  // keys
constexpr int kSlotBlock = 16;     // slots whose words stand beside each other

// The numbers are those of DType, which has no 4-bit integers (lib/attention/kvLayout.ts).
enum class CacheType : int32_t { kFloat32 = 0, kFloat16 = 2, kBFloat16 = 3, kInt8 = 4, kInt4 = 16 };

HEDDLE_BOTH constexpr int cache_group(CacheType t) {
  return t == CacheType::kBFloat16 ? 2 : t == CacheType::kInt8 ? 4 : t == CacheType::kInt4 ? 8 : 1;
}
HEDDLE_BOTH constexpr int cache_word_bytes(CacheType t) { return t == CacheType::kFloat16 ? 2 : 4; }
HEDDLE_BOTH constexpr bool cache_is_integer(CacheType t) { return t == CacheType::kInt8 || t == CacheType::kInt4; }

struct DecodeAttentionArgs {
  AttentionProblem problem;  // batch, queries, heads, dims, q, scale, softcap, alibi, sinks, left; no k and v
  CacheType cache_type = CacheType::kFloat32;
  const void *keys = nullptr, *values = nullptr;
  const float *key_scales = nullptr, *value_scales = nullptr;
  int64_t page_size = 1;
  const int32_t* table = nullptr;  // [batch, table_stride]
  int64_t table_stride = 0;
  const int32_t *starts = nullptr, *lengths = nullptr;  // [batch]
  void* output = nullptr;                               // [batch, queries, query_heads, value_dim], in the type of q
  float* log_sum_exp = nullptr;                         // [batch, query_heads, queries]
  // Filled in by decode_attention().
  const int64_t *first_part = nullptr, *part_offset = nullptr;  // [batch + 1]: of all parts; [batch]: parts skipped before
  char* packed = nullptr;                                       // q of all units, as part.h's PartQuery
  float* partial = nullptr;                                     // [part][key head]: shifts, totals, sums of all rows
  int64_t partial_floats = 0;                                   // of one part and key head
};

// Floats of one row of a partial result: shift, total, largest logit's key and sums, for every vector width.
constexpr int kPartialHead = 4;
HEDDLE_BOTH inline int64_t decode_row_floats(const AttentionProblem& p) { return kPartialHead + (p.value_dim + 15) / 16 * 16; }

// kOk, kCancelled or kNoMemory. decode_attention() plans, decode_parts() computes and merges.
Status decode_attention(const DecodeAttentionArgs& args, const Exec& exec);
HEDDLE_DECLARE_OP(decode_parts, DecodeAttentionArgs)

}  // namespace heddle
