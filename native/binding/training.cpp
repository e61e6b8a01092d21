// Ops of training for JavaScript: reads arguments in the order in which lib/training/ops passes them.
#include "binding/addon.h"
#include "binding/call.h"
#include "training/activation.h"
#include "training/convolution.h"
#include "training/cross_entropy.h"
#include "training/group_norm.h"
#include "training/optimizer_update.h"
#include "training/pooling.h"

namespace heddle::binding {
namespace {

Napi::Value optimizer_update_call(const Napi::CallbackInfo& info) {
  Call call(info);
  OptimizerUpdateArgs a;
  auto real = [&] { return static_cast<float>(call.number()); };
  a.rule = static_cast<UpdateRule>(call.integer());
  a.count = call.integer();
  a.parameter = call.array<float>();
  a.gradient = call.array<float>();
  a.first = call.array<float>();
  a.second = call.array<float>();
  a.scale = real();
  a.learning_rate = real();
  a.weight_decay = real();
  a.momentum = real();
  a.beta2 = real();
  a.epsilon = real();
  a.correction1 = real();
  a.correction2 = real();
  a.nesterov = call.boolean();
  return call.submit(std::move(a), optimizer_update);
}

Napi::Value elementwise_call(const Napi::CallbackInfo& info) {
  Call call(info);
  ElementwiseArgs a;
  a.kind = static_cast<Elementwise>(call.integer());
  a.count = call.integer();
  a.x = call.array<float>();
  a.y = call.array<float>();
  a.out = call.array<float>();
  return call.submit(std::move(a), elementwise);
}

template <Status (*kernel)(const GroupNormArgs&, const Exec&)>
Napi::Value group_norm_call(const Napi::CallbackInfo& info) {
  Call call(info);
  GroupNormArgs a;
  a.samples = call.integer();
  a.channels = call.integer();
  a.spatial = call.integer();
  a.groups = call.integer();
  a.epsilon = static_cast<float>(call.number());
  a.x = call.array<float>();
  a.weight = call.array<float>();
  a.bias = call.array<float>();
  a.out = call.array<float>();
  a.normalized = call.array<float>();
  a.rstd = call.array<float>();
  return call.submit(std::move(a), kernel);
}

Napi::Value cross_entropy_call(const Napi::CallbackInfo& info) {
  Call call(info);
  CrossEntropyArgs a;
  a.rows = call.integer();
  a.classes = call.integer();
  a.logits = call.array<float>();
  a.labels = call.array<int32_t>();
  a.scale = call.array<float>();
  a.losses = call.array<float>();
  a.gradient = call.array<float>();
  a.prediction = call.array<int32_t>();
  return call.submit(std::move(a), cross_entropy);
}

template <Status (*kernel)(const ConvolutionArgs&, const Exec&)>
Napi::Value convolution_call(const Napi::CallbackInfo& info) {
  Call call(info);
  ConvolutionArgs a;
  a.shape.samples = call.integer();
  a.shape.in_channels = call.integer();
  a.shape.out_channels = call.integer();
  a.shape.groups = call.integer();
  std::memcpy(a.shape.size, call.array<int32_t>(), 18 * sizeof(int32_t));
  a.weight = call.array<float>();
  a.bias = call.array<float>();
  a.x = call.array<float>();
  a.out = call.array<float>();
  return call.submit(std::move(a), kernel);
}

template <Status (*kernel)(const PoolingArgs&, const Exec&)>
Napi::Value pooling_call(const Napi::CallbackInfo& info) {
  Call call(info);
  PoolingArgs a;
  a.average = call.boolean();
  a.planes = call.integer();
  std::memcpy(a.size, call.array<int32_t>(), 10 * sizeof(int32_t));
  a.x = call.array<float>();
  a.out = call.array<float>();
  a.index = call.array<int32_t>();
  return call.submit(std::move(a), kernel);
}

}  // namespace

void register_training(Napi::Env env, Napi::Object exports) {
  auto add = [&](const char* name, Napi::Value (*fn)(const Napi::CallbackInfo&)) {
    exports.Set(name, Napi::Function::New(env, fn));
  };
  add("optimizerUpdate", optimizer_update_call);
  add("elementwise", elementwise_call);
  add("groupNorm", group_norm_call<group_norm>);
  add("groupNormBackward", group_norm_call<group_norm_backward>);
  add("crossEntropy", cross_entropy_call);
  add("convolution", convolution_call<convolution>);
  add("convolutionInputGradient", convolution_call<convolution_input_gradient>);
  add("pooling", pooling_call<pooling>);
  add("poolingBackward", pooling_call<pooling_backward>);
}

}  // namespace heddle::binding
