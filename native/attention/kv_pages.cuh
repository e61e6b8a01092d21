// Single elements of a cache's pages on the device; decode_attention.h has the layout.
#pragma once
#include "attention/kv_cache.h"
#include "cuda/device.cuh"

namespace heddle {

// Where the token at a position lies: page and slot.
struct PageSlot {
  int64_t page, slot;
};
// `table` holds the pages from `first` / page_size on.
__device__ inline PageSlot page_slot(const KvPools& p, const int32_t* table, int64_t first, int64_t position) {
  const int64_t page = position / p.page_size;
  return {table[page - first / p.page_size], position % p.page_size};
}

// Word of element e of a slot, counted from the first of the page and head.
__device__ inline int64_t key_word(const KvPools& p, int64_t slot, int32_t e) {
  return (slot / kSlotBlock * p.key_words() + e / p.group()) * kSlotBlock + slot % kSlotBlock;
}
__device__ inline int64_t value_word(const KvPools& p, int64_t slot, int32_t e) {
  return slot / p.group() * p.value_dim + e;
}

// Element `lane` of a word, without its scale.
template <CacheType T>
__device__ inline float word_element(const void* pool, int64_t word, int lane) {
  if constexpr (T == CacheType::kFloat32) {
    return static_cast<const float*>(pool)[word];
  } else if constexpr (T == CacheType::kFloat16) {
    return widen_f16(static_cast<const uint16_t*>(pool)[word]);
  } else if constexpr (T == CacheType::kBFloat16) {
    return widen_bf16(static_cast<const uint16_t*>(pool)[2 * word + lane]);
  } else if constexpr (T == CacheType::kInt8) {
    return static_cast<float>(static_cast<const int8_t*>(pool)[4 * word + lane]);
  } else {
    const int byte = static_cast<const uint8_t*>(pool)[4 * word + lane % 4];
    return static_cast<float>((lane < 4 ? byte & 15 : byte >> 4) - 8);
  }
}
template <CacheType T>
__device__ inline float key_element(const KvPools& p, int64_t page, int64_t head, int64_t slot, int32_t e) {
  const int64_t vector = page * p.key_heads + head;
  return word_element<T>(p.keys, vector * p.page_key_words() + key_word(p, slot, e), e % cache_group(T));
}
template <CacheType T>
__device__ inline float value_element(const KvPools& p, int64_t page, int64_t head, int64_t slot, int32_t e) {
  const int64_t vector = page * p.key_heads + head;
  return word_element<T>(p.values, vector * p.page_value_words() + value_word(p, slot, e),
                         static_cast<int>(slot % cache_group(T)));
}

// Where element `lane` stands in its word.
template <CacheType T>
__device__ __forceinline__ int element_shift(int lane) {
  if constexpr (T == CacheType::kBFloat16) return 16 * lane;
  if constexpr (T == CacheType::kInt8) return 8 * lane;
  if constexpr (T == CacheType::kInt4) return 8 * (lane % 4) + 4 * (lane / 4);
  return 0;
}
template <CacheType T>
__device__ __forceinline__ uint32_t raw_word(const void* pool, int64_t word) {
  if constexpr (T == CacheType::kFloat16) return static_cast<const uint16_t*>(pool)[word];
  else return static_cast<const uint32_t*>(pool)[word];
}
template <CacheType T>
__device__ __forceinline__ void put_raw_word(void* pool, int64_t word, uint32_t bits) {
  if constexpr (T == CacheType::kFloat16) static_cast<uint16_t*>(pool)[word] = static_cast<uint16_t>(bits);
  else static_cast<uint32_t*>(pool)[word] = bits;
}
// The bits of element `lane` of a word, in the low bits.
template <CacheType T>
__device__ __forceinline__ uint32_t raw_element(const void* pool, int64_t word, int lane) {
  const uint32_t bits = raw_word<T>(pool, word) >> element_shift<T>(lane);
  constexpr uint32_t kMask = T == CacheType::kBFloat16 ? 0xffffu : T == CacheType::kInt8 ? 0xffu : T == CacheType::kInt4 ? 0xfu : ~0u;
  return bits & kMask;
}

// Calls f(CacheTag<T>()) for a type that is known at run time (host code).
template <CacheType T>
struct CacheTag {
  static constexpr CacheType value = T;
};
template <class F>
auto with_cache_type(CacheType type, F&& f) {
  switch (type) {
    case CacheType::kFloat16: return f(CacheTag<CacheType::kFloat16>{});
    case CacheType::kBFloat16: return f(CacheTag<CacheType::kBFloat16>{});
    case CacheType::kInt8: return f(CacheTag<CacheType::kInt8>{});
    case CacheType::kInt4: return f(CacheTag<CacheType::kInt4>{});
    default: return f(CacheTag<CacheType::kFloat32>{});
  }
}

}  // namespace heddle
