// The thread pool: every index once, nesting, many submitters, cancellation, background tasks. Run under TSan.
#include "core/thread_pool.h"

#include <condition_variable>
#include <memory>
#include <mutex>
#include <numeric>
#include <thread>
#include <vector>

#include "check.h"

using namespace heddle;

namespace {

Exec exec_with(int threads) {
  Exec e;
  e.threads = threads;
  return e;
}

// A task that counts itself done; wait() returns when all have run.
class Gate {
 public:
  explicit Gate(int count) : left_(count) {}
  void arrive() {
    std::lock_guard<std::mutex> lock(mutex_);
    if (--left_ == 0) all_.notify_all();
  }
  void wait() {
    std::unique_lock<std::mutex> lock(mutex_);
    all_.wait(lock, [&] { return left_ <= 0; });
  }

 private:
  std::mutex mutex_;
  std::condition_variable all_;
  int left_;
};

template <class F>
struct FunctionTask : Task {
  explicit FunctionTask(F f) : function(std::move(f)) {
    run = [](Task* t) { static_cast<FunctionTask*>(t)->function(); };
  }
  F function;
};
template <class F>
std::unique_ptr<FunctionTask<F>> make_task(F f) {
  return std::make_unique<FunctionTask<F>>(std::move(f));
}

int64_t sum_squares(int threads, int64_t n) {
  std::vector<int64_t> out(static_cast<size_t>(n));
  parallel_for(exec_with(threads), n, 7, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) out[static_cast<size_t>(i)] = i * i;
  });
  return std::accumulate(out.begin(), out.end(), int64_t{0});
}
int64_t expected_squares(int64_t n) { return (n - 1) * n * (2 * n - 1) / 6; }

}  // namespace

TEST(every_index_once) {
  for (int threads : {1, 2, 3, 4, 8}) {
    for (int64_t count : {0, 1, 2, 3, 7, 64, 1000}) {
      for (int64_t grain : {-1, 0, 1, 2, 5, 64, 5000}) {
        std::vector<std::atomic<int>> seen(static_cast<size_t>(count));
        std::atomic<int64_t> widest{0};
        const bool done = parallel_for(exec_with(threads), count, grain, [&](int64_t begin, int64_t end) {
          CHECK(begin < end && end <= count, "tile %lld..%lld", (long long)begin, (long long)end);
          int64_t w = widest.load();
          while (end - begin > w && !widest.compare_exchange_weak(w, end - begin)) {
          }
          for (int64_t i = begin; i < end; ++i) seen[static_cast<size_t>(i)].fetch_add(1);
        });
        CHECK(done, "not cancelled");
        CHECK(widest.load() <= (grain < 1 ? 1 : grain), "tile of %lld", (long long)widest.load());
        for (auto& s : seen) CHECK(s.load() == 1, "seen %d times", s.load());
      }
    }
  }
}

TEST(nested_regions) {
  for (int threads : {2, 4}) {
    std::atomic<int64_t> total{0};
    parallel_for(exec_with(threads), 12, 1, [&](int64_t, int64_t) {
      parallel_for(exec_with(threads), 20, 3, [&](int64_t begin, int64_t end) {
        parallel_for(exec_with(2), end - begin, 1, [&](int64_t b, int64_t e) { total.fetch_add(e - b); });
      });
    });
    CHECK(total.load() == 240, "%lld", (long long)total.load());
  }
}

TEST(many_submitters) {
  constexpr int kCallers = 8, kRounds = kSlow ? 100 : 400;
  std::vector<std::thread> callers;
  for (int c = 0; c < kCallers; ++c) {
    callers.emplace_back([c] {
      for (int r = 0; r < kRounds; ++r) {
        const int64_t n = 1 + (c * 131 + r * 17) % 400;
        const int64_t sum = sum_squares(1 + r % 5, n);
        CHECK(sum == expected_squares(n), "n = %lld: %lld", (long long)n, (long long)sum);
      }
    });
  }
  for (std::thread& t : callers) t.join();
}

TEST(cancellation_stops_within_a_tile) {
  for (int threads : {1, 2, 4}) {
    std::atomic<int32_t> user{0}, environment{0};
    for (std::atomic<int32_t>* flag : {&user, &environment}) {
      user = environment = 0;
      Exec e = exec_with(threads);
      e.user_cancel = &user;
      e.env_cancel = &environment;
      std::atomic<int> before{0}, after{0};
      const bool done = parallel_for(e, 100000, 1, [&](int64_t, int64_t) {
        if (flag->load()) after.fetch_add(1);
        if (before.fetch_add(1) == 50) flag->store(1);
      });
      CHECK(!done, "reported as complete");
      // Each other thread may have entered one tile just before the flag rose, but no thread enters two.
      CHECK(after.load() <= threads - 1, "%d tiles entered after the flag, %d threads", after.load(), threads);
      CHECK(!parallel_for(e, 10, 1, [&](int64_t, int64_t) { after.fetch_add(1000); }), "starts although cancelled");
      CHECK(after.load() < 1000, "a tile ran although cancelled");
      CHECK(!parallel_for(e, 0, 1, [&](int64_t, int64_t) {}), "an empty region must report cancellation too");
    }
  }
}

TEST(tasks_run_once_and_open_regions) {
  constexpr int kTasks = kSlow ? 200 : 1000;
  Gate gate(kTasks);
  std::vector<int> runs(kTasks, 0);
  std::atomic<int64_t> wrong{0};
  auto body = [&](int i) {
    const int64_t n = 1 + i % 97;
    if (sum_squares(1 + i % 4, n) != expected_squares(n)) wrong.fetch_add(1);
    ++runs[static_cast<size_t>(i)];
    gate.arrive();
  };
  struct Indexed : Task {
    decltype(body)* f;
    int i;
  };
  std::vector<Indexed> tasks(kTasks);
  for (int i = 0; i < kTasks; ++i) {
    tasks[static_cast<size_t>(i)].f = &body;
    tasks[static_cast<size_t>(i)].i = i;
    tasks[static_cast<size_t>(i)].run = [](Task* t) {
      auto* self = static_cast<Indexed*>(t);
      (*self->f)(self->i);
    };
  }
  // Two threads submit, as two JavaScript environments would.
  std::thread other([&] {
    for (int i = 1; i < kTasks; i += 2) submit_task(&tasks[static_cast<size_t>(i)], 4);
  });
  for (int i = 0; i < kTasks; i += 2) submit_task(&tasks[static_cast<size_t>(i)], 2);
  other.join();
  gate.wait();
  CHECK(wrong.load() == 0, "%lld wrong sums", (long long)wrong.load());
  for (int n : runs) CHECK(n == 1, "a task ran %d times", n);
}

TEST(progress_when_every_worker_is_busy) {
  std::mutex mutex;
  std::condition_variable released;
  bool go = false;
  constexpr int kBlocked = 64;  // more than the pool has workers
  Gate gate(kBlocked);
  auto block = [&] {
    std::unique_lock<std::mutex> lock(mutex);
    released.wait(lock, [&] { return go; });
    lock.unlock();
    gate.arrive();
  };
  std::vector<std::unique_ptr<FunctionTask<decltype(block)>>> tasks;
  for (int i = 0; i < kBlocked; ++i) {
    tasks.push_back(make_task(block));
    submit_task(tasks.back().get(), 4);
  }
  CHECK(sum_squares(4, 1000) == expected_squares(1000), "the caller must do the whole region itself");
  {
    std::lock_guard<std::mutex> lock(mutex);
    go = true;
  }
  released.notify_all();
  gate.wait();
}

TEST(queued_tasks_can_be_taken_back) {
  constexpr int kBlocked = 64, kQueued = 30;
  std::mutex mutex;
  std::condition_variable released;
  bool go = false;
  Gate blocked(kBlocked), queued(kQueued - kQueued / 3);
  std::atomic<int> runs{0};
  auto block = [&] {
    std::unique_lock<std::mutex> lock(mutex);
    released.wait(lock, [&] { return go; });
    lock.unlock();
    blocked.arrive();
  };
  auto count = [&] {
    runs.fetch_add(1);
    queued.arrive();
  };
  std::vector<std::unique_ptr<FunctionTask<decltype(block)>>> blockers;
  std::vector<std::unique_ptr<FunctionTask<decltype(count)>>> counters;
  for (int i = 0; i < kBlocked; ++i) {
    blockers.push_back(make_task(block));
    submit_task(blockers.back().get(), 2);
  }
  std::vector<const Task*> unwanted;
  for (int i = 0; i < kQueued; ++i) {
    counters.push_back(make_task(count));
    submit_task(counters.back().get(), 2);
    if (i % 3 == 2) unwanted.push_back(counters.back().get());  // the last one included: the tail must move
  }
  auto match = [](const Task* t, const void* list) {
    for (const Task* u : *static_cast<const std::vector<const Task*>*>(list)) {
      if (u == t) return true;
    }
    return false;
  };
  size_t removed = 0;
  for (Task* t = remove_tasks(match, &unwanted); t; t = t->next) CHECK(t == unwanted[removed++], "order");
  CHECK(removed == unwanted.size(), "%zu taken back", removed);
  CHECK(remove_tasks(match, &unwanted) == nullptr, "taken back twice");
  {
    std::lock_guard<std::mutex> lock(mutex);
    go = true;
  }
  released.notify_all();
  blocked.wait();
  queued.wait();
  Gate last(1);  // the queue still works
  auto finish = make_task([&] { last.arrive(); });
  submit_task(finish.get(), 2);
  last.wait();
  CHECK(runs.load() == kQueued - kQueued / 3, "%d ran", runs.load());
}

TEST(thread_count_is_sane) { CHECK(hardware_threads() >= 1 && hardware_threads() <= 4096, "%d", hardware_threads()); }
