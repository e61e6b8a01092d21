// From a JavaScript call to a kernel and back. Every op's binding is: read arguments into the kernel's POD args
// struct, then submit(). All ops share one calling convention:
//
//   op(threads, cancel, done, ...arguments) -> status
//
// `cancel`: null, or an Int32Array(1) that TypeScript sets to 1 on abort. `done`: null runs the kernel on this
// thread and returns its status; a function queues the kernel on the pool, returns 0 at once, and is called
// with the status later. Typed arrays are read in place; while a job runs they are held by references.
// Registered as a CUDA op (binding/cuda.h) the same function gets device pointers: device data as it is, typed
// arrays through staging. There `array<const T>` is only copied in; `array<T>` is copied in and back.
#pragma once
#include <napi.h>

#include <atomic>
#include <cstring>
#include <memory>
#include <vector>

#include "binding/cuda.h"
#include "core/dtype.h"
#include "core/thread_pool.h"

namespace heddle::binding {

class Environment;

// One queued job. Lifetime: created on the JavaScript thread, run once on a worker, deleted on the JavaScript
// thread after `done` was called (or when the environment closes).
struct Job : Task {
  virtual ~Job() = default;
  virtual Status execute() = 0;

  Environment* environment = nullptr;
  Exec exec;
  Status status = kOk;
  napi_ref done = nullptr;
  std::vector<napi_ref> held;
};

// Per-environment state: main thread and every worker_thread that loads heddle has its own.
class Environment {
 public:
  static Environment* create(Napi::Env env);
  static Environment& of(Napi::Env env) { return *env.GetInstanceData<Environment>(); }

  Isa isa = best_isa();
  std::atomic<int32_t> closing{0};

  // Queues `job`; on_complete is called on the JavaScript thread. False when the environment is closing.
  bool enqueue(Job* job);
  // The same for a job that runs elsewhere and ends with complete(job), on any thread.
  bool adopt(Job* job);
  static void complete(Job* job);
  int64_t jobs_in_flight() const { return in_flight_; }

 private:
  static void on_job_done(napi_env env, napi_value, void* context, void* data);
  static void run_job(Task* task);
  static void on_close(void* self);

  napi_env env_ = nullptr;
  napi_threadsafe_function completions_ = nullptr;
  int64_t in_flight_ = 0;                  // JavaScript thread only: keeps the event loop alive while > 0
  std::atomic<int64_t> outside_{0};        // jobs that a worker may still touch
};

// Reads the arguments of one call in order. The fronts have validated everything: a mismatch here is a defect
// and throws a plain TypeError.
class Call {
 public:
  explicit Call(const Napi::CallbackInfo& info) : info_(info), env_(info.Env()) {
    exec_.threads = static_cast<int>(integer());
    exec_.isa = Environment::of(env_).isa;
    exec_.user_cancel = static_cast<const std::atomic<int32_t>*>(data_of(info_[index_++], nullptr));
    done_ = info_[index_++];
    sync_ = done_.IsNull() || done_.IsUndefined();
    target_ = static_cast<const CudaTarget*>(info_.Data());
    if (target_) begin_cuda();
  }
  ~Call() {
    if (cuda_job_) target_->library->job_discard(cuda_job_);
  }
  Call(const Call&) = delete;

  int64_t integer() { return static_cast<int64_t>(number()); }
  double number() {
    double v = 0;
    if (napi_get_value_double(env_, info_[index_++], &v) != napi_ok) fail("a number");
    return v;
  }
  bool boolean() {
    bool v = false;
    if (napi_get_value_bool(env_, info_[index_++], &v) != napi_ok) fail("a boolean");
    return v;
  }
  DType dtype() { return static_cast<DType>(integer()); }

  // Data pointer of a typed array or device data, or nullptr for null / undefined.
  template <class T>
  T* array() {
    napi_value v = info_[index_++];
    return static_cast<T*>(pointer_of(v, std::is_const_v<T>));
  }
  // The same, always on the host: parameters that the binding itself reads.
  template <class T>
  const T* host_array() {
    return static_cast<const T*>(data_of(info_[index_++], nullptr));
  }
  // Data pointers of an array of typed arrays (null entries stay nullptr).
  template <class T>
  std::vector<T*> arrays() {
    Napi::Value v = info_[index_++];
    std::vector<T*> out;
    if (v.IsNull() || v.IsUndefined()) return out;
    const Napi::Array list = v.As<Napi::Array>();
    for (uint32_t i = 0; i < list.Length(); ++i) out.push_back(static_cast<T*>(pointer_of(list.Get(i), std::is_const_v<T>)));
    return out;
  }
  // The native object behind a handle made with Napi::External; held like a typed array.
  template <class T>
  T* handle() {
    napi_value v = info_[index_++];
    void* p = nullptr;
    if (napi_get_value_external(env_, v, &p) != napi_ok) fail("a native handle");
    if (!sync_) held_.push_back(v);
    return static_cast<T*>(p);
  }

  template <class T>
  T* optional_handle() {
    napi_valuetype type;
    napi_typeof(env_, info_[index_], &type);
    if (type == napi_external) return handle<T>();
    ++index_;
    return nullptr;
  }

  const Exec& exec() const { return exec_; }

  // Runs `kernel(args, exec)` here or on the pool.
  template <class Args>
  Napi::Value submit(Args&& args, Status (*kernel)(const std::decay_t<Args>&, const Exec&)) {
    using Owned = std::decay_t<Args>;
    if (target_) {
      if constexpr (std::is_trivially_copyable_v<Owned>) {
        return submit_cuda(&args, static_cast<int64_t>(sizeof(Owned)));
      } else {
        fail("of an op that has a CUDA form");
      }
    }
    if (sync_) {
      return Napi::Number::New(env_, static_cast<double>(kernel(args, exec_)));
    }
    struct KernelJob final : Job {
      KernelJob(Owned&& a, Status (*k)(const Owned&, const Exec&)) : args(std::move(a)), kernel(k) {}
      Status execute() override { return kernel(args, exec); }
      Owned args;
      Status (*kernel)(const Owned&, const Exec&);
    };
    auto job = std::make_unique<KernelJob>(std::forward<Args>(args), kernel);
    return queue(std::move(job));
  }

  // The same of an op that only the CUDA library has.
  template <class Args>
  Napi::Value submit_to_device(Args&& args) {
    return submit(std::forward<Args>(args),
                  +[](const std::decay_t<Args>&, const Exec&) -> Status { return kUnsupported; });
  }

  // Copies between device data and a host array, the two arguments left.
  Napi::Value copy(int32_t direction);

 private:
  void* data_of(napi_value v, int64_t* bytes);
  void* pointer_of(napi_value v, bool read_only) {
    return target_ ? device_pointer_of(v, read_only) : data_of(v, nullptr);
  }
  void* device_pointer_of(napi_value v, bool read_only);
  DeviceBlock* device_block_of(napi_value v, int64_t* offset);
  void begin_cuda();
  Napi::Value submit_cuda(const void* args, int64_t bytes);
  void hold(Job* job);
  Napi::Value queue(std::unique_ptr<Job> job);
  [[noreturn]] void fail(const char* wanted);

  const Napi::CallbackInfo& info_;
  Napi::Env env_;
  Exec exec_;
  Napi::Value done_;
  bool sync_ = false;  // nothing needs holding: the caller's frame does it
  size_t index_ = 0;
  std::vector<napi_value> held_;
  const CudaTarget* target_ = nullptr;  // null: on the CPU
  heddle_cuda_job* cuda_job_ = nullptr;
  std::vector<DeviceHandle> blocks_;
  bool no_memory_ = false;
};

}  // namespace heddle::binding
