// heddle/attention for JavaScript: reads arguments in the order of lib/attention/layout.ts.
#include "attention/attention.h"

#include "attention/attention_backward.h"
#include "attention/decode_attention.h"
#include "attention/factorized_attention.h"
#include "attention/kv_cache.h"
#include "attention/rotary_embedding.h"
#include "attention/stream_attention.h"

#include "binding/addon.h"
#include "binding/call.h"
#include "binding/cuda.h"
#include "core/huge.h"

namespace heddle::binding {
namespace {

// The numbers of a problem in one array, in the order of lib/attention/layout.ts and factorizedLayout.ts.
class Numbers {
 public:
  explicit Numbers(Call& call) : next_(call.host_array<double>()) {}
  double number() { return *next_++; }
  int64_t integer() { return static_cast<int64_t>(number()); }
  void integers(int64_t* to, int count) {
    for (int i = 0; i < count; ++i) to[i] = integer();
  }

 private:
  const double* next_;
};

AttentionProblem attention_problem(Call& call) {
  AttentionProblem p;
  Numbers n(call);
  p.batch = n.integer();
  p.queries = n.integer();
  p.keys = n.integer();
  p.query_heads = static_cast<int32_t>(n.integer());
  p.key_heads = static_cast<int32_t>(n.integer());
  p.head_dim = static_cast<int32_t>(n.integer());
  p.value_dim = static_cast<int32_t>(n.integer());
  n.integers(p.query_stride, 4);
  n.integers(p.key_stride, 4);
  n.integers(p.value_stride, 4);
  n.integers(p.bias_stride, 3);
  n.integers(p.mask_stride, 3);
  n.integers(p.block_stride, 3);
  p.block_query = n.integer();
  p.block_key = n.integer();
  p.query_id_stride = n.integer();
  p.key_id_stride = n.integer();
  p.left = n.integer();
  p.right = n.integer();
  p.scale = static_cast<float>(n.number());
  p.softcap = static_cast<float>(n.number());
  p.uniform_empty = n.integer() != 0;
  p.segments = n.integer();
  p.type = call.dtype();
  p.query = call.array<const void>();
  p.key = call.array<const void>();
  p.value = call.array<const void>();
  p.bias = call.array<const void>();
  p.bias_type = call.dtype();
  p.alibi = call.array<const float>();
  p.sinks = call.array<const float>();
  p.mask = call.array<const uint8_t>();
  p.block_mask = call.array<const uint8_t>();
  p.query_ids = call.array<const int32_t>();
  p.key_ids = call.array<const int32_t>();
  p.query_offsets = call.array<const int32_t>();
  p.key_offsets = call.array<const int32_t>();
  p.set_contiguous_results();
  return p;
}

Napi::Value attention_call(const Napi::CallbackInfo& info) {
  Call call(info);
  AttentionArgs a;
  a.problem = attention_problem(call);
  a.output = call.array<void>();
  a.log_sum_exp = call.array<float>();
  return call.submit(std::move(a), attention);
}

Napi::Value attention_backward_call(const Napi::CallbackInfo& info) {
  Call call(info);
  AttentionBackwardArgs a;
  a.problem = attention_problem(call);
  a.upstream = call.array<const void>();
  a.output = call.array<const void>();
  a.log_sum_exp = call.array<const float>();
  a.query_grad = call.array<void>();
  a.key_grad = call.array<void>();
  a.value_grad = call.array<void>();
  a.bias_grad = call.array<float>();
  return call.submit(std::move(a), attention_backward);
}

Napi::Value decode_attention_call(const Napi::CallbackInfo& info) {
  Call call(info);
  DecodeAttentionArgs a;
  a.problem = attention_problem(call);
  a.cache_type = static_cast<CacheType>(call.integer());
  a.keys = call.array<const void>();
  a.values = call.array<const void>();
  a.key_scales = call.array<const float>();
  a.value_scales = call.array<const float>();
  a.page_size = call.integer();
  a.table = call.array<const int32_t>();
  a.table_stride = call.integer();
  a.starts = call.array<const int32_t>();
  a.lengths = call.array<const int32_t>();
  a.output = call.array<void>();
  a.log_sum_exp = call.array<float>();
  return call.submit(std::move(a), decode_attention);
}

// Pages on the device, in the order of lib/attention/kvPages.ts. These have no form on the CPU.
KvPools kv_pools(Call& call) {
  KvPools p;
  p.type = static_cast<CacheType>(call.integer());
  p.key_heads = static_cast<int32_t>(call.integer());
  p.head_dim = static_cast<int32_t>(call.integer());
  p.value_dim = static_cast<int32_t>(call.integer());
  p.page_size = call.integer();
  p.keys = call.array<void>();
  p.values = call.array<void>();
  p.key_scales = call.array<float>();
  p.value_scales = call.array<float>();
  return p;
}

Napi::Value kv_clear_call(const Napi::CallbackInfo& info) {
  Call call(info);
  KvClearArgs a;
  a.pools = kv_pools(call);
  a.pages = call.integer();
  return call.submit_to_device(std::move(a));
}

Napi::Value kv_append_call(const Napi::CallbackInfo& info) {
  Call call(info);
  KvAppendArgs a;
  a.pools = kv_pools(call);
  a.copy_from = call.integer();
  a.copy_to = call.integer();
  a.table = call.array<const int32_t>();
  a.position = call.integer();
  a.count = call.integer();
  a.keys = call.array<const void>();
  a.key_type = call.dtype();
  a.values = call.array<const void>();
  a.value_type = call.dtype();
  return call.submit_to_device(std::move(a));
}

Napi::Value kv_read_call(const Napi::CallbackInfo& info) {
  Call call(info);
  KvReadArgs a;
  a.pools = kv_pools(call);
  a.table = call.array<const int32_t>();
  a.position = call.integer();
  a.count = call.integer();
  a.keys = call.array<float>();
  a.values = call.array<float>();
  return call.submit_to_device(std::move(a));
}

Napi::Value stream_attention_call(const Napi::CallbackInfo& info) {
  Call call(info);
  StreamAttentionArgs a;
  a.problem = attention_problem(call);
  a.block_type = call.dtype();
  a.keys = call.array<void>();
  a.values = call.array<void>();
  a.key_scales = call.array<float>();
  a.value_scales = call.array<float>();
  a.tokens = call.integer();
  a.offset = call.integer();
  a.total_keys = call.integer();
  a.state = call.array<double>();
  a.want_best = call.boolean();
  return call.submit(std::move(a), stream_attention);
}

// Large typed arrays that nothing has written yet get 2 MiB pages where the system has them.
void advise_huge_pages(const Napi::CallbackInfo& info) {
  const Napi::TypedArray x = info[0].As<Napi::TypedArray>();
  HugeBuffer::advise(static_cast<char*>(x.ArrayBuffer().Data()) + x.ByteOffset(), x.ByteLength());
}

Napi::Value rotary_embedding_call(const Napi::CallbackInfo& info) {
  Call call(info);
  RotaryEmbeddingArgs a;
  a.x = call.array<const void>();
  a.type = call.dtype();
  a.batch = call.integer();
  a.length = call.integer();
  a.heads = call.integer();
  a.dim = static_cast<int32_t>(call.integer());
  a.positions = call.array<const int32_t>();
  a.axis_stride = call.integer();
  a.batch_stride = call.integer();
  a.offset = call.integer();
  a.frequency = call.array<const double>();
  a.axis = call.array<const int32_t>();
  a.count = static_cast<int32_t>(call.integer());
  a.angle = call.array<const int32_t>();
  a.partner = call.array<const int32_t>();
  a.factor = static_cast<float>(call.number());
  a.out = call.array<void>();
  return call.submit(std::move(a), rotary_embedding);
}

// In the order of lib/attention/factorizedLayout.ts.
FactorizedProblem factorized_problem(Call& call) {
  FactorizedProblem f;
  Numbers n(call);
  f.axis = static_cast<Axis>(n.integer());
  f.batch = n.integer();
  f.frames = n.integer();
  f.patches = n.integer();
  f.query_heads = static_cast<int32_t>(n.integer());
  f.key_heads = static_cast<int32_t>(n.integer());
  f.head_dim = static_cast<int32_t>(n.integer());
  f.value_dim = static_cast<int32_t>(n.integer());
  n.integers(f.query_stride, 5);
  n.integers(f.key_stride, 5);
  n.integers(f.value_stride, 5);
  n.integers(f.output_stride, 5);
  n.integers(f.class_query_stride, 2);
  n.integers(f.class_key_stride, 2);
  n.integers(f.class_value_stride, 2);
  n.integers(f.class_output_stride, 2);
  n.integers(f.bias_stride, 4);
  n.integers(f.mask_stride, 4);
  f.left = n.integer();
  f.right = n.integer();
  f.scale = static_cast<float>(n.number());
  f.softcap = static_cast<float>(n.number());
  f.uniform_empty = n.integer() != 0;
  f.tokens = n.integer();
  f.lse_batch = n.integer();
  f.lse_head = n.integer();
  f.type = call.dtype();
  f.query = call.array<const void>();
  f.key = call.array<const void>();
  f.value = call.array<const void>();
  f.class_query = call.array<const void>();
  f.class_key = call.array<const void>();
  f.class_value = call.array<const void>();
  f.bias = call.array<const void>();
  f.bias_type = call.dtype();
  f.alibi = call.array<const float>();
  f.sinks = call.array<const float>();
  f.mask = call.array<const uint8_t>();
  f.batch_offsets = call.array<const int32_t>();
  f.frame_offsets = call.array<const int32_t>();
  f.patch_offsets = call.array<const int32_t>();
  f.order = call.array<const int32_t>();
  return f;
}

Napi::Value factorized_attention_call(const Napi::CallbackInfo& info) {
  Call call(info);
  FactorizedAttentionArgs a;
  a.problem = factorized_problem(call);
  a.output = call.array<void>();
  a.log_sum_exp = call.array<float>();
  a.class_output = call.array<void>();
  return call.submit(std::move(a), factorized_attention);
}

Napi::Value factorized_attention_backward_call(const Napi::CallbackInfo& info) {
  Call call(info);
  FactorizedAttentionBackwardArgs a;
  a.problem = factorized_problem(call);
  a.upstream = call.array<const void>();
  a.output = call.array<const void>();
  a.log_sum_exp = call.array<const float>();
  a.class_upstream = call.array<const void>();
  a.query_grad = call.array<void>();
  a.key_grad = call.array<void>();
  a.value_grad = call.array<void>();
  a.bias_grad = call.array<float>();
  a.class_query_grad = call.array<void>();
  a.class_key_grad = call.array<void>();
  a.class_value_grad = call.array<void>();
  return call.submit(std::move(a), factorized_attention_backward);
}

}  // namespace

void register_attention(Napi::Env env, Napi::Object exports) {
  exports.Set("attention", Napi::Function::New(env, attention_call));
  exports.Set("decodeAttention", Napi::Function::New(env, decode_attention_call));
  exports.Set("streamAttention", Napi::Function::New(env, stream_attention_call));
  exports.Set("adviseHugePages", Napi::Function::New(env, advise_huge_pages));
  exports.Set("rotaryEmbedding", Napi::Function::New(env, rotary_embedding_call));
  exports.Set("attentionBackward", Napi::Function::New(env, attention_backward_call));
  exports.Set("factorizedAttention", Napi::Function::New(env, factorized_attention_call));
  exports.Set("factorizedAttentionBackward", Napi::Function::New(env, factorized_attention_backward_call));
}

void register_cuda_attention(CudaExports& ops) {
  ops.add("attention", attention_call, "heddle_cuda_attention");
  ops.add("factorizedAttention", factorized_attention_call, "heddle_cuda_factorized_attention");
  ops.add("decodeAttention", decode_attention_call, "heddle_cuda_decode_attention");
  ops.add("kvClear", kv_clear_call, "heddle_cuda_kv_clear");
  ops.add("kvAppend", kv_append_call, "heddle_cuda_kv_append");
  ops.add("kvRead", kv_read_call, "heddle_cuda_kv_read");
  ops.add("attentionBackward", attention_backward_call, "heddle_cuda_attention_backward");
  ops.add("factorizedAttentionBackward", factorized_attention_backward_call,
          "heddle_cuda_factorized_attention_backward");
  ops.add("rotaryEmbedding", rotary_embedding_call, "heddle_cuda_rotary_embedding");
}

}  // namespace heddle::binding
