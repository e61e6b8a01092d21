// heddle/privacy for JavaScript: reads arguments in the order in which lib/privacy/layer.ts passes them.
#include "binding/addon.h"
#include "binding/call.h"
#include "binding/cuda.h"
#include "privacy/clipped_gradients.h"
#include "privacy/convolution.h"
#include "privacy/discrete_noise.h"
#include "privacy/experts.h"
#include "privacy/gaussian_noise.h"
#include "privacy/lora.h"
#include "privacy/per_sample_squared_norms.h"
#include "privacy/tied_embedding.h"

namespace heddle::binding {
namespace {

RowLayer row_layer(Call& call) {
  RowLayer l;
  l.samples = call.integer();
  l.positions = call.integer();
  l.input_count = call.integer();
  l.output_count = call.integer();
  l.inputs.data = call.array<void>();
  l.inputs.type = call.dtype();
  l.inputs.stride = l.input_count;
  l.grad_outputs.data = call.array<void>();
  l.grad_outputs.type = call.dtype();
  l.grad_outputs.stride = l.output_count;
  l.indices = call.array<int32_t>();
  l.padding_index = call.integer();
  l.mask = call.array<uint8_t>();
  l.bias = call.boolean();
  return l;
}

template <Status (*kernel)(const NormsArgs&, const Exec&)>
Napi::Value norms(const Napi::CallbackInfo& info) {
  Call call(info);
  NormsArgs a;
  a.layer = row_layer(call);
  a.method = static_cast<NormMethod>(call.integer());
  a.out = call.array<float>();
  return call.submit(std::move(a), kernel);
}

template <Status (*kernel)(const ClippedArgs&, const Exec&)>
Napi::Value clipped(const Napi::CallbackInfo& info) {
  Call call(info);
  ClippedArgs a;
  a.layer = row_layer(call);
  a.factors = call.array<float>();
  a.weight = call.array<float>();
  a.bias = call.array<float>();
  return call.submit(std::move(a), kernel);
}

ConvLayer conv_layer(Call& call) {
  ConvLayer l;
  l.samples = call.integer();
  l.in_channels = call.integer();
  l.out_channels = call.integer();
  l.groups = call.integer();
  std::memcpy(&l.shape, call.array<int32_t>(), sizeof l.shape);
  l.input = call.array<void>();
  l.input_type = call.dtype();
  l.grad_outputs = call.array<void>();
  l.grad_type = call.dtype();
  l.mask = call.array<uint8_t>();
  l.bias = call.boolean();
  return l;
}

Napi::Value conv_norms_call(const Napi::CallbackInfo& info) {
  Call call(info);
  ConvNormsArgs a;
  a.layer = conv_layer(call);
  a.method = static_cast<NormMethod>(call.integer());
  a.out = call.array<float>();
  return call.submit(std::move(a), conv_squared_norms);
}

Napi::Value conv_clipped_call(const Napi::CallbackInfo& info) {
  Call call(info);
  ConvClippedArgs a;
  a.layer = conv_layer(call);
  a.factors = call.array<float>();
  a.weight = call.array<float>();
  a.bias = call.array<float>();
  return call.submit(std::move(a), conv_clipped_gradients);
}

RowSource row_source(Call& call, int64_t stride) {
  RowSource s;
  s.data = call.array<void>();
  s.type = call.dtype();
  s.stride = stride;
  return s;
}

LoraLayer lora_layer(Call& call) {
  LoraLayer l;
  l.rows = row_layer(call);
  l.rank = call.integer();
  l.a = row_source(call, l.rows.input_count);
  l.b = row_source(call, l.rank);
  l.scale = static_cast<float>(call.number());
  return l;
}

Napi::Value lora_norms_call(const Napi::CallbackInfo& info) {
  Call call(info);
  LoraNormsArgs a;
  a.layer = lora_layer(call);
  a.method = static_cast<NormMethod>(call.integer());
  a.out = call.array<float>();
  return call.submit(std::move(a), lora_squared_norms);
}

Napi::Value lora_clipped_call(const Napi::CallbackInfo& info) {
  Call call(info);
  LoraClippedArgs a;
  a.layer = lora_layer(call);
  a.factors = call.array<float>();
  a.a = call.array<float>();
  a.b = call.array<float>();
  return call.submit(std::move(a), lora_clipped_gradients);
}

TiedLayer tied_layer(Call& call) {
  TiedLayer l;
  l.samples = call.integer();
  l.positions = call.integer();
  l.width = call.integer();
  l.vocabulary = call.integer();
  l.indices = call.array<int32_t>();
  l.padding_index = call.integer();
  l.mask = call.array<uint8_t>();
  l.grad_embeddings = row_source(call, l.width);
  l.hidden = row_source(call, l.width);
  l.grad_logits = row_source(call, l.vocabulary);
  return l;
}

Napi::Value tied_norms_call(const Napi::CallbackInfo& info) {
  Call call(info);
  TiedNormsArgs a;
  a.layer = tied_layer(call);
  a.method = static_cast<NormMethod>(call.integer());
  a.out = call.array<float>();
  return call.submit(std::move(a), tied_squared_norms);
}

Napi::Value tied_clipped_call(const Napi::CallbackInfo& info) {
  Call call(info);
  TiedClippedArgs a;
  a.layer = tied_layer(call);
  a.factors = call.array<float>();
  a.weight = call.array<float>();
  return call.submit(std::move(a), tied_clipped_gradients);
}

ExpertsLayer experts_layer(Call& call) {
  ExpertsLayer l;
  l.rows = row_layer(call);
  l.sample_of = call.array<int32_t>();
  l.expert_of = call.array<int32_t>();
  l.experts = call.integer();
  return l;
}

Napi::Value experts_norms_call(const Napi::CallbackInfo& info) {
  Call call(info);
  ExpertsNormsArgs a;
  a.layer = experts_layer(call);
  a.method = static_cast<NormMethod>(call.integer());
  a.out = call.array<float>();
  return call.submit(std::move(a), experts_squared_norms);
}

Napi::Value experts_clipped_call(const Napi::CallbackInfo& info) {
  Call call(info);
  ExpertsClippedArgs a;
  a.layer = experts_layer(call);
  a.factors = call.array<float>();
  a.weight = call.array<float>();
  a.bias = call.array<float>();
  return call.submit(std::move(a), experts_clipped_gradients);
}

Napi::Value gaussian_noise_call(const Napi::CallbackInfo& info) {
  Call call(info);
  GaussianNoiseArgs a;
  a.key = call.array<uint32_t>();
  a.step = call.integer();
  a.offset = call.integer();
  a.count = call.integer();
  a.stddev = static_cast<float>(call.number());
  a.add = call.boolean();
  a.out = call.array<float>();
  return call.submit(std::move(a), gaussian_noise);
}

Napi::Value discrete_noise_call(const Napi::CallbackInfo& info) {
  Call call(info);
  DiscreteNoiseArgs a;
  a.key = call.array<uint32_t>();
  a.step = call.integer();
  a.offset = call.integer();
  a.count = call.integer();
  a.sigma = call.integer();
  a.granularity = call.number();
  a.add = call.boolean();
  a.out = call.array<float>();
  return call.submit(std::move(a), discrete_noise);
}

Napi::Value chacha20_blocks_call(const Napi::CallbackInfo& info) {
  Call call(info);
  ChaChaArgs a;
  a.key = call.array<uint32_t>();
  a.counter = static_cast<uint32_t>(call.integer());
  a.nonce = call.array<uint32_t>();
  a.count = call.integer();
  a.out = call.array<uint32_t>();
  return call.submit(std::move(a), chacha20_blocks);
}

}  // namespace

void register_privacy(Napi::Env env, Napi::Object exports) {
  auto add = [&](const char* name, Napi::Value (*fn)(const Napi::CallbackInfo&)) {
    exports.Set(name, Napi::Function::New(env, fn));
  };
  add("linearSquaredNorms", norms<linear_squared_norms>);
  add("embeddingSquaredNorms", norms<embedding_squared_norms>);
  add("scaleSquaredNorms", norms<scale_squared_norms>);
  add("channelSquaredNorms", norms<channel_squared_norms>);
  add("linearClippedGradients", clipped<linear_clipped_gradients>);
  add("embeddingClippedGradients", clipped<embedding_clipped_gradients>);
  add("scaleClippedGradients", clipped<scale_clipped_gradients>);
  add("channelClippedGradients", clipped<channel_clipped_gradients>);
  add("convSquaredNorms", conv_norms_call);
  add("convClippedGradients", conv_clipped_call);
  add("loraSquaredNorms", lora_norms_call);
  add("loraClippedGradients", lora_clipped_call);
  add("tiedEmbeddingSquaredNorms", tied_norms_call);
  add("tiedEmbeddingClippedGradients", tied_clipped_call);
  add("expertsSquaredNorms", experts_norms_call);
  add("expertsClippedGradients", experts_clipped_call);
  add("gaussianNoise", gaussian_noise_call);
  add("discreteNoise", discrete_noise_call);
  add("chacha20Blocks", chacha20_blocks_call);
}

void register_cuda_privacy(CudaExports&) {}

}  // namespace heddle::binding
