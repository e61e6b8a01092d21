// Module entry: registers every family's functions and the runtime controls.
#include "binding/addon.h"

#include "binding/call.h"
#include "binding/cuda.h"
#include "core/cpu_features.h"

#if defined(__unix__) || defined(__APPLE__)
#include <dlfcn.h>
#elif defined(_WIN32)
#include <windows.h>
#endif

namespace heddle::binding {
namespace {

// Node unloads an addon when the last environment that required it ends (a worker, say). The pool's threads
// live in this library's code, so it pins itself for the life of the process.
void pin_library() {
#if defined(_WIN32)
  HMODULE module;
  GetModuleHandleExW(GET_MODULE_HANDLE_EX_FLAG_PIN | GET_MODULE_HANDLE_EX_FLAG_FROM_ADDRESS,
                     reinterpret_cast<LPCWSTR>(&pin_library), &module);
#elif defined(RTLD_NODELETE)
  Dl_info info;
  if (dladdr(reinterpret_cast<void*>(&pin_library), &info) && info.dli_fname) {
    dlopen(info.dli_fname, RTLD_NOW | RTLD_NODELETE);
  }
#endif
}

Napi::Value machine(const Napi::CallbackInfo& info) {
  Napi::Env env = info.Env();
  const CpuFeatures& f = cpu_features();
  Napi::Array features = Napi::Array::New(env);
  auto add = [&](bool present, const char* name) {
    if (present) features.Set(features.Length(), Napi::String::New(env, name));
  };
  add(f.sse42, "sse4.2");
  add(f.avx2, "avx2");
  add(f.avx_vnni, "avx_vnni");
  add(f.avx512, "avx512");
  add(f.avx512_vnni, "avx512_vnni");
  add(f.avx512_bf16, "avx512_bf16");
  add(f.avx512_fp16, "avx512_fp16");
  add(f.amx_tile, "amx_tile");
  add(f.amx_bf16, "amx_bf16");
  add(f.amx_int8, "amx_int8");
  add(f.neon, "neon");
  add(f.arm_dotprod, "dotprod");
  add(f.arm_bf16, "bf16");
  add(f.arm_i8mm, "i8mm");
  Napi::Array isas = Napi::Array::New(env);
  for (int i = kIsaCount - 1; i >= 0; --i) {
    if (isa_available(static_cast<Isa>(i))) {
      isas.Set(isas.Length(), Napi::String::New(env, isa_name(static_cast<Isa>(i))));
    }
  }
  Napi::Object out = Napi::Object::New(env);
  out.Set("cpuFeatures", features);
  out.Set("isas", isas);
  out.Set("hardwareThreads", Napi::Number::New(env, hardware_threads()));
  out.Set("l2Bytes", Napi::Number::New(env, static_cast<double>(f.l2_bytes)));
  return out;
}

Napi::Value get_isa(const Napi::CallbackInfo& info) {
  return Napi::String::New(info.Env(), isa_name(Environment::of(info.Env()).isa));
}

// Returns false, changing nothing, when this machine cannot run it.
Napi::Value set_isa(const Napi::CallbackInfo& info) {
  const std::string name = info[0].As<Napi::String>();
  for (int i = 0; i < kIsaCount; ++i) {
    const Isa isa = static_cast<Isa>(i);
    if (name == isa_name(isa) && isa_available(isa)) {
      Environment::of(info.Env()).isa = isa;
      return Napi::Boolean::New(info.Env(), true);
    }
  }
  return Napi::Boolean::New(info.Env(), false);
}

Napi::Object init(Napi::Env env, Napi::Object exports) {
  pin_library();
  Environment::create(env);
  exports.Set("machine", Napi::Function::New(env, machine));
  exports.Set("getIsa", Napi::Function::New(env, get_isa));
  exports.Set("setIsa", Napi::Function::New(env, set_isa));
  register_bench(env, exports);
  register_nn(env, exports);
  register_moe(env, exports);
  register_experts(env, exports);
  register_matrices(env, exports);
  register_attention(env, exports);
  register_privacy(env, exports);
  register_training(env, exports);
  register_cuda(env, exports);
  return exports;
}

}  // namespace

}  // namespace heddle::binding

static Napi::Object heddle_init(Napi::Env env, Napi::Object exports) {
  return heddle::binding::init(env, exports);
}

NODE_API_MODULE(heddle, heddle_init)
