// A cache of keys and values in pages, on the device: KVCache with device cuda (lib/attention/kvPages.ts).
//
// Layout of the pools: decode_attention.h. The front owns the block tables; what is done to pages is done here:
//   clear      all pools become zero (padded dims and slots are read, with weight 0)
//   append     writes tokens behind the end of a sequence. int8 and int4: scale = largest magnitude / 127 or / 7 in
//              fp32, element = floor(x / scale + 1/2) in fp64: the bits of the CPU. A vector with a NaN or an infinity
//              gets the scale NaN and zeros. A shared page is copied first, in the same job: either both are done or
//              neither.
//   read       elements times scale, as float32
#pragma once
#include "attention/decode_attention.h"

namespace heddle {

struct KvPools {
  CacheType type = CacheType::kFloat32;
  int32_t key_heads = 1, head_dim = 1, value_dim = 1;
  int64_t page_size = 1;
  void *keys = nullptr, *values = nullptr;
  float *key_scales = nullptr, *value_scales = nullptr;  // null for floating types

  HEDDLE_BOTH int64_t slots() const { return (page_size + kSlotBlock - 1) / kSlotBlock * kSlotBlock; }
  // Words of the keys of one slot, and of one page and head.
  HEDDLE_BOTH int64_t key_words() const { return (head_dim + group() - 1) / group(); }
  HEDDLE_BOTH int64_t page_key_words() const { return slots() * key_words(); }
  HEDDLE_BOTH int64_t page_value_words() const { return slots() / group() * value_dim; }
  HEDDLE_BOTH int32_t group() const { return cache_group(type); }
  HEDDLE_BOTH int32_t word_bytes() const { return cache_word_bytes(type); }
  HEDDLE_BOTH bool integers() const { return cache_is_integer(type); }
};

struct KvClearArgs {
  KvPools pools;
  int64_t pages = 0;
};

// Token t of `count` stands at position + t; `table` holds the pages from position / page_size on.
struct KvAppendArgs {
  KvPools pools;
  int64_t copy_from = -1, copy_to = -1;  // a page that is copied first; -1: none
  const int32_t* table = nullptr;
  int64_t position = 0, count = 0;
  const void *keys = nullptr, *values = nullptr;  // [count, key_heads, dim]
  DType key_type = DType::kFloat32, value_type = DType::kFloat32;
};

struct KvReadArgs {
  KvPools pools;
  const int32_t* table = nullptr;
  int64_t position = 0, count = 0;
  float *keys = nullptr, *values = nullptr;  // [count, key_heads, dim]
};

}  // namespace heddle
