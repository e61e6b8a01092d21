// heddle/moe for JavaScript: reads arguments in the order in which lib/moe/<op>.ts passes them.
#include "binding/addon.h"
#include "binding/call.h"
#include "binding/cuda.h"
#include "binding/device_args.h"
#include "moe/combine.h"
#include "moe/layer_device.h"
#include "moe/permute.h"
#include "moe/plan_dispatch.h"
#include "moe/route_expert_choice.h"
#include "moe/route_sinkhorn.h"
#include "moe/route_top_k_backward.h"
#include "moe/router_loss.h"

namespace heddle::binding {
namespace {

RouterOptions router_options(Call& call) {
  RouterOptions o;
  o.score = static_cast<RouterScore>(call.integer());
  o.over_selected = call.boolean();
  o.normalize = call.boolean();
  o.epsilon = static_cast<float>(call.number());
  o.floor = static_cast<float>(call.number());
  o.scale = static_cast<float>(call.number());
  return o;
}

Napi::Value route_top_k_call(const Napi::CallbackInfo& info) {
  Call call(info);
  return call.submit(route_top_k_args(call), route_top_k);
}

Napi::Value moe_layer_call(const Napi::CallbackInfo& info) {
  Call call(info);
  MoELayerArgs a;
  a.router = linear_device_args(call);
  a.route = route_top_k_args(call);
  a.gate = linear_device_args(call);
  a.experts = experts_device_args(call);
  return call.submit_to_device(std::move(a));
}

Napi::Value plan_dispatch_call(const Napi::CallbackInfo& info) {
  Call call(info);
  PlanDispatchArgs a;
  a.indices = call.array<const int32_t>();
  a.tokens = call.integer();
  a.k = static_cast<int32_t>(call.integer());
  a.experts = static_cast<int32_t>(call.integer());
  a.global_experts = static_cast<int32_t>(call.integer());
  a.expert_map = call.array<const int32_t>();
  a.capacity = call.integer();
  a.drop = static_cast<DropRule>(call.integer());
  a.weights = call.array<const float>();
  a.order = call.array<int32_t>();
  a.offsets = call.array<int32_t>();
  a.inverse = call.array<int32_t>();
  a.dropped = call.array<int32_t>();
  a.counts = call.array<int32_t>();
  return call.submit(std::move(a), plan_dispatch);
}

Napi::Value permute_call(const Napi::CallbackInfo& info) {
  Call call(info);
  PermuteArgs a;
  a.x = call.array<const void>();
  const DType type = call.dtype();
  a.tokens = call.integer();
  a.row_bytes = call.integer() * dtype_size(type);
  a.k = static_cast<int32_t>(call.integer());
  a.order = call.array<const int32_t>();
  a.routes = call.integer();
  a.out = call.array<void>();
  return call.submit(std::move(a), permute);
}

Napi::Value combine_call(const Napi::CallbackInfo& info) {
  Call call(info);
  CombineArgs a;
  a.y = call.array<const void>();
  a.type = call.dtype();
  a.routes = call.integer();
  a.tokens = call.integer();
  a.width = call.integer();
  a.k = static_cast<int32_t>(call.integer());
  a.inverse = call.array<const int32_t>();
  a.weights = call.array<const float>();
  a.out = call.array<void>();
  a.out_type = call.dtype();
  return call.submit(std::move(a), combine);
}

Napi::Value route_expert_choice_call(const Napi::CallbackInfo& info) {
  Call call(info);
  ExpertChoiceArgs a;
  a.logits = call.array<void>();
  a.type = call.dtype();
  a.tokens = call.integer();
  a.experts = static_cast<int32_t>(call.integer());
  a.score = static_cast<RouterScore>(call.integer());
  a.capacity = call.integer();
  a.indices = call.array<int32_t>();
  a.weights = call.array<float>();
  return call.submit(std::move(a), route_expert_choice);
}

Napi::Value route_sinkhorn_call(const Napi::CallbackInfo& info) {
  Call call(info);
  SinkhornArgs a;
  a.logits = call.array<void>();
  a.type = call.dtype();
  a.tokens = call.integer();
  a.experts = static_cast<int32_t>(call.integer());
  a.k = static_cast<int32_t>(call.integer());
  a.score = static_cast<RouterScore>(call.integer());
  a.tolerance = call.number();
  a.epsilon = call.number();
  a.max_iterations = static_cast<int32_t>(call.integer());
  a.indices = call.array<int32_t>();
  a.weights = call.array<float>();
  a.report = call.array<int32_t>();
  return call.submit(std::move(a), route_sinkhorn);
}

// loadBalancingLoss, routerZLoss, importanceLoss and loadLoss take the same arguments.
template <LossKind kind>
Napi::Value router_loss_call(const Napi::CallbackInfo& info) {
  Call call(info);
  RouterLossArgs a;
  a.kind = kind;
  a.logits = call.array<void>();
  a.type = call.dtype();
  a.tokens = call.integer();
  a.experts = static_cast<int32_t>(call.integer());
  a.score = static_cast<int32_t>(call.integer());
  a.normalize = call.boolean();
  a.mask = call.array<uint8_t>();
  a.indices = call.array<int32_t>();
  a.k = static_cast<int32_t>(call.integer());
  a.per_token = call.boolean();
  a.coefficient = call.number();
  a.value = call.array<double>();
  a.gradient = call.array<float>();
  return call.submit(std::move(a), router_loss);
}

Napi::Value route_top_k_backward_call(const Napi::CallbackInfo& info) {
  Call call(info);
  RouteBackwardArgs a;
  a.grad_weights = call.array<float>();
  a.logits = call.array<void>();
  a.type = call.dtype();
  a.tokens = call.integer();
  a.experts = static_cast<int32_t>(call.integer());
  a.k = static_cast<int32_t>(call.integer());
  a.router = router_options(call);
  a.mask = call.array<uint8_t>();
  a.mask_stride = call.integer();
  a.indices = call.array<int32_t>();
  a.grad_logits = call.array<float>();
  return call.submit(std::move(a), route_top_k_backward);
}

}  // namespace

RouteTopKArgs route_top_k_args(Call& call) {
  RouteTopKArgs a;
  a.logits = call.array<const void>();
  a.type = call.dtype();
  a.tokens = call.integer();
  a.experts = static_cast<int32_t>(call.integer());
  a.k = static_cast<int32_t>(call.integer());
  a.router = router_options(call);
  a.selection_bias = call.array<const float>();
  a.group_count = static_cast<int32_t>(call.integer());
  a.group_keep = static_cast<int32_t>(call.integer());
  a.group_top2 = call.boolean();
  a.mask = call.array<const uint8_t>();
  a.mask_stride = call.integer();
  a.given = call.array<const int32_t>();
  a.indices = call.array<int32_t>();
  a.weights = call.array<float>();
  return a;
}

void register_moe(Napi::Env env, Napi::Object exports) {
  exports.Set("routeTopK", Napi::Function::New(env, route_top_k_call));
  exports.Set("planDispatch", Napi::Function::New(env, plan_dispatch_call));
  exports.Set("permute", Napi::Function::New(env, permute_call));
  exports.Set("combine", Napi::Function::New(env, combine_call));
  exports.Set("routeExpertChoice", Napi::Function::New(env, route_expert_choice_call));
  exports.Set("routeSinkhorn", Napi::Function::New(env, route_sinkhorn_call));
  exports.Set("loadBalancingLoss", Napi::Function::New(env, router_loss_call<LossKind::kLoadBalancing>));
  exports.Set("routerZLoss", Napi::Function::New(env, router_loss_call<LossKind::kZ>));
  exports.Set("importanceLoss", Napi::Function::New(env, router_loss_call<LossKind::kImportance>));
  exports.Set("loadLoss", Napi::Function::New(env, router_loss_call<LossKind::kLoad>));
  exports.Set("routeTopKBackward", Napi::Function::New(env, route_top_k_backward_call));
}

void register_cuda_moe(CudaExports& ops) {
  ops.add("routeTopK", route_top_k_call, "heddle_cuda_route_top_k");
  ops.add("planDispatch", plan_dispatch_call, "heddle_cuda_plan_dispatch");
  ops.add("permute", permute_call, "heddle_cuda_permute");
  ops.add("combine", combine_call, "heddle_cuda_combine");
  ops.add("moeLayer", moe_layer_call, "heddle_cuda_moe_layer");
}

}  // namespace heddle::binding
