// Packed matrices for JavaScript: their handles, their way to the device, and linear (lib/gemm/linear.ts).
#include "binding/addon.h"
#include "binding/call.h"
#include "binding/cuda.h"
#include "binding/device_args.h"
#include "binding/handle.h"
#include "gemm/linear.h"

namespace heddle::binding {
namespace {

Napi::Value create_matrix(const Napi::CallbackInfo& info) {
  return make_handle(info.Env(), std::make_shared<PackedMatrix>());
}

Napi::Value pack_matrix_call(const Napi::CallbackInfo& info) {
  Call call(info);
  PackMatrixArgs a;
  a.matrix = call.handle<Handle<PackedMatrix>>()->object;
  a.type = static_cast<PackType>(call.integer());
  a.source.data = call.array<void>();
  a.source.type = call.dtype();
  a.n = call.integer();
  a.k = call.integer();
  a.source.n_stride = call.integer();
  a.source.k_stride = call.integer();
  a.options.group = call.integer();
  a.options.symmetric = call.boolean();
  a.options.search = call.boolean();
  a.options.mean_square = call.array<float>();
  a.source.scale = call.array<float>();
  a.source.scale_columns = (a.k + kBlock - 1) / kBlock;
  return call.submit(std::move(a), pack_matrix_job);
}

Napi::Value linear_call(const Napi::CallbackInfo& info) {
  Call call(info);
  LinearArgs a;
  a.weight = call.handle<Handle<PackedMatrix>>()->object;
  a.x = call.array<void>();
  a.type = call.dtype();
  a.rows = call.integer();
  a.bias = call.array<float>();
  a.activation = static_cast<LinearActivation>(call.integer());
  a.out = call.array<void>();
  a.out_type = call.dtype();
  return call.submit(std::move(a), linear);
}

// Bytes of a packed matrix on the device: (matrix).
Napi::Value image_bytes(const Napi::CallbackInfo& info) {
  const auto& matrix = info[0].As<Napi::External<Handle<PackedMatrix>>>().Data()->object;
  return Napi::Number::New(info.Env(), static_cast<double>(matrix_image_bytes(*matrix)));
}

Napi::Value layout_matrix_call(const Napi::CallbackInfo& info) {
  Call call(info);
  LayoutMatrixArgs a;
  a.matrix = call.handle<Handle<PackedMatrix>>()->object;
  a.out = call.array<char>();
  return call.submit(std::move(a), layout_matrix);
}

// A matrix on the device: its memory, then the numbers of lib/gemm/packMatrix.ts in its order; null twice for none.
DeviceMatrix device_matrix(Call& call) {
  DeviceMatrix m;
  m.data = call.array<const char>();
  const double* n = call.host_array<double>();
  if (!n) return m;
  m.type = static_cast<PackType>(static_cast<int32_t>(n[0]));
  m.points = static_cast<int32_t>(n[1]);
  m.group = static_cast<int64_t>(n[2]);
  m.outputs = static_cast<int64_t>(n[3]);
  m.k = static_cast<int64_t>(n[4]);
  return m;
}

Napi::Value linear_device_call(const Napi::CallbackInfo& info) {
  Call call(info);
  return call.submit_to_device(linear_device_args(call));
}

}  // namespace

LinearDeviceArgs linear_device_args(Call& call) {
  LinearDeviceArgs a;
  a.weight = device_matrix(call);
  a.x = call.array<const void>();
  a.type = call.dtype();
  a.rows = call.integer();
  a.bias = call.array<const float>();
  a.activation = static_cast<LinearActivation>(call.integer());
  a.out = call.array<void>();
  a.out_type = call.dtype();
  return a;
}

void register_matrices(Napi::Env env, Napi::Object exports) {
  exports.Set("createMatrix", Napi::Function::New(env, create_matrix));
  exports.Set("packMatrix", Napi::Function::New(env, pack_matrix_call));
  exports.Set("linear", Napi::Function::New(env, linear_call));
  exports.Set("matrixImageBytes", Napi::Function::New(env, image_bytes));
  exports.Set("layoutMatrix", Napi::Function::New(env, layout_matrix_call));
  exports.Set("accountMatrix", Napi::Function::New(env, account<PackedMatrix>));
  exports.Set("releaseMatrix", Napi::Function::New(env, release<PackedMatrix>));
}

void register_cuda_matrices(CudaExports& ops) { ops.add("linear", linear_device_call, "heddle_cuda_linear"); }

}  // namespace heddle::binding
