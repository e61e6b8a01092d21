#include "binding/cuda.h"

#include <mutex>
#include <string>

#include "binding/addon.h"
#include "binding/call.h"

#if defined(_WIN32)
#include <windows.h>
#else
#include <dlfcn.h>
#endif

namespace heddle::binding {
namespace {

// One library per process; it is never unloaded, because its thread and the device's blocks outlive environments.
std::mutex load_mutex;
CudaLibrary* loaded = nullptr;
std::string loaded_path;

// Returns a text when it fails.
std::string load(const std::string& path, CudaLibrary* library) {
#if defined(_WIN32)
  library->module = LoadLibraryExA(path.c_str(), nullptr, LOAD_WITH_ALTERED_SEARCH_PATH);
  if (!library->module) return "LoadLibrary failed with error " + std::to_string(GetLastError());
#else
  library->module = dlopen(path.c_str(), RTLD_NOW | RTLD_LOCAL);
  if (!library->module) return dlerror();
#endif
#define HEDDLE_CUDA_RESOLVE(name)                                                           \
  library->name = reinterpret_cast<decltype(library->name)>(library->symbol("heddle_cuda_" #name)); \
  if (!library->name) return "it has no heddle_cuda_" #name;
  HEDDLE_CUDA_SYMBOLS(HEDDLE_CUDA_RESOLVE)
#undef HEDDLE_CUDA_RESOLVE
  if (library->abi() != HEDDLE_CUDA_ABI) {
    return "its interface is version " + std::to_string(library->abi()) + ", this addon needs " +
           std::to_string(HEDDLE_CUDA_ABI);
  }
  return {};
}

std::string error_text(const CudaLibrary* library) {
  char text[512];
  library->error(text, sizeof(text));
  return text;
}

Napi::Value alloc_call(const Napi::CallbackInfo& info) {
  auto* target = static_cast<const CudaTarget*>(info.Data());
  const int64_t bytes = info[0].As<Napi::Number>().Int64Value();
  void* device = target->library->alloc(bytes);
  if (!device) return info.Env().Null();
  auto* handle = new DeviceHandle(std::make_shared<DeviceBlock>(target->library, device, bytes));
  return Napi::External<DeviceHandle>::New(info.Env(), handle, [](Napi::Env, DeviceHandle* h) { delete h; });
}

Napi::Value dispose_call(const Napi::CallbackInfo& info) {
  info[0].As<Napi::External<DeviceHandle>>().Data()->reset();
  return info.Env().Undefined();
}

// upload / download(threads, cancel, done, device data, host array)
template <int32_t direction>
Napi::Value copy_call(const Napi::CallbackInfo& info) {
  Call call(info);
  return call.copy(direction);
}

Napi::Value memory_call(const Napi::CallbackInfo& info) {
  auto* target = static_cast<const CudaTarget*>(info.Data());
  heddle_cuda_memory_info m{};
  target->library->memory(&m);
  Napi::Object out = Napi::Object::New(info.Env());
  auto set = [&](const char* name, int64_t value) {
    out.Set(name, Napi::Number::New(info.Env(), static_cast<double>(value)));
  };
  set("live", m.live);
  set("liveBlocks", m.live_blocks);
  set("cached", m.cached);
  set("peak", m.peak);
  set("limit", m.limit);
  set("pinned", m.pinned);
  set("jobs", m.jobs);
  return out;
}

Napi::Value set_limit_call(const Napi::CallbackInfo& info) {
  static_cast<const CudaTarget*>(info.Data())->library->set_limit(info[0].As<Napi::Number>().Int64Value());
  return info.Env().Undefined();
}

Napi::Value trim_call(const Napi::CallbackInfo& info) {
  static_cast<const CudaTarget*>(info.Data())->library->trim();
  return info.Env().Undefined();
}

Napi::Value error_call(const Napi::CallbackInfo& info) {
  return Napi::String::New(info.Env(), error_text(static_cast<const CudaTarget*>(info.Data())->library));
}

// openCuda(path) -> { device, ops..., alloc, ... } or a text that says why not
Napi::Value open_cuda(const Napi::CallbackInfo& info) {
  Napi::Env env = info.Env();
  const std::string path = info[0].As<Napi::String>();
  const CudaLibrary* library = nullptr;
  heddle_cuda_device device{};
  {
    std::lock_guard<std::mutex> lock(load_mutex);
    if (loaded && loaded_path != path) {
      return Napi::String::New(env, "this process has already loaded " + loaded_path);
    }
    if (!loaded) {
      auto fresh = std::make_unique<CudaLibrary>();
      const std::string wrong = load(path, fresh.get());
      if (!wrong.empty()) return Napi::String::New(env, wrong);
      loaded = fresh.release();
      loaded_path = path;
    }
    library = loaded;
    if (library->open(&device) != kOk) return Napi::String::New(env, error_text(library));
  }
  // One target for what is no op; it lives as long as the library.
  static const CudaTarget plain{library, nullptr};
  Napi::Object out = Napi::Object::New(env);
  Napi::Object ops = Napi::Object::New(env);
  auto plain_function = [&](const char* name, Napi::Value (*call)(const Napi::CallbackInfo&)) {
    return Napi::Function::New(env, call, name, const_cast<CudaTarget*>(&plain));
  };
  auto set = [&](const char* name, Napi::Value (*call)(const Napi::CallbackInfo&)) {
    out.Set(name, plain_function(name, call));
  };
  ops.Set("upload", plain_function("upload", copy_call<HEDDLE_CUDA_IN>));
  ops.Set("download", plain_function("download", copy_call<HEDDLE_CUDA_OUT>));
  set("alloc", alloc_call);
  set("dispose", dispose_call);
  set("memory", memory_call);
  set("setLimit", set_limit_call);
  set("trim", trim_call);
  set("lastError", error_call);
  out.Set("device", Napi::String::New(env, device.name));
  out.Set("computeCapability", Napi::String::New(env, std::to_string(device.major) + "." + std::to_string(device.minor)));
  out.Set("multiprocessors", Napi::Number::New(env, device.multiprocessors));
  out.Set("totalBytes", Napi::Number::New(env, static_cast<double>(device.total_bytes)));
  CudaExports collect(env, library, ops);
  register_cuda_moe(collect);
  register_cuda_experts(collect);
  register_cuda_matrices(collect);
  register_cuda_nn(collect);
  register_cuda_attention(collect);
  register_cuda_privacy(collect);
  out.Set("ops", ops);
  return out;
}

}  // namespace

void* CudaLibrary::symbol(const char* name) const {
#if defined(_WIN32)
  return reinterpret_cast<void*>(GetProcAddress(static_cast<HMODULE>(module), name));
#else
  return dlsym(module, name);
#endif
}

void CudaExports::add(const char* name, Napi::Value (*call)(const Napi::CallbackInfo&), const char* symbol) {
  static std::deque<CudaTarget> targets;  // environments share them: one entry per op and environment, never freed
  static std::mutex mutex;
  auto launch = reinterpret_cast<heddle_cuda_launch>(library_->symbol(symbol));
  if (!launch) return;
  std::lock_guard<std::mutex> lock(mutex);
  targets.push_back({library_, launch});
  ops_.Set(name, Napi::Function::New(env_, call, name, &targets.back()));
}

void register_cuda(Napi::Env env, Napi::Object exports) {
  exports.Set("openCuda", Napi::Function::New(env, open_cuda));
}

}  // namespace heddle::binding
