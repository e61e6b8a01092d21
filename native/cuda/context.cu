// The device, and the one thread that runs jobs. See api.h.
#include <algorithm>
#include <chrono>
#include <condition_variable>
#include <cstdio>
#include <cstring>
#include <deque>
#include <mutex>
#include <string>
#include <thread>

#include "cuda/job.h"

namespace heddle::cuda {
namespace {

// Larger arrays are copied straight from pageable memory: pinning them would cost more than it saves.
constexpr int64_t kPinnedBytes = int64_t{8} << 20;

struct Context {
  std::mutex mutex;
  std::condition_variable wake;
  std::deque<heddle_cuda_job*> queued;
  std::vector<cudaStream_t> streams;
  std::vector<cudaEvent_t> events;
  std::string error;
  bool started = false;
  int64_t multiprocessors = 1;
};

// Never destroyed: its thread outlives main().
Context& context() {
  static auto* c = new Context;
  return *c;
}

// Pools of streams and events; their creation costs tens of microseconds.
template <class T, class Create>
cudaError_t take(std::vector<T>& pool, T* out, Create create) {
  {
    std::lock_guard<std::mutex> lock(context().mutex);
    if (!pool.empty()) {
      *out = pool.back();
      pool.pop_back();
      return cudaSuccess;
    }
  }
  return create(out);
}

int64_t start(heddle_cuda_job& job) {
  if (job.no_memory) return kNoMemory;
  if (job.cancelled()) return kCancelled;
  Context& c = context();
  cudaError_t error = take(c.streams, &job.stream, [](cudaStream_t* s) {
    return cudaStreamCreateWithFlags(s, cudaStreamNonBlocking);
  });
  if (error != cudaSuccess) return failed(error, "cudaStreamCreate");
  job.own_stream = true;
  error = take(c.events, &job.event, [](cudaEvent_t* e) {
    return cudaEventCreateWithFlags(e, cudaEventDisableTiming);
  });
  if (error != cudaSuccess) return failed(error, "cudaEventCreate");
  for (auto& t : job.transfers) {
    if (t.bytes <= kPinnedBytes) {
      t.pinned = pinned_alloc(t.bytes);
      if (t.pinned) job.pinned.push_back(t.pinned);
    }
    if (!(t.direction & HEDDLE_CUDA_IN)) continue;
    if (t.pinned) std::memcpy(t.pinned, t.host, static_cast<size_t>(t.bytes));
    const void* from = t.pinned ? t.pinned : t.host;
    error = cudaMemcpyAsync(t.device, from, static_cast<size_t>(t.bytes), cudaMemcpyHostToDevice, job.stream);
    if (error != cudaSuccess) return failed(error, "copy to the device");
  }
  if (job.launch) {
    const int64_t status = job.launch(job.args.data(), &job);
    if (status != kOk) return status;
  }
  for (auto& t : job.transfers) {
    if (!(t.direction & HEDDLE_CUDA_OUT)) continue;
    void* to = t.pinned ? t.pinned : t.host;
    error = cudaMemcpyAsync(to, t.device, static_cast<size_t>(t.bytes), cudaMemcpyDeviceToHost, job.stream);
    if (error != cudaSuccess) return failed(error, "copy from the device");
  }
  if (job.word) {
    error = cudaMemcpyAsync(job.word_on_host, job.word, sizeof(*job.word), cudaMemcpyDeviceToHost, job.stream);
    if (error != cudaSuccess) return failed(error, "copy of the status");
  }
  error = cudaEventRecord(job.event, job.stream);
  return error == cudaSuccess ? kOk : failed(error, "cudaEventRecord");
}

void release(heddle_cuda_job* job) {
  for (void* p : job->blocks) heddle_cuda_free(p);
  for (void* p : job->pinned) pinned_free(p);
  {
    Context& c = context();
    std::lock_guard<std::mutex> lock(c.mutex);
    if (job->own_stream && job->stream) c.streams.push_back(job->stream);
    if (job->event) c.events.push_back(job->event);
  }
  note_jobs(-1);
  delete job;
}

// The device is done with the job, or the job failed.
void finish(heddle_cuda_job* job, int64_t status) {
  if (status != kOk && job->own_stream) cudaStreamSynchronize(job->stream);  // its copies may still run
  if (status == kOk && job->word && *job->word_on_host != ~0ull) status = static_cast<int64_t>(*job->word_on_host);
  if (status == kOk && job->cancelled()) status = kCancelled;
  if (status == kOk) {
    for (auto& t : job->transfers) {
      if ((t.direction & HEDDLE_CUDA_OUT) && t.pinned) std::memcpy(t.host, t.pinned, static_cast<size_t>(t.bytes));
    }
  }
  const heddle_cuda_done done = job->done;
  void* user = job->user;
  release(job);
  done(user, status);
}

std::chrono::nanoseconds poll_interval(std::chrono::nanoseconds taken) {
  return std::clamp<std::chrono::nanoseconds>(taken / 16, std::chrono::microseconds(50), std::chrono::milliseconds(1));
}

void run_jobs() {
  Context& c = context();
  std::deque<heddle_cuda_job*> running;
  int idle = 0;
  std::chrono::steady_clock::time_point last;  // progress
  for (;;) {
    std::deque<heddle_cuda_job*> fresh;
    {
      std::unique_lock<std::mutex> lock(c.mutex);
      const auto queued = [&] { return !c.queued.empty(); };
      if (running.empty()) c.wake.wait(lock, queued);
      // Short jobs are met without a sleep; long ones are polled every 50 microseconds, later every 1/16 of what they
      // have taken.
      else if (idle > 200) c.wake.wait_for(lock, poll_interval(std::chrono::steady_clock::now() - last), queued);
      fresh.swap(c.queued);
    }
    for (heddle_cuda_job* job : fresh) {
      const int64_t status = start(*job);
      if (status == kOk) running.push_back(job);
      else finish(job, status);
    }
    bool progress = !fresh.empty();
    for (size_t i = 0; i < running.size();) {
      const cudaError_t state = cudaEventQuery(running[i]->event);
      if (state == cudaErrorNotReady) {
        ++i;
        continue;
      }
      heddle_cuda_job* job = running[i];
      running.erase(running.begin() + static_cast<std::ptrdiff_t>(i));
      finish(job, state == cudaSuccess ? kOk : failed(state, "kernel"));
      progress = true;
    }
    idle = progress ? 0 : idle + 1;
    if (progress) last = std::chrono::steady_clock::now();
  }
}

}  // namespace

int64_t multiprocessors() { return context().multiprocessors; }

int64_t failed(cudaError_t error, const char* what) {
  cudaGetLastError();
  Context& c = context();
  std::lock_guard<std::mutex> lock(c.mutex);
  c.error = std::string(what) + ": " + cudaGetErrorString(error);
  return error == cudaErrorMemoryAllocation ? kNoMemory : kDeviceError;
}

}  // namespace heddle::cuda

using namespace heddle;
using namespace heddle::cuda;

void* heddle_cuda_job::block(int64_t bytes) {
  void* p = heddle_cuda_alloc(bytes);
  if (p) blocks.push_back(p);
  else no_memory = true;
  return p;
}

unsigned long long* heddle_cuda_job::status() {
  if (word) return word;
  word_on_host = static_cast<unsigned long long*>(pinned_alloc(sizeof(*word)));
  if (!word_on_host) return nullptr;
  pinned.push_back(word_on_host);
  word = scratch<unsigned long long>(1);
  if (word) cudaMemsetAsync(word, 0xff, sizeof(*word), stream);
  return word;
}

int64_t heddle_cuda_job::launched() {
  const cudaError_t error = cudaGetLastError();
  return error == cudaSuccess ? kOk : failed(error, "launch");
}

extern "C" {

int32_t heddle_cuda_abi(void) { return HEDDLE_CUDA_ABI; }

int64_t heddle_cuda_open(heddle_cuda_device* device) {
  std::memset(device, 0, sizeof(*device));
  int count = 0;
  cudaError_t error = cudaGetDeviceCount(&count);
  if (error != cudaSuccess || count == 0) {
    failed(error == cudaSuccess ? cudaErrorNoDevice : error, "no CUDA device");
    return kUnsupported;
  }
  cudaDeviceProp p;
  error = cudaGetDeviceProperties(&p, 0);
  if (error != cudaSuccess) return failed(error, "cudaGetDeviceProperties");
  std::snprintf(device->name, sizeof(device->name), "%s", p.name);
  device->major = p.major;
  device->minor = p.minor;
  device->multiprocessors = p.multiProcessorCount;
  device->total_bytes = static_cast<int64_t>(p.totalGlobalMem);
  int version = 0;
  if (cudaDriverGetVersion(&version) == cudaSuccess) device->driver = version;
  if (cudaRuntimeGetVersion(&version) == cudaSuccess) device->runtime = version;
  if (p.major < 8) {
    Context& c = context();
    std::lock_guard<std::mutex> lock(c.mutex);
    c.error = std::string(p.name) + " has compute capability " + std::to_string(p.major) + "." +
              std::to_string(p.minor) + "; 8.0 or newer is needed";
    return kUnsupported;
  }
  context().multiprocessors = p.multiProcessorCount;
  return kOk;
}

void heddle_cuda_error(char* text, int64_t size) {
  Context& c = context();
  std::lock_guard<std::mutex> lock(c.mutex);
  std::snprintf(text, static_cast<size_t>(size), "%s", c.error.c_str());
}

heddle_cuda_job* heddle_cuda_job_begin(void* stream) {
  auto* job = new (std::nothrow) heddle_cuda_job;
  if (!job) return nullptr;
  job->stream = static_cast<cudaStream_t>(stream);
  note_jobs(1);
  return job;
}

void* heddle_cuda_job_array(heddle_cuda_job* job, void* host, int64_t bytes, int32_t direction) {
  void* p = job->block(bytes);
  if (p && bytes > 0) job->transfers.push_back({p, host, nullptr, bytes, direction});
  return p;
}

void heddle_cuda_job_copy(heddle_cuda_job* job, void* device, void* host, int64_t bytes, int32_t direction) {
  if (bytes > 0) job->transfers.push_back({device, host, nullptr, bytes, direction});
}

void heddle_cuda_job_cancel(heddle_cuda_job* job, const void* user_flag, const void* env_flag) {
  job->flags[0] = static_cast<const volatile int32_t*>(user_flag);
  job->flags[1] = static_cast<const volatile int32_t*>(env_flag);
}

void heddle_cuda_job_submit(heddle_cuda_job* job, heddle_cuda_launch launch, const void* args, int64_t args_bytes,
                            heddle_cuda_done done, void* user) {
  job->launch = launch;
  job->done = done;
  job->user = user;
  if (args_bytes > 0) {
    job->args.resize((static_cast<size_t>(args_bytes) + sizeof(std::max_align_t) - 1) / sizeof(std::max_align_t));
    std::memcpy(job->args.data(), args, static_cast<size_t>(args_bytes));
  }
  Context& c = context();
  std::lock_guard<std::mutex> lock(c.mutex);
  c.queued.push_back(job);
  if (!c.started) {
    c.started = true;
    std::thread(run_jobs).detach();
  }
  c.wake.notify_one();
}

int64_t heddle_cuda_job_wait(heddle_cuda_job* job, heddle_cuda_launch launch, const void* args, int64_t args_bytes) {
  struct Wait {
    std::mutex mutex;
    std::condition_variable wake;
    bool ready = false;
    int64_t status = 0;
  } wait;
  heddle_cuda_job_submit(
      job, launch, args, args_bytes,
      [](void* user, int64_t status) {
        auto* w = static_cast<Wait*>(user);
        std::lock_guard<std::mutex> lock(w->mutex);
        w->status = status;
        w->ready = true;
        w->wake.notify_one();
      },
      &wait);
  std::unique_lock<std::mutex> lock(wait.mutex);
  wait.wake.wait(lock, [&] { return wait.ready; });
  return wait.status;
}

int64_t heddle_cuda_job_run(heddle_cuda_job* job, heddle_cuda_launch launch, const void* args) {
  // Stream order lets a launch reuse the scratch of the one before it.
  for (void* p : job->blocks) heddle_cuda_free(p);
  for (void* p : job->pinned) pinned_free(p);
  job->blocks.clear();
  job->pinned.clear();
  job->word = nullptr;
  return launch(args, job);
}

void heddle_cuda_job_discard(heddle_cuda_job* job) { release(job); }
}
