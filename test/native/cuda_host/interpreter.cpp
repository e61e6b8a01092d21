#include "interpreter.h"

#include <sys/mman.h>

#include <algorithm>
#include <memory>
#include <string>
#include <unordered_map>
#include <vector>

#include "executor.h"
#if !defined(__x86_64__)
#include <ucontext.h>
#endif

uint3 threadIdx, blockIdx;
dim3 blockDim, gridDim;

namespace cuda_host {
namespace {

constexpr size_t kStackBytes = 128 << 10;
constexpr int kMaxBlockThreads = 1024;
constexpr size_t kDefaultShared = 48 << 10, kMaxShared = 163 << 10;  // of sm_80

enum class State : uint8_t { kReady, kBarrier, kCollective, kDone };

struct Copy {
  void* to;
  const void* from;
  int valid;
};

struct Fiber {
  uint3 index{};
  State state = State::kDone;
  int line = 0;
  uint32_t mask = 0;
  Collective run = nullptr;
  void* deposit = nullptr;
  bool predicate = false;
  int reduced[3] = {0, 0, 0};
  std::vector<Copy> copies;    // of cp.async, those that wait
  std::vector<size_t> groups;  // how many of them end each committed group
#if defined(__x86_64__)
  void* stack_pointer = nullptr;
#else
  ucontext_t context;
#endif
};

#if defined(__x86_64__)
extern "C" void heddle_switch_stack(void** save, void* to);
asm(R"(
.text
.type heddle_switch_stack, @function
heddle_switch_stack:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size heddle_switch_stack, .-heddle_switch_stack
)");
#endif

// The block that runs now; only the executor's thread touches any of this.
struct Block {
  std::vector<Fiber> fibers{static_cast<size_t>(kMaxBlockThreads)};
  uint32_t waiting[kMaxBlockThreads / 32] = {};  // lanes of each warp in a warp operation
  uint32_t exited[kMaxBlockThreads / 32] = {};
  char* stacks = nullptr;
  bool left_dirty = false;  // a block that failed left its fibers' frames behind
  int count = 0;
  Fiber* current = nullptr;
  const std::function<void()>* body = nullptr;
  std::string error;
  std::unique_ptr<unsigned char[]> shared;
#if defined(__x86_64__)
  void* scheduler = nullptr;
#else
  ucontext_t scheduler;
#endif
};
Block& block() {
  static auto* b = new Block;
  return *b;
}

void to_scheduler() {
  Block& b = block();
  Fiber* f = b.current;
#if defined(__x86_64__)
  heddle_switch_stack(&f->stack_pointer, b.scheduler);
#else
  swapcontext(&f->context, &b.scheduler);
#endif
}

void fiber_main() {
  Block& b = block();
  (*b.body)();
  cp_async_wait(0);  // what the kernel never waited for still must be in bounds
  b.current->state = State::kDone;
  const auto at = static_cast<size_t>(b.current - b.fibers.data());
  b.exited[at / 32] |= 1u << at % 32;
  to_scheduler();
  std::abort();
}

void prepare(int i) {
  Block& b = block();
  Fiber& f = b.fibers[static_cast<size_t>(i)];
  f.state = State::kReady;
  f.copies.clear();
  f.groups.clear();
  char* stack = b.stacks + static_cast<size_t>(i) * kStackBytes;
#if defined(__x86_64__)
  // heddle_switch_stack pops six registers and returns into fiber_main, which must find the stack 8 short of 16.
  auto** top = reinterpret_cast<void**>(stack + kStackBytes - 64);
  top[-1] = nullptr;  // fiber_main's return address
  top[-2] = reinterpret_cast<void*>(fiber_main);
  for (int r = 3; r <= 8; ++r) top[-r] = nullptr;
  f.stack_pointer = top - 8;
#else
  getcontext(&f.context);
  f.context.uc_stack.ss_sp = stack;
  f.context.uc_stack.ss_size = kStackBytes;
  f.context.uc_link = nullptr;
  makecontext(&f.context, fiber_main, 0);
#endif
}

void resume(Fiber& f) {
  Block& b = block();
  b.current = &f;
  threadIdx = f.index;
#if defined(__x86_64__)
  heddle_switch_stack(&b.scheduler, f.stack_pointer);
#else
  swapcontext(&b.scheduler, &f.context);
#endif
}

// The order in which blocks, warps or lanes run: ascending, descending, then shuffled.
struct Order {
  uint64_t state;
  int kind;
  explicit Order(uint64_t launch, uint64_t seed)
      : state((launch + 1) * 0x9e3779b97f4a7c15ull ^ seed), kind(static_cast<int>(std::min<uint64_t>(launch % 4, 2))) {}
  uint64_t next() {
    state ^= state << 13;
    state ^= state >> 7;
    state ^= state << 17;
    return state;
  }
  void arrange(std::vector<int64_t>& list, int64_t n) {
    list.resize(static_cast<size_t>(n));
    for (int64_t i = 0; i < n; ++i) list[static_cast<size_t>(i)] = kind == 1 ? n - 1 - i : i;
    if (kind != 2) return;
    for (int64_t i = n - 1; i > 0; --i) std::swap(list[static_cast<size_t>(i)], list[(next() >> 32) * static_cast<uint64_t>(i + 1) >> 32]);
  }
};

std::string where(const Fiber& f) {
  return "thread (" + std::to_string(f.index.x) + ", " + std::to_string(f.index.y) + ", " + std::to_string(f.index.z) +
         ") of block (" + std::to_string(blockIdx.x) + ", " + std::to_string(blockIdx.y) + ", " +
         std::to_string(blockIdx.z) + ")";
}

// Releases a barrier at which every thread waits; otherwise says why the block cannot go on.
bool release_barrier() {
  Block& b = block();
  int count = 0;
  const Fiber* barrier = nullptr;
  for (int i = 0; i < b.count; ++i) {
    const Fiber& f = b.fibers[static_cast<size_t>(i)];
    if (f.state == State::kCollective) {
      b.error = where(f) + " waits in a warp operation (line " + std::to_string(f.line) +
                ") for lanes of its mask that never come";
      return false;
    }
    if (f.state == State::kBarrier) {
      if (barrier && barrier->line != f.line) {
        b.error = where(*barrier) + " and " + where(f) + " wait at different barriers, lines " +
                  std::to_string(barrier->line) + " and " + std::to_string(f.line);
        return false;
      }
      barrier = &f;
      count += f.predicate;
    }
  }
  for (int i = 0; i < b.count; ++i) {
    Fiber& f = b.fibers[static_cast<size_t>(i)];
    if (f.state == State::kDone) {
      b.error = where(f) + " has exited while others wait at the barrier of line " + std::to_string(barrier->line);
      return false;
    }
    f.reduced[0] = count;
    f.reduced[1] = count == b.count;
    f.reduced[2] = count > 0;
    f.state = State::kReady;
  }
  return true;
}

bool run_block(Order& order) {
  Block& b = block();
  std::vector<int64_t> warps, lanes;
  for (int i = 0; i < b.count; ++i) prepare(i);
  std::fill(b.waiting, b.waiting + b.count / 32, 0u);
  std::fill(b.exited, b.exited + b.count / 32, 0u);
  for (;;) {
    order.arrange(warps, b.count / 32);
    for (int64_t w : warps) {
      for (bool any = true; any;) {
        any = false;
        order.arrange(lanes, 32);
        for (int64_t l : lanes) {
          Fiber& f = b.fibers[static_cast<size_t>(w * 32 + l)];
          if (f.state != State::kReady) continue;
          resume(f);
          if (!b.error.empty()) return false;
          any = true;
        }
      }
    }
    bool done = true;
    for (int i = 0; i < b.count; ++i) done = done && b.fibers[static_cast<size_t>(i)].state == State::kDone;
    if (done) return true;
    if (!release_barrier()) return false;
  }
}

std::string run_grid(const std::string& name, dim3 grid, dim3 threads, size_t shared, const std::function<void()>& body,
                     uint64_t number) {
  static const uint64_t seed = std::getenv("HEDDLE_CUDA_HOST_SEED") ? std::strtoull(std::getenv("HEDDLE_CUDA_HOST_SEED"), nullptr, 10) : 0;
  Block& b = block();
  if (!b.stacks) {
    void* p = mmap(nullptr, kStackBytes * kMaxBlockThreads, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (p == MAP_FAILED) return "no memory for the fibers' stacks";
    b.stacks = static_cast<char*>(p);
  }
  if (b.left_dirty) HEDDLE_GUARD_BLOCK(b.stacks, kStackBytes * kMaxBlockThreads, kStackBytes * kMaxBlockThreads);
  b.left_dirty = false;
  b.count = static_cast<int>(threads.x * threads.y * threads.z);
  b.body = &body;
  blockDim = threads;
  gridDim = grid;
  for (int i = 0; i < b.count; ++i) {
    const auto t = static_cast<unsigned>(i);
    b.fibers[static_cast<size_t>(i)].index = {t % threads.x, t / threads.x % threads.y, t / (threads.x * threads.y)};
  }
  Order order(number, seed);
  std::vector<int64_t> blocks;
  order.arrange(blocks, static_cast<int64_t>(grid.x) * grid.y * grid.z);
  for (int64_t i : blocks) {
    const auto n = static_cast<uint64_t>(i);
    blockIdx = {static_cast<unsigned>(n % grid.x), static_cast<unsigned>(n / grid.x % grid.y),
                static_cast<unsigned>(n / (static_cast<uint64_t>(grid.x) * grid.y))};
    b.shared.reset(static_cast<unsigned char*>(::operator new[](shared, std::align_val_t(128))));
    std::memset(b.shared.get(), 0xff, shared);
    b.error.clear();
    const bool done = run_block(order);
    ::operator delete[](b.shared.release(), std::align_val_t(128));
    if (!done) {
      b.left_dirty = true;
      return name + ": " + b.error;
    }
  }
  return {};
}

std::unordered_map<const void*, size_t> allowed_shared;
uint64_t launches = 0;

}  // namespace

void fail(const char* text) {
  Block& b = block();
  b.error = where(*b.current) + ": " + text;
  to_scheduler();
  std::abort();
}

void launch(const char* name, const void* kernel, dim3 grid, dim3 threads, size_t shared, cudaStream_t stream,
            std::function<void()> body) {
  const uint64_t count = static_cast<uint64_t>(threads.x) * threads.y * threads.z;
  std::string wrong;
  if (count == 0 || count > kMaxBlockThreads || threads.z > 64) wrong = "a block of " + std::to_string(count) + " threads";
  else if (count % 32 != 0) wrong = "a block of " + std::to_string(count) + " threads, not whole warps";
  if (grid.x == 0 || grid.y == 0 || grid.z == 0) wrong = "an empty grid";
  if (grid.x > 0x7fffffffu || grid.y > 65535 || grid.z > 65535) wrong = "a grid beyond the limits";
  const auto allowed = allowed_shared.find(kernel);
  const size_t most = allowed == allowed_shared.end() ? kDefaultShared : allowed->second;
  if (shared > most) wrong = std::to_string(shared) + " bytes of shared memory, " + std::to_string(most) + " allowed";
  if (!wrong.empty()) {
    refuse(std::string(name) + ": " + wrong);
    return;
  }
  const uint64_t number = launches++;
  enqueue(stream, [name = std::string(name), grid, threads, shared, body = std::move(body), number] {
    return run_grid(name, grid, threads, shared, body, number);
  });
}

void allow_shared(const void* kernel, size_t bytes) {
  if (bytes > kMaxShared) {
    refuse(std::to_string(bytes) + " bytes of shared memory; sm_80 has " + std::to_string(kMaxShared));
    return;
  }
  allowed_shared[kernel] = std::max(bytes, kDefaultShared);
}

void* dynamic_shared() { return block().shared.get(); }

int barrier_reduce(int line, bool predicate, int kind) {
  Fiber& f = *block().current;
  f.state = State::kBarrier;
  f.line = line;
  f.predicate = predicate;
  to_scheduler();
  return f.reduced[kind];
}
void barrier(int line) { barrier_reduce(line, false, 0); }

void collective(uint32_t mask, Collective run, void* deposit, int line) {
  Block& b = block();
  Fiber& f = *b.current;
  const auto at = static_cast<size_t>(&f - b.fibers.data());
  if (!(mask >> (at % 32) & 1u)) fail("a warp operation whose mask leaves out the calling lane");
  f.state = State::kCollective;
  f.mask = mask;
  f.run = run;
  f.deposit = deposit;
  f.line = line;
  Fiber* warp = b.fibers.data() + at / 32 * 32;
  uint32_t& waiting = b.waiting[at / 32];
  waiting |= 1u << at % 32;
  if (b.exited[at / 32] & mask) fail("a warp operation whose mask names a lane that has exited");
  if ((waiting & mask) != mask) {
    to_scheduler();
    return;
  }
  void* deposits[32] = {};
  for (uint32_t left = mask; left; left &= left - 1) {
    const int i = __builtin_ctz(left);
    if (warp[i].mask != mask || warp[i].run != run) {
      to_scheduler();
      return;
    }
    deposits[i] = warp[i].deposit;
  }
  run(deposits, mask);
  waiting &= ~mask;
  for (uint32_t left = mask; left; left &= left - 1) warp[__builtin_ctz(left)].state = State::kReady;
}

void cp_async(void* shared, const void* global, int valid) {
  if ((reinterpret_cast<uintptr_t>(shared) | reinterpret_cast<uintptr_t>(global)) % 16 != 0) {
    fail("cp.async: an address is not 16-byte aligned");
  }
  block().current->copies.push_back({shared, global, valid});
}
void cp_async_commit() {
  Fiber& f = *block().current;
  f.groups.push_back(f.copies.size());
}
void cp_async_wait(int pending) {
  Fiber& f = *block().current;
  const size_t committed = f.groups.size();
  if (committed <= static_cast<size_t>(pending)) return;
  const size_t due = committed - static_cast<size_t>(pending), count = f.groups[due - 1];
  for (size_t i = 0; i < count; ++i) {
    const Copy& c = f.copies[i];
    std::memcpy(c.to, c.from, static_cast<size_t>(c.valid));
    std::memset(static_cast<char*>(c.to) + c.valid, 0, static_cast<size_t>(16 - c.valid));
  }
  f.copies.erase(f.copies.begin(), f.copies.begin() + static_cast<std::ptrdiff_t>(count));
  f.groups.erase(f.groups.begin(), f.groups.begin() + static_cast<std::ptrdiff_t>(due));
  for (size_t& end : f.groups) end -= count;
}

}  // namespace cuda_host
