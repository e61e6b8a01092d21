// heddle/privacy for JavaScript: reads arguments in the order in which lib/privacy/layer.ts passes them.
#include "binding/addon.h"
#include "binding/call.h"
#include "binding/cuda.h"
#include "privacy/clipped_gradients.h"
#include "privacy/convolution.h"
#include "privacy/gaussian_noise.h"
#include "privacy/per_sample_squared_norms.h"

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
  a.ghost = call.boolean();
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
  l.bias = call.boolean();
  return l;
}

Napi::Value conv_norms_call(const Napi::CallbackInfo& info) {
  Call call(info);
  ConvNormsArgs a;
  a.layer = conv_layer(call);
  a.ghost = call.boolean();
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
  add("gaussianNoise", gaussian_noise_call);
  add("chacha20Blocks", chacha20_blocks_call);
}

void register_cuda_privacy(CudaExports&) {}

}  // namespace heddle::binding
