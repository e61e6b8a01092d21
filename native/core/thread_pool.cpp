#include "core/thread_pool.h"

#include <algorithm>
#include <chrono>
#include <condition_variable>
#include <mutex>
#include <system_error>
#include <thread>
#include <vector>

#if defined(__x86_64__) || defined(_M_X64)
#include <immintrin.h>
#endif
#if defined(__linux__)
#include <sched.h>
#endif

namespace heddle {
namespace {

struct Region {
  Region(RegionFn f, void* c, int64_t n, int64_t g, const Exec* e) : fn(f), context(c), count(n), grain(g), exec(e) {}

  RegionFn fn;
  void* context;
  int64_t count, grain;
  const Exec* exec;
  std::atomic<int64_t> next{0};
  std::atomic<bool> cancelled{false};
  int helpers_wanted = 0;  // guarded by Pool::mutex_
  int helpers_inside = 0;  // guarded by Pool::mutex_

  void work() {
    for (;;) {
      if (exec->cancelled()) {
        cancelled.store(true, std::memory_order_relaxed);
        return;
      }
      const int64_t begin = next.fetch_add(grain, std::memory_order_relaxed);
      if (begin >= count) return;
      fn(context, begin, std::min(begin + grain, count));
    }
  }
  bool exhausted() const { return next.load(std::memory_order_relaxed) >= count; }
};

inline void relax() {
#if defined(__x86_64__) || defined(_M_X64)
  _mm_pause();
#elif defined(__aarch64__)
  __asm__ volatile("yield");
#endif
}

class Pool {
 public:
  // Never destroyed: workers outlive static destruction, and the addon pins itself in memory for them.
  static Pool& get() {
    static Pool* pool = new Pool;
    return *pool;
  }

  void submit(Task* task, int threads) {
    std::unique_lock<std::mutex> lock(mutex_);
    const bool have_workers = ensure_workers(threads);
    if (!have_workers) {  // the system refuses new threads: run here rather than never
      lock.unlock();
      task->run(task);
      return;
    }
    task->next = nullptr;
    (tail_ ? tail_->next : head_) = task;
    tail_ = task;
    work_signal_.fetch_add(1, std::memory_order_release);
    lock.unlock();
    wake_.notify_one();
  }

  Task* remove(bool (*match)(const Task*, const void*), const void* context) {
    std::lock_guard<std::mutex> lock(mutex_);
    Task *kept = nullptr, *removed = nullptr, **kept_end = &kept, **removed_end = &removed;
    tail_ = nullptr;
    for (Task* t = head_; t; t = t->next) {
      if (match(t, context)) {
        *removed_end = t;
        removed_end = &t->next;
      } else {
        *kept_end = tail_ = t;
        kept_end = &t->next;
      }
    }
    *kept_end = *removed_end = nullptr;
    head_ = kept;
    return removed;
  }

  bool run(Region& region, int threads) {
    {
      std::lock_guard<std::mutex> lock(mutex_);
      ensure_workers(threads);
      region.helpers_wanted = threads - 1;
      regions_.push_back(&region);
      work_signal_.fetch_add(1, std::memory_order_release);
    }
    if (threads > 2) {
      wake_.notify_all();
    } else {
      wake_.notify_one();
    }
    region.work();
    std::unique_lock<std::mutex> lock(mutex_);
    regions_.erase(std::find(regions_.begin(), regions_.end(), &region));
    // Helpers are inside their last tile: spin briefly, it usually ends within microseconds.
    for (int spin = 0; region.helpers_inside > 0 && spin < 200; ++spin) {
      lock.unlock();
      for (int i = 0; i < 64; ++i) relax();
      lock.lock();
    }
    done_.wait(lock, [&] { return region.helpers_inside == 0; });
    return !region.cancelled.load(std::memory_order_relaxed);
  }

 private:
  bool ensure_workers(int threads) {
    const int wanted = std::min(threads, kMaxThreads);
    while (workers_ < wanted) {
      try {
        std::thread([this] { loop(); }).detach();
        ++workers_;
      } catch (const std::system_error&) {
        break;
      }
    }
    return workers_ > 0;
  }

  Region* joinable() {
    for (Region* r : regions_) {
      if (r->helpers_wanted > 0 && !r->exhausted()) return r;
    }
    return nullptr;
  }

  void loop() {
    std::unique_lock<std::mutex> lock(mutex_);
    for (;;) {
      if (Region* r = joinable()) {
        --r->helpers_wanted;
        ++r->helpers_inside;
        lock.unlock();
        r->work();
        lock.lock();
        if (--r->helpers_inside == 0) done_.notify_all();
        continue;
      }
      if (head_) {
        Task* task = head_;
        head_ = task->next;
        if (!head_) tail_ = nullptr;
        lock.unlock();
        task->run(task);
        lock.lock();
        continue;
      }
      // Regions come in quick succession inside one op; a short spin saves a futex round trip between them.
      const uint32_t seen = work_signal_.load(std::memory_order_acquire);
      lock.unlock();
      const auto until = std::chrono::steady_clock::now() + std::chrono::microseconds(kSpinMicroseconds);
      bool signalled = false;
      do {
        for (int i = 0; i < 32 && !signalled; ++i) {
          relax();
          signalled = work_signal_.load(std::memory_order_acquire) != seen;
        }
      } while (!signalled && std::chrono::steady_clock::now() < until);
      lock.lock();
      wake_.wait(lock, [&] { return head_ != nullptr || joinable() != nullptr; });
    }
  }

  static constexpr int kSpinMicroseconds = 30;
  std::mutex mutex_;
  std::condition_variable wake_, done_;
  std::vector<Region*> regions_;
  Task *head_ = nullptr, *tail_ = nullptr;
  int workers_ = 0;
  std::atomic<uint32_t> work_signal_{0};
};

}  // namespace

int hardware_threads() {
#if defined(__linux__)
  cpu_set_t set;  // respects taskset and cgroup cpusets, which hardware_concurrency may not
  if (sched_getaffinity(0, sizeof set, &set) == 0) return std::max(1, CPU_COUNT(&set));
#endif
  return std::max(1, static_cast<int>(std::thread::hardware_concurrency()));
}

void submit_task(Task* task, int threads) { Pool::get().submit(task, std::max(1, threads)); }

Task* remove_tasks(bool (*match)(const Task*, const void*), const void* context) {
  return Pool::get().remove(match, context);
}

bool run_region(const Exec& exec, int64_t count, int64_t grain, RegionFn fn, void* context) {
  if (count <= 0) return !exec.cancelled();
  const int64_t tiles = (count + grain - 1) / grain;
  const int threads = static_cast<int>(std::min<int64_t>({exec.threads, tiles, kMaxThreads}));
  Region region(fn, context, count, grain, &exec);
  if (threads <= 1) {
    region.work();
    return !region.cancelled.load(std::memory_order_relaxed);
  }
  return Pool::get().run(region, threads);
}

}  // namespace heddle
