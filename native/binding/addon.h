#pragma once
#include <napi.h>

namespace heddle::binding {

// Each family adds its ops to the module's exports.
void register_bench(Napi::Env env, Napi::Object exports);
void register_nn(Napi::Env env, Napi::Object exports);
void register_moe(Napi::Env env, Napi::Object exports);
void register_experts(Napi::Env env, Napi::Object exports);
void register_matrices(Napi::Env env, Napi::Object exports);
void register_attention(Napi::Env env, Napi::Object exports);
void register_privacy(Napi::Env env, Napi::Object exports);
void register_training(Napi::Env env, Napi::Object exports);

}  // namespace heddle::binding
