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

bool Environment::enqueue(Job* job) {
  if (closing.load()) return false;
  job->environment = this;
  job->exec.env_cancel = &closing;
  job->run = run_job;
  if (in_flight_++ == 0) napi_ref_threadsafe_function(env_, completions_);
  outside_.fetch_add(1, std::memory_order_relaxed);
  submit_task(job, job->exec.threads);
  return true;
}

void Environment::run_job(Task* task) {
  auto* job = static_cast<Job*>(task);
  Environment* self = job->environment;
  job->status = job->exec.cancelled() ? kCancelled : job->execute();
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

void* Call::data_of(napi_value v) {
  void* data = nullptr;
  if (napi_get_typedarray_info(env_, v, nullptr, nullptr, &data, nullptr, nullptr) != napi_ok) {
    napi_valuetype type;
    napi_typeof(env_, v, &type);
    if (type == napi_null || type == napi_undefined) return nullptr;
    fail("a typed array");
  }
  if (!sync_) held_.push_back(v);
  return data;
}

Napi::Value Call::queue(std::unique_ptr<Job> job) {
  job->exec = exec_;
  napi_create_reference(env_, done_, 1, &job->done);
  job->held.reserve(held_.size());
  for (napi_value v : held_) {
    napi_ref r;
    napi_create_reference(env_, v, 1, &r);
    job->held.push_back(r);
  }
  Job* raw = job.release();
  if (!Environment::of(env_).enqueue(raw)) {
    delete raw;
    return Napi::Number::New(env_, static_cast<double>(kCancelled));
  }
  return Napi::Number::New(env_, 0);
}

void Call::fail(const char* wanted) {
  throw Napi::TypeError::New(env_, "heddle native: argument " + std::to_string(index_ - 1) + " must be " + wanted);
}

}  // namespace heddle::binding
