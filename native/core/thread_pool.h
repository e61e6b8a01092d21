// The library's own threads: data-parallel regions and background jobs on one set of workers.
//
// Every worker first helps an open region, then takes a queued job. A job (or a synchronous caller) that opens
// a region takes part in it, so progress never depends on a free worker: with all workers busy the caller does
// the whole loop itself. Tiles are handed out by an atomic counter; kernels write disjoint outputs per tile and
// never combine results across tiles in arrival order, which is what keeps results independent of the threads.
#pragma once
#include <atomic>
#include <cstdint>
#include <type_traits>

#include "core/cpu_features.h"
#include "core/status.h"

namespace heddle {

constexpr int kMaxThreads = 256;

// What a running kernel may use.
struct Exec {
  int threads = 1;
  Isa isa = Isa::kScalar;
  const std::atomic<int32_t>* user_cancel = nullptr;  // set by AbortSignal
  const std::atomic<int32_t>* env_cancel = nullptr;   // set when the JavaScript environment closes

  bool cancelled() const {
    return (user_cancel && user_cancel->load(std::memory_order_relaxed)) ||
           (env_cancel && env_cancel->load(std::memory_order_relaxed));
  }
};

// A background job; `run` is called once on a worker.
struct Task {
  void (*run)(Task*) = nullptr;
  Task* next = nullptr;
};

int hardware_threads();
void submit_task(Task* task, int threads);
// Takes the tasks that wait in the queue and match out of it, and returns them as a list; running ones stay.
Task* remove_tasks(bool (*match)(const Task* task, const void* context), const void* context);

using RegionFn = void (*)(void* context, int64_t begin, int64_t end);
bool run_region(const Exec& exec, int64_t count, int64_t grain, RegionFn fn, void* context);

// Calls f(begin, end) over [0, count) in tiles of `grain`, on at most exec.threads threads including this one.
// Returns false when cancelled (polled before each tile); outputs are then incomplete.
template <class F>
bool parallel_for(const Exec& exec, int64_t count, int64_t grain, F&& f) {
  using Fn = std::remove_reference_t<F>;
  return run_region(
      exec, count, grain < 1 ? 1 : grain,
      [](void* context, int64_t begin, int64_t end) { (*static_cast<Fn*>(context))(begin, end); },
      const_cast<void*>(static_cast<const void*>(&f)));
}

}  // namespace heddle
