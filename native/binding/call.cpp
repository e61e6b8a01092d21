#include "binding/call.h"

#include <string>
#include <thread>

namespace heddle::binding {

Environment* Environment::create(Napi::Env env) {
  auto* self = new Environment;
  self->env_ = env;
  env.SetInstanceData<Environment>(self);
  napi_value name;
  napi_create_string_utf8(env, "heddle", NAPI_AUTO_LENGTH, &name);
  // One thread-safe function per environment carries every completion. It starts unreferenced, so an idle
  // heddle never keeps a process alive.
  napi_create_threadsafe_function(env, nullptr, nullptr, name, 0, 1, nullptr, nullptr, self, on_job_done,
                                  &self->completions_);
  napi_unref_threadsafe_function(env, self->completions_);
  // Hooks run last-in first-out: this one runs before the thread-safe function's own.
  napi_add_env_cleanup_hook(env, on_close, self);
  return self;
}

// The environment is going away (process exit, worker.terminate()): its buffers are about to be freed, so ask
// the running kernels to stop and wait until no worker touches them. Kernels poll once per tile. Jobs still queued
// are taken back first: they may wait behind long jobs of other environments.
void Environment::on_close(void* data) {
  auto* self = static_cast<Environment*>(data);
  self->closing.store(1);
  Task* waiting = remove_tasks(
      [](const Task* t, const void* env) { return static_cast<const Job*>(t)->environment == env; }, self);
  while (waiting) {
    auto* job = static_cast<Job*>(waiting);
    waiting = waiting->next;
    delete job;
    self->outside_.fetch_sub(1, std::memory_order_relaxed);
  }
  while (self->outside_.load(std::memory_order_acquire) > 0) {
    std::this_thread::sleep_for(std::chrono::microseconds(200));
  }
}

bool Environment::adopt(Job* job) {
  if (closing.load()) return false;
  job->environment = this;
  job->exec.env_cancel = &closing;
  if (in_flight_++ == 0) napi_ref_threadsafe_function(env_, completions_);
  outside_.fetch_add(1, std::memory_order_relaxed);
  return true;
}

bool Environment::enqueue(Job* job) {
  if (!adopt(job)) return false;
  job->run = run_job;
  submit_task(job, job->exec.threads);
  return true;
}

void Environment::run_job(Task* task) {
  auto* job = static_cast<Job*>(task);
  job->status = job->exec.cancelled() ? kCancelled : job->execute();
  complete(job);
}

void Environment::complete(Job* job) {
  Environment* self = job->environment;
  if (napi_call_threadsafe_function(self->completions_, job, napi_tsfn_nonblocking) != napi_ok) delete job;
  self->outside_.fetch_sub(1, std::memory_order_release);
}

// On the JavaScript thread; env is null when the environment is closing, and then nothing may be called.
void Environment::on_job_done(napi_env env, napi_value, void* context, void* data) {
  std::unique_ptr<Job> job(static_cast<Job*>(data));
  if (env == nullptr) return;
  auto* self = static_cast<Environment*>(context);
  if (--self->in_flight_ == 0) napi_unref_threadsafe_function(env, self->completions_);
  napi_value done, global, status;
  napi_get_reference_value(env, job->done, &done);
  napi_delete_reference(env, job->done);
  for (napi_ref r : job->held) napi_delete_reference(env, r);
  napi_get_global(env, &global);
  napi_create_double(env, static_cast<double>(job->status), &status);
  napi_call_function(env, global, done, 1, &status, nullptr);
}

void* Call::data_of(napi_value v, int64_t* bytes) {
  constexpr int64_t kSizes[] = {1, 1, 1, 2, 2, 4, 4, 4, 8, 8, 8};  // in the order of napi_typedarray_type
  void* data = nullptr;
  napi_typedarray_type type;
  size_t length = 0;
  if (napi_get_typedarray_info(env_, v, &type, &length, &data, nullptr, nullptr) != napi_ok) {
    napi_valuetype kind;
    napi_typeof(env_, v, &kind);
    if (kind == napi_null || kind == napi_undefined) return nullptr;
    fail("a typed array");
  }
  if (bytes) *bytes = static_cast<size_t>(type) < 11 ? static_cast<int64_t>(length) * kSizes[type] : -1;
  if (!sync_) held_.push_back(v);
  return data;
}

void Call::hold(Job* job) {
  job->exec = exec_;
  napi_create_reference(env_, done_, 1, &job->done);
  job->held.reserve(held_.size());
  for (napi_value v : held_) {
    napi_ref r;
    napi_create_reference(env_, v, 1, &r);
    job->held.push_back(r);
  }
}

Napi::Value Call::queue(std::unique_ptr<Job> job) {
  hold(job.get());
  Job* raw = job.release();
  if (!Environment::of(env_).enqueue(raw)) {
    delete raw;
    return Napi::Number::New(env_, static_cast<double>(kCancelled));
  }
  return Napi::Number::New(env_, 0);
}

void Call::begin_cuda() {
  cuda_job_ = target_->library->job_begin(nullptr);
  if (!cuda_job_) no_memory_ = true;
}

// The block behind device data { handle, byteOffset }, or nullptr when `v` is something else.
DeviceBlock* Call::device_block_of(napi_value v, int64_t* offset) {
  bool typed = false;
  napi_is_typedarray(env_, v, &typed);
  napi_valuetype kind;
  napi_typeof(env_, v, &kind);
  if (typed || kind != napi_object) return nullptr;
  napi_value handle, at;
  void* p = nullptr;
  if (napi_get_named_property(env_, v, "handle", &handle) != napi_ok ||
      napi_get_value_external(env_, handle, &p) != napi_ok ||
      napi_get_named_property(env_, v, "byteOffset", &at) != napi_ok ||
      napi_get_value_int64(env_, at, offset) != napi_ok || !*static_cast<DeviceHandle*>(p)) {
    fail("device data that is not disposed");
  }
  blocks_.push_back(*static_cast<DeviceHandle*>(p));
  return blocks_.back().get();
}

void* Call::device_pointer_of(napi_value v, bool read_only) {
  int64_t offset = 0, bytes = 0;
  if (DeviceBlock* block = device_block_of(v, &offset)) return static_cast<char*>(block->device) + offset;
  void* host = data_of(v, &bytes);
  napi_valuetype kind;
  napi_typeof(env_, v, &kind);
  if (kind == napi_null || kind == napi_undefined || no_memory_) return nullptr;
  const int32_t direction = read_only ? HEDDLE_CUDA_IN : HEDDLE_CUDA_IN | HEDDLE_CUDA_OUT;
  void* device = target_->library->job_array(cuda_job_, host, bytes, direction);
  if (!device) no_memory_ = true;
  return device;
}

Napi::Value Call::copy(int32_t direction) {
  int64_t offset = 0, bytes = 0;
  DeviceBlock* block = device_block_of(info_[index_++], &offset);
  void* host = data_of(info_[index_++], &bytes);
  if (!block || offset < 0 || offset + bytes > block->bytes) fail("as large as the device data");
  if (!no_memory_) {
    target_->library->job_copy(cuda_job_, static_cast<char*>(block->device) + offset, host, bytes, direction);
  }
  return submit_cuda(nullptr, 0);
}

Napi::Value Call::submit_cuda(const void* args, int64_t bytes) {
  if (no_memory_) return Napi::Number::New(env_, static_cast<double>(kNoMemory));
  const CudaLibrary* library = target_->library;
  Environment& environment = Environment::of(env_);
  heddle_cuda_job* cuda_job = cuda_job_;
  if (sync_) {
    cuda_job_ = nullptr;
    library->job_cancel(cuda_job, exec_.user_cancel, &environment.closing);
    return Napi::Number::New(env_, static_cast<double>(library->job_wait(cuda_job, target_->launch, args, bytes)));
  }
  struct DeviceJob final : Job {
    Status execute() override { return kUnsupported; }  // the library runs it
    std::vector<DeviceHandle> blocks;
  };
  auto* job = new DeviceJob;
  hold(job);
  job->blocks = std::move(blocks_);
  if (!environment.adopt(job)) {
    delete job;
    return Napi::Number::New(env_, static_cast<double>(kCancelled));
  }
  cuda_job_ = nullptr;
  library->job_cancel(cuda_job, exec_.user_cancel, &environment.closing);
  library->job_submit(
      cuda_job, target_->launch, args, bytes,
      [](void* user, int64_t status) {
        auto* done = static_cast<DeviceJob*>(user);
        done->status = status;
        Environment::complete(done);
      },
      job);
  return Napi::Number::New(env_, 0);
}

void Call::fail(const char* wanted) {
  throw Napi::TypeError::New(env_, "heddle native: argument " + std::to_string(index_ - 1) + " must be " + wanted);
}

}  // namespace heddle::binding
