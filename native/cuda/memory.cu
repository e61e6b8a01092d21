// Caching allocators of device and pinned memory. A block is cached only after the job that used it is complete, so
// any stream may take it at once. Sizes are rounded to four steps per power of two: at most 25 % more than asked.
#include <map>
#include <mutex>
#include <unordered_map>
#include <vector>

#include "cuda/job.h"

namespace heddle::cuda {
namespace {

struct Device {
  static cudaError_t alloc(void** p, size_t n) { return cudaMalloc(p, n); }
  static void free(void* p) { cudaFree(p); }
};
struct Pinned {
  static cudaError_t alloc(void** p, size_t n) { return cudaMallocHost(p, n); }
  static void free(void* p) { cudaFreeHost(p); }
};

int64_t size_class(int64_t bytes) {
  if (bytes <= 512) return 512;
  int64_t step = 128;
  while (step * 8 < bytes) step *= 2;  // 4 steps between 4 * step and 8 * step
  return (bytes + step - 1) / step * step;
}

template <class Kind>
class Cache {
 public:
  void* alloc(int64_t bytes) {
    if (bytes < 0 || bytes > (int64_t{1} << 60)) return nullptr;
    const int64_t size = size_class(bytes);
    std::lock_guard<std::mutex> lock(mutex_);
    void* p = nullptr;
    auto at = free_.find(size);
    if (at != free_.end() && !at->second.empty()) {
      p = at->second.back();
      at->second.pop_back();
      cached_ -= size;
    } else {
      if (limit_ > 0 && live_ + cached_ + size > limit_) release();
      if (limit_ > 0 && live_ + size > limit_) return nullptr;
      cudaError_t error = Kind::alloc(&p, static_cast<size_t>(size));
      if (error == cudaErrorMemoryAllocation) {
        cudaGetLastError();
        release();
        error = Kind::alloc(&p, static_cast<size_t>(size));
      }
      if (error != cudaSuccess) {
        cudaGetLastError();
        return nullptr;
      }
    }
    HEDDLE_GUARD_BLOCK(p, bytes, size);
    sizes_[p] = size;
    live_ += size;
    if (live_ > peak_) peak_ = live_;
    return p;
  }

  void free(void* p) {
    std::lock_guard<std::mutex> lock(mutex_);
    auto at = sizes_.find(p);
    if (at == sizes_.end()) return;
    HEDDLE_GUARD_BLOCK(p, 0, at->second);
    live_ -= at->second;
    cached_ += at->second;
    free_[at->second].push_back(p);
    sizes_.erase(at);
  }

  void trim() {
    std::lock_guard<std::mutex> lock(mutex_);
    release();
  }

  void set_limit(int64_t bytes) {
    std::lock_guard<std::mutex> lock(mutex_);
    limit_ = bytes;
    if (limit_ > 0 && live_ + cached_ > limit_) release();
  }

  void info(heddle_cuda_memory_info* out) {
    std::lock_guard<std::mutex> lock(mutex_);
    out->live = live_;
    out->live_blocks = static_cast<int64_t>(sizes_.size());
    out->cached = cached_;
    out->peak = peak_;
    out->limit = limit_;
  }

  int64_t held() {
    std::lock_guard<std::mutex> lock(mutex_);
    return live_ + cached_;
  }

 private:
  void release() {
    for (auto& [size, blocks] : free_) {
      for (void* p : blocks) {
        HEDDLE_GUARD_BLOCK(p, size, size);
        Kind::free(p);
      }
      cached_ -= size * static_cast<int64_t>(blocks.size());
      blocks.clear();
    }
  }

  std::mutex mutex_;
  std::map<int64_t, std::vector<void*>> free_;
  std::unordered_map<void*, int64_t> sizes_;
  int64_t live_ = 0, cached_ = 0, peak_ = 0, limit_ = 0;
};

// Never destroyed: the library's thread outlives main().
Cache<Device>& device_cache() {
  static auto* cache = new Cache<Device>;
  return *cache;
}
Cache<Pinned>& pinned_cache() {
  static auto* cache = new Cache<Pinned>;
  return *cache;
}

std::mutex jobs_mutex;
int64_t jobs = 0;

}  // namespace

void* pinned_alloc(int64_t bytes) { return pinned_cache().alloc(bytes); }
void pinned_free(void* block) { pinned_cache().free(block); }
void note_jobs(int64_t change) {
  std::lock_guard<std::mutex> lock(jobs_mutex);
  jobs += change;
}

}  // namespace heddle::cuda

using namespace heddle::cuda;

extern "C" {

void* heddle_cuda_alloc(int64_t bytes) { return device_cache().alloc(bytes); }
void heddle_cuda_free(void* block) { device_cache().free(block); }
void heddle_cuda_set_limit(int64_t bytes) { device_cache().set_limit(bytes); }
void heddle_cuda_trim(void) {
  device_cache().trim();
  pinned_cache().trim();
}
void heddle_cuda_memory(heddle_cuda_memory_info* info) {
  device_cache().info(info);
  info->pinned = pinned_cache().held();
  std::lock_guard<std::mutex> lock(jobs_mutex);
  info->jobs = jobs;
}
}
