#include <condition_variable>
#include <deque>
#include <mutex>
#include <thread>
#include <unordered_map>

#include "executor.h"

struct HostStream {
  uint64_t last = 0;  // number of its last task
};
struct HostEvent {
  uint64_t task = 0;
};

namespace cuda_host {
namespace {

struct Device {
  std::mutex mutex;
  std::condition_variable work, progress;
  std::deque<std::function<std::string()>> tasks;
  uint64_t queued = 0, done = 0;
  std::string sticky, refused;
  std::string text;  // what cudaGetErrorString returns
  bool started = false;
  std::unordered_map<void*, size_t> blocks;
  size_t used = 0;
};
// Never destroyed: its thread outlives main().
Device& device() {
  static auto* d = new Device;
  return *d;
}

size_t total_bytes() {
  const char* text = std::getenv("HEDDLE_CUDA_HOST_BYTES");
  return text ? std::strtoull(text, nullptr, 10) : size_t{4} << 30;
}

void run_tasks() {
  Device& d = device();
  std::unique_lock<std::mutex> lock(d.mutex);
  for (;;) {
    d.work.wait(lock, [&] { return !d.tasks.empty(); });
    auto task = std::move(d.tasks.front());
    d.tasks.pop_front();
    const bool broken = !d.sticky.empty();
    lock.unlock();
    std::string error = broken ? std::string() : task();
    task = nullptr;
    lock.lock();
    if (!error.empty()) d.sticky = std::move(error);
    ++d.done;
    d.progress.notify_all();
  }
}

cudaError_t state() { return device().sticky.empty() ? cudaSuccess : cudaErrorLaunchFailure; }

}  // namespace

void enqueue(cudaStream_t stream, std::function<std::string()> task) {
  Device& d = device();
  std::lock_guard<std::mutex> lock(d.mutex);
  d.tasks.push_back(std::move(task));
  ++d.queued;
  if (stream) stream->last = d.queued;
  if (!d.started) {
    d.started = true;
    std::thread(run_tasks).detach();
  }
  d.work.notify_one();
}

void refuse(const std::string& text) {
  Device& d = device();
  std::lock_guard<std::mutex> lock(d.mutex);
  d.refused = text;
}

}  // namespace cuda_host

using namespace cuda_host;

cudaError_t cudaGetDeviceCount(int* count) {
  *count = std::getenv("HEDDLE_CUDA_HOST_NO_DEVICE") ? 0 : 1;
  return cudaSuccess;
}
cudaError_t cudaGetDeviceProperties(cudaDeviceProp* p, int) {
  std::memset(p, 0, sizeof(*p));
  std::strcpy(p->name, "heddle host shim (no GPU)");
  p->totalGlobalMem = total_bytes();
  p->sharedMemPerBlockOptin = 163 << 10;
  p->major = 8;
  p->multiProcessorCount = 4;
  return cudaSuccess;
}
cudaError_t cudaDriverGetVersion(int* version) {
  *version = 13000;
  return cudaSuccess;
}
cudaError_t cudaRuntimeGetVersion(int* version) { return cudaDriverGetVersion(version); }

const char* cudaGetErrorString(cudaError_t error) {
  Device& d = device();
  std::lock_guard<std::mutex> lock(d.mutex);
  switch (error) {
    case cudaErrorMemoryAllocation: return "out of memory";
    case cudaErrorNoDevice: return "no CUDA-capable device is detected";
    case cudaErrorInvalidConfiguration: return d.text.c_str();
    case cudaErrorLaunchFailure: return d.sticky.c_str();
    default: return "error";
  }
}

cudaError_t cudaGetLastError() {
  Device& d = device();
  std::lock_guard<std::mutex> lock(d.mutex);
  if (!d.refused.empty()) {
    d.text = d.refused;
    d.refused.clear();
    return cudaErrorInvalidConfiguration;
  }
  return state();
}

cudaError_t cudaMalloc(void** p, size_t bytes) {
  Device& d = device();
  std::lock_guard<std::mutex> lock(d.mutex);
  if (state() != cudaSuccess) return state();
  if (d.used + bytes > total_bytes()) return cudaErrorMemoryAllocation;
  *p = std::aligned_alloc(512, (bytes + 511) / 512 * 512);
  if (!*p) return cudaErrorMemoryAllocation;
  std::memset(*p, 0xcb, bytes);
  d.blocks[*p] = bytes;
  d.used += bytes;
  return cudaSuccess;
}
cudaError_t cudaFree(void* p) {
  Device& d = device();
  std::lock_guard<std::mutex> lock(d.mutex);
  const auto at = d.blocks.find(p);
  if (at == d.blocks.end()) return cudaErrorInvalidValue;
  d.used -= at->second;
  d.blocks.erase(at);
  std::free(p);
  return cudaSuccess;
}
cudaError_t cudaMallocHost(void** p, size_t bytes) {
  *p = std::malloc(bytes);
  return *p ? cudaSuccess : cudaErrorMemoryAllocation;
}
cudaError_t cudaFreeHost(void* p) {
  std::free(p);
  return cudaSuccess;
}

cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t bytes, cudaMemcpyKind, cudaStream_t stream) {
  enqueue(stream, [=] {
    std::memcpy(to, from, bytes);
    return std::string();
  });
  return cudaSuccess;
}
cudaError_t cudaMemsetAsync(void* p, int value, size_t bytes, cudaStream_t stream) {
  enqueue(stream, [=] {
    std::memset(p, value, bytes);
    return std::string();
  });
  return cudaSuccess;
}

cudaError_t cudaStreamCreateWithFlags(cudaStream_t* stream, unsigned) {
  *stream = new HostStream;
  return cudaSuccess;
}
cudaError_t cudaStreamSynchronize(cudaStream_t stream) {
  Device& d = device();
  std::unique_lock<std::mutex> lock(d.mutex);
  const uint64_t last = stream ? stream->last : d.queued;
  d.progress.wait(lock, [&] { return d.done >= last; });
  return state();
}
cudaError_t cudaEventCreateWithFlags(cudaEvent_t* event, unsigned) {
  *event = new HostEvent;
  return cudaSuccess;
}
cudaError_t cudaEventRecord(cudaEvent_t event, cudaStream_t) {
  Device& d = device();
  std::lock_guard<std::mutex> lock(d.mutex);
  event->task = d.queued;  // one queue serves all streams
  return cudaSuccess;
}
cudaError_t cudaEventQuery(cudaEvent_t event) {
  Device& d = device();
  std::lock_guard<std::mutex> lock(d.mutex);
  if (d.done < event->task) return cudaErrorNotReady;
  return state();
}
