// Expert weights for JavaScript, and the ops on packed weights other than linear (matrices.cpp).
#include "attention/patch_embed.h"
#include "binding/addon.h"
#include "binding/call.h"
#include "binding/cuda.h"
#include "binding/device_args.h"
#include "binding/handle.h"
#include "moe/experts.h"
#include "moe/experts_backward.h"
#include "nn/fused_linear.h"

namespace heddle::binding {
namespace {

Napi::Value create_bank(const Napi::CallbackInfo& info) {
  auto number = [&](size_t i) { return info[i].As<Napi::Number>().DoubleValue(); };
  auto bank = std::make_shared<ExpertBank>();
  bank->type = static_cast<PackType>(static_cast<int>(number(0)));
  bank->activation = static_cast<Activation>(static_cast<int>(number(1)));
  bank->alpha = static_cast<float>(number(2));
  bank->limit = static_cast<float>(number(3));
  bank->gated = info[4].ToBoolean();
  bank->hidden = static_cast<int64_t>(number(5));
  bank->intermediate = static_cast<int64_t>(number(6));
  bank->experts.resize(static_cast<size_t>(number(7)));
  bank->set_shapes(static_cast<int64_t>(number(8)));
  return make_handle(info.Env(), std::move(bank));
}

// Bytes of one packed expert: (bank, biased).
Napi::Value expert_bytes(const Napi::CallbackInfo& info) {
  const auto& bank = info[0].As<Napi::External<Handle<ExpertBank>>>().Data()->object;
  return Napi::Number::New(info.Env(), static_cast<double>(bank->expert_bytes(info[1].ToBoolean())));
}

// Empties a slot that no running job uses: (bank, slot).
Napi::Value evict_expert(const Napi::CallbackInfo& info) {
  const auto& bank = info[0].As<Napi::External<Handle<ExpertBank>>>().Data()->object;
  bank->experts[static_cast<size_t>(info[1].As<Napi::Number>().Int64Value())] = PackedExpert{};
  return info.Env().Undefined();
}

// Tells the collector the size that the caller keeps count of (a job may be packing another slot now): (bank, bytes).
Napi::Value set_bank_bytes(const Napi::CallbackInfo& info) {
  auto* h = info[0].As<Napi::External<Handle<ExpertBank>>>().Data();
  const int64_t bytes = info[1].As<Napi::Number>().Int64Value();
  Napi::MemoryManagement::AdjustExternalMemory(info.Env(), bytes - h->accounted);
  h->accounted = bytes;
  return info.Env().Undefined();
}

Napi::Value pack_experts_call(const Napi::CallbackInfo& info) {
  Call call(info);
  PackExpertsArgs a;
  a.bank = call.handle<Handle<ExpertBank>>()->object;
  a.options.group = call.integer();
  const DType type = call.dtype();
  const auto gate = call.arrays<void>(), up = call.arrays<void>();
  const int64_t gn = call.integer(), gk = call.integer();
  const auto down = call.arrays<void>();
  const int64_t dn = call.integer(), dk = call.integer();
  const auto gate_bias = call.arrays<float>(), up_bias = call.arrays<float>(), down_bias = call.arrays<float>();
  a.options.symmetric = call.boolean();
  a.options.search = call.boolean();
  a.hidden_mean_square = call.array<float>();
  a.intermediate_mean_square = call.array<float>();
  const auto gate_scale = call.arrays<float>(), up_scale = call.arrays<float>();
  const int64_t up_row0 = call.integer();
  const auto down_scale = call.arrays<float>();
  const int64_t d_blocks = (a.bank->hidden + kBlock - 1) / kBlock, f_blocks = (a.bank->intermediate + kBlock - 1) / kBlock;
  const auto gate_exponent = call.arrays<uint8_t>(), up_exponent = call.arrays<uint8_t>(), down_exponent = call.arrays<uint8_t>();
  a.first = static_cast<size_t>(call.integer());
  for (size_t i = 0; i < down.size(); ++i) {
    ExpertSource s;
    auto scale_of = [&](const std::vector<float*>& scales) { return scales.empty() ? nullptr : scales[i]; };
    if (!gate.empty()) s.gate = {gate[i], type, gn, gk, scale_of(gate_scale), d_blocks, 0};
    s.up = {up[i], type, gn, gk, scale_of(up_scale), d_blocks, up_row0};
    s.down = {down[i], type, dn, dk, scale_of(down_scale), f_blocks, 0};
    if (!gate_exponent.empty()) s.gate.exponent = gate_exponent[i];
    if (!up_exponent.empty()) s.up.exponent = up_exponent[i];
    if (!down_exponent.empty()) s.down.exponent = down_exponent[i];
    if (!gate_bias.empty()) s.gate_bias = gate_bias[i];
    if (!up_bias.empty()) s.up_bias = up_bias[i];
    if (!down_bias.empty()) s.down_bias = down_bias[i];
    a.sources.push_back(s);
  }
  return call.submit(std::move(a), pack_experts);
}

Napi::Value experts_forward_call(const Napi::CallbackInfo& info) {
  Call call(info);
  ExpertsForwardArgs a;
  a.bank = call.handle<Handle<ExpertBank>>()->object;
  if (auto* shared = call.optional_handle<Handle<ExpertBank>>()) a.shared = shared->object;
  a.shared_gate = call.array<float>();
  a.x = call.array<void>();
  a.type = call.dtype();
  a.tokens = call.integer();
  a.k = call.integer();
  a.indices = call.array<int32_t>();
  a.weights = call.array<float>();
  a.out = call.array<void>();
  a.out_type = call.dtype();
  a.routes = call.array<float>();
  return call.submit(std::move(a), experts_forward);
}

// Bytes of one expert on the device: (bank), whose first expert is packed.
Napi::Value expert_image_bytes(const Napi::CallbackInfo& info) {
  const auto& bank = info[0].As<Napi::External<Handle<ExpertBank>>>().Data()->object;
  return Napi::Number::New(info.Env(), static_cast<double>(image_of(*bank, 0).bytes));
}

Napi::Value layout_expert_call(const Napi::CallbackInfo& info) {
  Call call(info);
  LayoutExpertArgs a;
  a.bank = call.handle<Handle<ExpertBank>>()->object;
  a.expert = call.integer();
  a.out = call.array<char>();
  return call.submit(std::move(a), layout_expert);
}

// A bank on the device: its memory, then the numbers of lib/moe/packedExperts.ts in its order; null twice for none.
DeviceBank device_bank(Call& call) {
  DeviceBank b;
  b.data = call.array<const char>();
  const double* n = call.host_array<double>();
  if (!n) return b;
  auto integer = [&] { return static_cast<int64_t>(*n++); };
  b.type = static_cast<PackType>(integer());
  b.activation = static_cast<Activation>(integer());
  b.alpha = static_cast<float>(*n++);
  b.limit = static_cast<float>(*n++);
  b.gated = static_cast<int32_t>(integer());
  b.points = static_cast<int32_t>(integer());
  b.group = integer();
  b.experts = integer();
  b.hidden = integer();
  b.intermediate = integer();
  return b;
}

Napi::Value experts_device_call(const Napi::CallbackInfo& info) {
  Call call(info);
  return call.submit_to_device(experts_device_args(call));
}

Napi::Value experts_backward_call(const Napi::CallbackInfo& info) {
  Call call(info);
  ExpertsBackwardArgs a;
  a.grad_output = call.array<void>();
  a.grad_type = call.dtype();
  a.x = call.array<void>();
  a.type = call.dtype();
  a.tokens = call.integer();
  a.k = call.integer();
  a.indices = call.array<int32_t>();
  a.weights = call.array<float>();
  a.pack = static_cast<PackType>(call.integer());
  a.activation = static_cast<Activation>(call.integer());
  a.alpha = static_cast<float>(call.number());
  a.limit = static_cast<float>(call.number());
  a.hidden = call.integer();
  a.intermediate = call.integer();
  const DType type = call.dtype();
  const auto gate = call.arrays<void>(), up = call.arrays<void>();
  const int64_t gn = call.integer(), gk = call.integer();
  const auto down = call.arrays<void>();
  const int64_t dn = call.integer(), dk = call.integer();
  const auto gate_bias = call.arrays<float>(), up_bias = call.arrays<float>(), down_bias = call.arrays<float>();
  a.grad_x = call.array<float>();
  a.grad_weights = call.array<float>();
  const auto grad_gate = call.arrays<float>(), grad_up = call.arrays<float>(), grad_down = call.arrays<float>();
  const auto grad_gate_bias = call.arrays<float>(), grad_up_bias = call.arrays<float>();
  const auto grad_down_bias = call.arrays<float>();
  a.bias_stride = call.integer();
  a.gated = !gate.empty();
  for (size_t i = 0; i < down.size(); ++i) {
    ExpertSource s;
    ExpertGradient g;
    if (a.gated) s.gate = {gate[i], type, gn, gk}, g.gate = grad_gate[i];
    s.up = {up[i], type, gn, gk}, g.up = grad_up[i];
    s.down = {down[i], type, dn, dk}, g.down = grad_down[i];
    if (!gate_bias.empty()) s.gate_bias = gate_bias[i], g.gate_bias = grad_gate_bias[i];
    if (!up_bias.empty()) s.up_bias = up_bias[i], g.up_bias = grad_up_bias[i];
    if (!down_bias.empty()) s.down_bias = down_bias[i], g.down_bias = grad_down_bias[i];
    a.sources.push_back(s);
    a.gradients.push_back(g);
  }
  return call.submit(std::move(a), experts_backward);
}

Napi::Value fused_linear_call(const Napi::CallbackInfo& info) {
  Call call(info);
  FusedLinearArgs a;
  auto matrix = [&] {
    auto* h = call.optional_handle<Handle<PackedMatrix>>();
    return h ? h->object : nullptr;
  };
  a.x = call.array<float>();
  a.rows = call.integer();
  a.index = call.array<int32_t>();
  a.normed = call.boolean();
  a.norm_weight = call.array<float>();
  a.norm_bias = call.array<float>();
  a.unit_offset = call.boolean();
  a.epsilon = call.number();
  a.hidden = matrix();
  a.hidden_bias = call.array<float>();
  a.hidden_activation = static_cast<LinearActivation>(call.integer());
  a.weight = matrix();
  a.bias = call.array<float>();
  a.activation = static_cast<LinearActivation>(call.integer());
  a.gate = static_cast<float>(call.number());
  for (int i = 0; i < 2; ++i) {
    a.add[i] = call.array<float>();
    a.add_index[i] = call.array<int32_t>();
  }
  a.out = call.array<float>();
  a.to = call.array<int32_t>();
  a.also = matrix();
  a.also_bias = call.array<float>();
  a.also_out = call.array<float>();
  return call.submit(std::move(a), fused_linear);
}

// The numbers of lib/attention/patchEmbed.ts, and what follows them, in its order.
PatchProblem patch_problem(Call& call) {
  PatchProblem p;
  const double* n = call.host_array<double>();
  auto integer = [&] { return static_cast<int64_t>(*n++); };
  p.batch = integer();
  p.channels = integer();
  p.batch_stride = integer();
  p.channel_stride = integer();
  for (int64_t* three : {p.pixel_stride, p.grid, p.size, p.step}) {
    for (int i = 0; i < 3; ++i) three[i] = integer();
  }
  p.start = integer();
  p.channels_last = integer() != 0;
  p.out_rows = integer();
  p.out_first = integer();
  p.video = call.array<const void>();
  p.type = call.dtype();
  p.scale = call.array<const float>();
  p.shift = call.array<const float>();
  p.indices = call.array<const int32_t>();
  p.batch_offsets = call.array<const int32_t>();
  p.bias = call.array<const float>();
  p.out = call.array<void>();
  p.out_type = call.dtype();
  return p;
}

Napi::Value patch_embed_call(const Napi::CallbackInfo& info) {
  Call call(info);
  PatchEmbedArgs a;
  a.weight = call.handle<Handle<PackedMatrix>>()->object;
  a.problem = patch_problem(call);
  for (int i = 0; i < 2; ++i) {
    a.add[i] = call.array<float>();
    a.add_index[i] = call.array<int32_t>();
  }
  a.to = call.array<int32_t>();
  return call.submit(std::move(a), patch_embed);
}

// Weights as they come: matrix, type, outputs, inputs; then the tokens to compute and the problem.
Napi::Value patch_embed_device_call(const Napi::CallbackInfo& info) {
  Call call(info);
  PatchEmbedDeviceArgs a;
  a.weight = call.array<const void>();
  a.weight_type = call.dtype();
  a.columns = call.integer();
  a.k = call.integer();
  a.rows = call.integer();
  a.problem = patch_problem(call);
  return call.submit_to_device(std::move(a));
}

}  // namespace

ExpertsDeviceArgs experts_device_args(Call& call) {
  ExpertsDeviceArgs a;
  a.bank = device_bank(call);
  a.shared = device_bank(call);
  a.shared_gate = call.array<const float>();
  a.x = call.array<const void>();
  a.type = call.dtype();
  a.tokens = call.integer();
  a.k = call.integer();
  a.indices = call.array<const int32_t>();
  a.weights = call.array<const float>();
  a.out = call.array<void>();
  a.out_type = call.dtype();
  return a;
}

void register_experts(Napi::Env env, Napi::Object exports) {
  exports.Set("createBank", Napi::Function::New(env, create_bank));
  exports.Set("packExperts", Napi::Function::New(env, pack_experts_call));
  exports.Set("expertsForward", Napi::Function::New(env, experts_forward_call));
  exports.Set("expertsBackward", Napi::Function::New(env, experts_backward_call));
  exports.Set("expertImageBytes", Napi::Function::New(env, expert_image_bytes));
  exports.Set("layoutExpert", Napi::Function::New(env, layout_expert_call));
  exports.Set("accountBank", Napi::Function::New(env, account<ExpertBank>));
  exports.Set("expertBytes", Napi::Function::New(env, expert_bytes));
  exports.Set("evictExpert", Napi::Function::New(env, evict_expert));
  exports.Set("setBankBytes", Napi::Function::New(env, set_bank_bytes));
  exports.Set("releaseBank", Napi::Function::New(env, release<ExpertBank>));
  exports.Set("fusedLinear", Napi::Function::New(env, fused_linear_call));
  exports.Set("patchEmbed", Napi::Function::New(env, patch_embed_call));
}

void register_cuda_experts(CudaExports& ops) {
  ops.add("expertsForward", experts_device_call, "heddle_cuda_experts_forward");
  ops.add("patchEmbed", patch_embed_device_call, "heddle_cuda_patch_embed");
}

}  // namespace heddle::binding
