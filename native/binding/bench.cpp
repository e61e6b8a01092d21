// The machine's peaks for the benchmark harness (bench/peaks.ts).
#include "bench/peaks.h"

#include "binding/addon.h"
#include "binding/call.h"

namespace heddle::binding {
namespace {

Napi::Value measure_peak_call(const Napi::CallbackInfo& info) {
  Call call(info);
  PeakArgs a;
  a.kind = static_cast<PeakKind>(call.integer());
  a.milliseconds = call.number();
  a.bytes = call.integer();
  a.result = call.array<double>();
  return call.submit(std::move(a), measure_peak);
}

}  // namespace

void register_bench(Napi::Env env, Napi::Object exports) {
  exports.Set("measurePeak", Napi::Function::New(env, measure_peak_call));
}

}  // namespace heddle::binding
