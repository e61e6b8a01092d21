// Transformer block ops for JavaScript: reads arguments in the order of the fronts in lib/nn.
#include "binding/addon.h"
#include "binding/call.h"
#include "binding/cuda.h"
#include "nn/elementwise.h"
#include "nn/gather_rows.h"
#include "nn/norm.h"

namespace heddle::binding {
namespace {

Napi::Value norm_call(const Napi::CallbackInfo& info) {
  Call call(info);
  NormArgs a;
  a.centred = call.boolean();
  a.x = call.array<const void>();
  a.residual = call.array<const void>();
  a.type = call.dtype();
  a.rows = call.integer();
  a.width = call.integer();
  a.weight = call.array<const float>();
  a.bias = call.array<const float>();
  a.unit_offset = call.boolean();
  a.epsilon = call.number();
  a.out = call.array<void>();
  a.out_type = call.dtype();
  a.sum = call.array<void>();
  a.mean = call.array<float>();
  a.rstd = call.array<float>();
  return call.submit(std::move(a), norm);
}

Napi::Value norm_backward_call(const Napi::CallbackInfo& info) {
  Call call(info);
  NormBackwardArgs a;
  a.centred = call.boolean();
  a.grad_out = call.array<void>();
  a.x = call.array<void>();
  a.grad_sum = call.array<void>();
  a.type = call.dtype();
  a.rows = call.integer();
  a.width = call.integer();
  a.weight = call.array<float>();
  a.unit_offset = call.boolean();
  a.epsilon = call.number();
  a.mean = call.array<float>();
  a.rstd = call.array<float>();
  a.grad_x = call.array<void>();
  a.grad_weight = call.array<float>();
  a.grad_bias = call.array<float>();
  return call.submit(std::move(a), norm_backward);
}

Napi::Value gelu_call(const Napi::CallbackInfo& info) {
  Call call(info);
  GeluArgs a;
  a.x = call.array<const void>();
  a.type = call.dtype();
  a.count = call.integer();
  a.tanh = call.boolean();
  a.out = call.array<void>();
  return call.submit(std::move(a), gelu);
}

Napi::Value add_residual_call(const Napi::CallbackInfo& info) {
  Call call(info);
  AddResidualArgs a;
  a.x = call.array<const void>();
  a.y = call.array<const void>();
  a.type = call.dtype();
  a.rows = call.integer();
  a.width = call.integer();
  a.gate = call.array<const float>();
  a.gates = call.integer();
  a.out = call.array<void>();
  return call.submit(std::move(a), add_residual);
}

Napi::Value mean_tokens_call(const Napi::CallbackInfo& info) {
  Call call(info);
  MeanTokensArgs a;
  a.x = call.array<void>();
  a.type = call.dtype();
  a.batch = call.integer();
  a.tokens = call.integer();
  a.width = call.integer();
  a.out = call.array<void>();
  return call.submit(std::move(a), mean_tokens);
}

Napi::Value gather_rows_call(const Napi::CallbackInfo& info) {
  Call call(info);
  GatherRowsArgs a;
  a.x = call.array<void>();
  const int64_t size = dtype_size(call.dtype());
  a.rows = call.integer();
  a.row_bytes = size * call.integer();
  a.index = call.array<int32_t>();
  a.count = call.integer();
  a.fill = call.array<void>();
  a.out = call.array<void>();
  return call.submit(std::move(a), gather_rows);
}

}  // namespace

void register_nn(Napi::Env env, Napi::Object exports) {
  exports.Set("layerNorm", Napi::Function::New(env, norm_call));
  exports.Set("rmsNorm", Napi::Function::New(env, norm_call));
  exports.Set("layerNormBackward", Napi::Function::New(env, norm_backward_call));
  exports.Set("rmsNormBackward", Napi::Function::New(env, norm_backward_call));
  exports.Set("gelu", Napi::Function::New(env, gelu_call));
  exports.Set("addResidual", Napi::Function::New(env, add_residual_call));
  exports.Set("gatherRows", Napi::Function::New(env, gather_rows_call));
  exports.Set("meanTokens", Napi::Function::New(env, mean_tokens_call));
}

void register_cuda_nn(CudaExports& ops) {
  ops.add("layerNorm", norm_call, "heddle_cuda_norm");
  ops.add("rmsNorm", norm_call, "heddle_cuda_norm");
  ops.add("gelu", gelu_call, "heddle_cuda_gelu");
  ops.add("addResidual", add_residual_call, "heddle_cuda_add_residual");
}

}  // namespace heddle::binding
