// heddle/moe for JavaScript: reads arguments in the order in which lib/moe/<op>.ts passes them.
#include "binding/addon.h"
#include "binding/call.h"
#include "moe/route_top_k.h"

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
  RouteTopKArgs a;
  a.logits = call.array<void>();
  a.type = call.dtype();
  a.tokens = call.integer();
  a.experts = static_cast<int32_t>(call.integer());
  a.k = static_cast<int32_t>(call.integer());
  a.router = router_options(call);
  a.selection_bias = call.array<float>();
  a.group_count = static_cast<int32_t>(call.integer());
  a.group_keep = static_cast<int32_t>(call.integer());
  a.group_top2 = call.boolean();
  a.mask = call.array<uint8_t>();
  a.mask_stride = call.integer();
  a.given = call.array<int32_t>();
  a.indices = call.array<int32_t>();
  a.weights = call.array<float>();
  return call.submit(std::move(a), route_top_k);
}

}  // namespace

void register_moe(Napi::Env env, Napi::Object exports) {
  exports.Set("routeTopK", Napi::Function::New(env, route_top_k_call));
}

}  // namespace heddle::binding
