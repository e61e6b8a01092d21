// What is done to the pages of a cache on the device; definitions in kv_cache.h. Every word of a pool is written by one
// thread, which keeps the elements of older tokens in it: a decode that still reads them sees the same bits throughout.
//
// Floor: bytes of the new tokens, read once (int8 and int4: twice, the second time from L2) and written once. Decoding
// appends a token at a time, where the launches are all that counts. Not measured on a GPU yet.
#include "attention/kv_pages.cuh"
#include "cuda/job.h"
#include "cuda/warp.cuh"

namespace heddle {
namespace {

constexpr int kThreads = 256;
constexpr int64_t kMaxBlocks = 1 << 20;

unsigned blocks_for(int64_t threads) {
  const int64_t blocks = ceil_div(threads, kThreads);
  return static_cast<unsigned>(blocks < kMaxBlocks ? blocks : kMaxBlocks);
}

// A warp a vector; blockIdx.y: keys or values.
__global__ void __launch_bounds__(kThreads) kv_scale_kernel(KvAppendArgs a) {
  const KvPools& p = a.pools;
  const bool values = blockIdx.y == 1;
  const void* from = values ? a.values : a.keys;
  const DType type = values ? a.value_type : a.key_type;
  const int32_t dim = values ? p.value_dim : p.head_dim;
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  const int64_t step = int64_t{gridDim.x} * (kThreads / kWarp), vectors = a.count * p.key_heads;
  for (int64_t i = int64_t{blockIdx.x} * (kThreads / kWarp) + threadIdx.x / kWarp; i < vectors; i += step) {
    float largest = 0.0f;
    bool odd = false;  // NaN or infinite
    for (int32_t e = lane; e < dim; e += kWarp) {
      const float x = fabsf(load_as_float(from, type, i * dim + e));
      if (!(x < HUGE_VALF)) odd = true;
      else largest = x > largest ? x : largest;
    }
    largest = warp_max(largest);
    odd = __any_sync(kFullMask, odd);
    if (lane != 0) continue;
    const PageSlot at = page_slot(p, a.table, a.position, a.position + i / p.key_heads);
    const int64_t vector = at.page * p.key_heads + i % p.key_heads;
    float* scales = values ? p.value_scales : p.key_scales;
    const float top = p.type == CacheType::kInt8 ? 127.0f : 7.0f;
    scales[vector * p.slots() + at.slot] = odd ? __uint_as_float(0x7fc00000u) : __fdiv_rn(largest, top);
  }
}

// The bits of one element of a word; `scale` of its vector for integers.
template <CacheType T>
__device__ __forceinline__ uint32_t element_bits(float x, float scale) {
  if constexpr (T == CacheType::kFloat32) return __float_as_uint(x);
  if constexpr (T == CacheType::kBFloat16) return round_bf16(x);
  if constexpr (T == CacheType::kFloat16) return round_f16(x);
  constexpr double kTop = T == CacheType::kInt8 ? 127.0 : 7.0;
  double n = 0.0;
  if (scale > 0.0f && scale < HUGE_VALF) {
    const double ratio = static_cast<double>(x) / static_cast<double>(scale);
    n = floor(ratio);
    if (ratio - n >= 0.5) n += 1.0;  // as Math.round
    n = n < -kTop ? -kTop : n > kTop ? kTop : n;
  }
  const int i = static_cast<int>(n);
  return T == CacheType::kInt8 ? static_cast<uint32_t>(i) & 0xffu : static_cast<uint32_t>(i + 8);
}
template <CacheType T>
__device__ __forceinline__ uint32_t element_mask(int lane) {
  if constexpr (T == CacheType::kBFloat16) return 0xffffu << element_shift<T>(lane);
  if constexpr (T == CacheType::kInt8) return 0xffu << element_shift<T>(lane);
  if constexpr (T == CacheType::kInt4) return 0xfu << element_shift<T>(lane);
  return 0xffffffffu;
}
// A thread a word of one slot.
template <CacheType T>
__global__ void __launch_bounds__(kThreads) kv_append_keys_kernel(KvAppendArgs a) {
  constexpr int G = cache_group(T);
  const KvPools& p = a.pools;
  const int64_t words = p.key_words(), all = a.count * p.key_heads * words, step = int64_t{gridDim.x} * kThreads;
  for (int64_t i = int64_t{blockIdx.x} * kThreads + threadIdx.x; i < all; i += step) {
    const int64_t w = i % words, vector = i / words, token = vector / p.key_heads, head = vector % p.key_heads;
    const PageSlot at = page_slot(p, a.table, a.position, a.position + token);
    const int64_t page = at.page * p.key_heads + head;
    const float scale = p.integers() ? p.key_scales[page * p.slots() + at.slot] : 1.0f;
    uint32_t word = 0;
#pragma unroll
    for (int g = 0; g < G; ++g) {
      const int64_t e = w * G + g;
      const float x = e < p.head_dim ? load_as_float(a.keys, a.key_type, vector * p.head_dim + e) : 0.0f;
      word |= element_bits<T>(x, scale) << element_shift<T>(g);
    }
    put_raw_word<T>(p.keys, page * p.page_key_words() + key_word(p, at.slot, static_cast<int32_t>(w * G)), word);
  }
}

// A thread a word of a group of slots and one dim: the first new token in the group writes for the others.
template <CacheType T>
__global__ void __launch_bounds__(kThreads) kv_append_values_kernel(KvAppendArgs a) {
  constexpr int G = cache_group(T);
  const KvPools& p = a.pools;
  const int64_t row = int64_t{p.key_heads} * p.value_dim, all = a.count * row, step = int64_t{gridDim.x} * kThreads;
  for (int64_t i = int64_t{blockIdx.x} * kThreads + threadIdx.x; i < all; i += step) {
    const int64_t token = i / row, head = i % row / p.value_dim;
    const auto e = static_cast<int32_t>(i % p.value_dim);
    const PageSlot at = page_slot(p, a.table, a.position, a.position + token);
    const int first = static_cast<int>(at.slot % G);
    if (token > 0 && first > 0) continue;
    const int64_t page = at.page * p.key_heads + head;
    const int64_t index = page * p.page_value_words() + value_word(p, at.slot, e);
    int64_t last = first + a.count - token;  // one behind the last lane of this word that is new
    if (last > G) last = G;
    if (last > p.page_size - at.slot + first) last = p.page_size - at.slot + first;
    uint32_t word = 0;
    if (first > 0) word = static_cast<const uint32_t*>(p.values)[index];
#pragma unroll 1
    for (int lane = first; lane < last; ++lane) {
      const float scale = p.integers() ? p.value_scales[page * p.slots() + at.slot + lane - first] : 1.0f;
      const float x = load_as_float(a.values, a.value_type, i + (lane - first) * row);
      word = (word & ~element_mask<T>(lane)) | element_bits<T>(x, scale) << element_shift<T>(lane);
    }
    put_raw_word<T>(p.values, index, word);
  }
}

// blockIdx.y: keys or values.
template <CacheType T>
__global__ void __launch_bounds__(kThreads) kv_read_kernel(KvReadArgs a) {
  const KvPools& p = a.pools;
  const bool values = blockIdx.y == 1;
  const int32_t dim = values ? p.value_dim : p.head_dim;
  const int64_t row = int64_t{p.key_heads} * dim, all = a.count * row, step = int64_t{gridDim.x} * kThreads;
  for (int64_t i = int64_t{blockIdx.x} * kThreads + threadIdx.x; i < all; i += step) {
    const int64_t head = i % row / dim;
    const auto e = static_cast<int32_t>(i % dim);
    const PageSlot at = page_slot(p, a.table, a.position, a.position + i / row);
    float x = values ? value_element<T>(p, at.page, head, at.slot, e) : key_element<T>(p, at.page, head, at.slot, e);
    if (cache_is_integer(T)) {
      x *= (values ? p.value_scales : p.key_scales)[(at.page * p.key_heads + head) * p.slots() + at.slot];
    }
    (values ? a.values : a.keys)[i] = x;
  }
}

struct Pool {
  void* data;
  int64_t bytes;  // of a page
};
int pools_of(const KvPools& p, Pool* out) {
  out[0] = {p.keys, p.key_heads * p.page_key_words() * p.word_bytes()};
  out[1] = {p.values, p.key_heads * p.page_value_words() * p.word_bytes()};
  if (!p.integers()) return 2;
  out[2] = {p.key_scales, p.key_heads * p.slots() * 4};
  out[3] = {p.value_scales, p.key_heads * p.slots() * 4};
  return 4;
}

int64_t copy_page(const KvPools& p, int64_t from, int64_t to, heddle_cuda_job& job) {
  Pool pools[4];
  const int count = pools_of(p, pools);
  for (int i = 0; i < count; ++i) {
    char* base = static_cast<char*>(pools[i].data);
    const cudaError_t error =
        cudaMemcpyAsync(base + to * pools[i].bytes, base + from * pools[i].bytes, static_cast<size_t>(pools[i].bytes),
                        cudaMemcpyDeviceToDevice, job.stream);
    if (error != cudaSuccess) return cuda::failed(error, "copy of a page");
  }
  return kOk;
}

}  // namespace

HEDDLE_CUDA_OP(kv_clear, KvClearArgs) {
  Pool pools[4];
  const int count = pools_of(a.pools, pools);
  for (int i = 0; i < count; ++i) {
    const cudaError_t error =
        cudaMemsetAsync(pools[i].data, 0, static_cast<size_t>(pools[i].bytes * a.pages), job.stream);
    if (error != cudaSuccess) return cuda::failed(error, "cudaMemsetAsync");
  }
  return job.launched();
}

HEDDLE_CUDA_OP(kv_append, KvAppendArgs) {
  const KvPools& p = a.pools;
  if (a.count == 0) return kOk;
  if (a.copy_from >= 0) {
    const int64_t status = copy_page(p, a.copy_from, a.copy_to, job);
    if (status != kOk) return status;
  }
  if (p.integers()) {
    const dim3 grid(blocks_for(a.count * p.key_heads * kWarp), 2);
    HEDDLE_LAUNCH(kv_scale_kernel, grid, dim3(kThreads), 0, job.stream, a);
  }
  return with_cache_type(p.type, [&](auto type) {
    constexpr CacheType T = decltype(type)::value;
    HEDDLE_LAUNCH((kv_append_keys_kernel<T>), dim3(blocks_for(a.count * p.key_heads * p.key_words())), dim3(kThreads), 0,
                  job.stream, a);
    HEDDLE_LAUNCH((kv_append_values_kernel<T>), dim3(blocks_for(a.count * p.key_heads * p.value_dim)), dim3(kThreads), 0,
                  job.stream, a);
    return job.launched();
  });
}

HEDDLE_CUDA_OP(kv_read, KvReadArgs) {
  const KvPools& p = a.pools;
  if (a.count == 0) return kOk;
  const int64_t dim = p.head_dim > p.value_dim ? p.head_dim : p.value_dim;
  return with_cache_type(p.type, [&](auto type) {
    HEDDLE_LAUNCH((kv_read_kernel<decltype(type)::value>), dim3(blocks_for(a.count * p.key_heads * dim), 2),
                  dim3(kThreads), 0, job.stream, a);
    return job.launched();
  });
}

}  // namespace heddle
