// Handles of native memory for JavaScript.
//
// A handle is an External holding a shared_ptr: a running job holds the object too, so dispose() while a forward
// runs frees the memory when that forward ends. The garbage collector is the backstop, and is told the size.
#pragma once
#include <napi.h>

#include <memory>

namespace heddle::binding {

template <class T>
struct Handle {
  std::shared_ptr<T> object;
  int64_t accounted = 0;
};

template <class T>
Napi::Value make_handle(Napi::Env env, std::shared_ptr<T> object) {
  auto* h = new Handle<T>{std::move(object), 0};
  return Napi::External<Handle<T>>::New(env, h, [](Napi::Env e, Handle<T>* p) {
    if (p->accounted) Napi::MemoryManagement::AdjustExternalMemory(e, -p->accounted);
    delete p;
  });
}

// Tells the collector the current size and returns it.
template <class T>
Napi::Value account(const Napi::CallbackInfo& info) {
  auto* h = info[0].As<Napi::External<Handle<T>>>().Data();
  const int64_t bytes = h->object ? h->object->bytes() : 0;
  Napi::MemoryManagement::AdjustExternalMemory(info.Env(), bytes - h->accounted);
  h->accounted = bytes;
  return Napi::Number::New(info.Env(), static_cast<double>(bytes));
}

template <class T>
Napi::Value release(const Napi::CallbackInfo& info) {
  auto* h = info[0].As<Napi::External<Handle<T>>>().Data();
  h->object.reset();
  Napi::MemoryManagement::AdjustExternalMemory(info.Env(), -h->accounted);
  h->accounted = 0;
  return info.Env().Undefined();
}

}  // namespace heddle::binding
