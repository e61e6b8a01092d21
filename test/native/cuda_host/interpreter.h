// Test only: runs CUDA kernels on the CPU. Included by native/cuda/device.cuh in builds with HEDDLE_CUDA_HOST.
//
// The threads of a block are fibers of one OS thread. A fiber runs until it reaches a barrier or a warp operation; the
// last one to arrive performs the operation for all of them. What this catches that a GPU does not report:
//   - out-of-bounds accesses of global memory and of static and dynamic shared memory (AddressSanitizer builds: every
//     allocation is guarded to the byte)
//   - threads waiting at different barriers, exited while others wait, or missing from the mask of a warp operation
//   - data read before cp.async has brought it: copies happen as late as allowed
//   - missing barriers: each launch runs its blocks, warps and lanes in another order (ascending, then descending,
//     then shuffled; HEDDLE_CUDA_HOST_SEED varies it), so that a result that depends on the order differs from run to
//     run, which the case tests compare bit by bit. Between two synchronisation points a fiber is not interrupted:
//     races that need a finer interleaving than that are not seen, nor is memory ordering between blocks.
//   - shared memory read before it is written holds NaN patterns (dynamic) or the previous block's data (static)
#pragma once
#include <cuda_runtime.h>

#include <functional>

#include "core/dtype.h"

#if defined(HEDDLE_CUDA_HOST_ASAN)
#include <sanitizer/asan_interface.h>
#define HEDDLE_GUARD_BLOCK(block, used, size)                                                            \
  (ASAN_POISON_MEMORY_REGION((block), static_cast<size_t>(size)),                                        \
   ASAN_UNPOISON_MEMORY_REGION((block), static_cast<size_t>(used)))
#else
#define HEDDLE_GUARD_BLOCK(block, used, size) static_cast<void>(size)
#endif

extern uint3 threadIdx, blockIdx;
extern dim3 blockDim, gridDim;
constexpr int warpSize = 32;

namespace cuda_host {

void launch(const char* name, const void* kernel, dim3 grid, dim3 block, size_t shared, cudaStream_t stream,
            std::function<void()> body);
void allow_shared(const void* kernel, size_t bytes);
void* dynamic_shared();

void barrier(int line);
int barrier_reduce(int line, bool predicate, int kind);  // 0: count, 1: and, 2: or

// Waits until every lane of `mask` is here with the same `run`, which is then called once with their deposits.
using Collective = void (*)(void* const* deposits, uint32_t mask);
void collective(uint32_t mask, Collective run, void* deposit, int line);
[[noreturn]] void fail(const char* text);

template <class T>
struct Shuffle {
  T value, result;
  int source;  // lane to read
};
template <class T>
void run_shuffle(void* const* lanes, uint32_t mask) {
  for (int i = 0; i < 32; ++i) {
    if (!(mask >> i & 1u)) continue;
    auto* mine = static_cast<Shuffle<T>*>(lanes[i]);
    if (!(mask >> mine->source & 1u)) fail("a shuffle reads a lane that is not in its mask");
    mine->result = static_cast<Shuffle<T>*>(lanes[mine->source])->value;
  }
}
template <class T>
T shuffle(uint32_t mask, T value, int source, int line) {
  static_assert(sizeof(T) <= 8, "shuffles move up to 8 bytes");
  Shuffle<T> s{value, value, source};
  collective(mask, run_shuffle<T>, &s, line);
  return s.result;
}
inline int lane() { return static_cast<int>(threadIdx.x + blockDim.x * (threadIdx.y + blockDim.y * threadIdx.z)) & 31; }

void cp_async(void* shared, const void* global, int valid);
void cp_async_commit();
void cp_async_wait(int pending);

}  // namespace cuda_host

#define HEDDLE_LAUNCH(kernel, grid, block, shared, stream, ...)                                              \
  cuda_host::launch(#kernel, reinterpret_cast<const void*>(kernel), (grid), (block),                        \
                    static_cast<size_t>(shared), (stream),                                                   \
                    cuda_host::bind(kernel __VA_OPT__(, ) __VA_ARGS__))
#define HEDDLE_ALLOW_SHARED(kernel, bytes) \
  cuda_host::allow_shared(reinterpret_cast<const void*>(kernel), static_cast<size_t>(bytes))
#define HEDDLE_DYNAMIC_SHARED(T, name) T* name = reinterpret_cast<T*>(cuda_host::dynamic_shared())

namespace cuda_host {
// Arguments are converted and copied at the launch, as on a GPU.
template <class... P, class... A>
std::function<void()> bind(void (*kernel)(P...), A... args) {
  return std::bind([kernel](const std::decay_t<P>&... p) { kernel(p...); }, static_cast<std::decay_t<P>>(args)...);
}
}  // namespace cuda_host

#define __syncthreads() cuda_host::barrier(__LINE__)
#define __syncthreads_count(p) cuda_host::barrier_reduce(__LINE__, (p), 0)
#define __syncthreads_and(p) cuda_host::barrier_reduce(__LINE__, (p), 1)
#define __syncthreads_or(p) cuda_host::barrier_reduce(__LINE__, (p), 2)

inline void __syncwarp(uint32_t mask = 0xffffffffu, int line = __builtin_LINE()) {
  cuda_host::collective(mask, [](void* const*, uint32_t) {}, nullptr, line);
}
template <class T>
T __shfl_sync(uint32_t mask, T v, int source, int width = 32, int line = __builtin_LINE()) {
  const int lane = cuda_host::lane();
  return cuda_host::shuffle(mask, v, (lane & ~(width - 1)) | (source & (width - 1)), line);
}
template <class T>
T __shfl_xor_sync(uint32_t mask, T v, int bits, int width = 32, int line = __builtin_LINE()) {
  const int lane = cuda_host::lane(), from = lane ^ bits;
  return cuda_host::shuffle(mask, v, from >= (lane & ~(width - 1)) + width ? lane : from, line);
}
template <class T>
T __shfl_up_sync(uint32_t mask, T v, unsigned delta, int width = 32, int line = __builtin_LINE()) {
  const int lane = cuda_host::lane(), from = lane - static_cast<int>(delta);
  return cuda_host::shuffle(mask, v, from < (lane & ~(width - 1)) ? lane : from, line);
}
template <class T>
T __shfl_down_sync(uint32_t mask, T v, unsigned delta, int width = 32, int line = __builtin_LINE()) {
  const int lane = cuda_host::lane(), from = lane + static_cast<int>(delta);
  return cuda_host::shuffle(mask, v, from >= (lane & ~(width - 1)) + width ? lane : from, line);
}

namespace cuda_host {
struct Vote {
  bool predicate;
  uint32_t result;
};
inline uint32_t vote(uint32_t mask, bool predicate, int line) {
  Vote v{predicate, 0};
  collective(
      mask,
      [](void* const* lanes, uint32_t m) {
        uint32_t bits = 0;
        for (int i = 0; i < 32; ++i) {
          if ((m >> i & 1u) && static_cast<Vote*>(lanes[i])->predicate) bits |= 1u << i;
        }
        for (int i = 0; i < 32; ++i) {
          if (m >> i & 1u) static_cast<Vote*>(lanes[i])->result = bits;
        }
      },
      &v, line);
  return v.result;
}
template <class T>
struct Match {
  T value;
  uint32_t result;
};
template <class T>
void run_match(void* const* lanes, uint32_t m) {
  for (int i = 0; i < 32; ++i) {
    if (!(m >> i & 1u)) continue;
    auto* mine = static_cast<Match<T>*>(lanes[i]);
    for (int j = 0; j < 32; ++j) {
      if ((m >> j & 1u) && static_cast<Match<T>*>(lanes[j])->value == mine->value) mine->result |= 1u << j;
    }
  }
}
}  // namespace cuda_host

inline uint32_t __ballot_sync(uint32_t mask, bool p, int line = __builtin_LINE()) { return cuda_host::vote(mask, p, line); }
inline bool __any_sync(uint32_t mask, bool p, int line = __builtin_LINE()) { return cuda_host::vote(mask, p, line) != 0; }
inline bool __all_sync(uint32_t mask, bool p, int line = __builtin_LINE()) { return cuda_host::vote(mask, p, line) == mask; }
template <class T>
uint32_t __match_any_sync(uint32_t mask, T v, int line = __builtin_LINE()) {
  cuda_host::Match<T> m{v, 0};
  cuda_host::collective(mask, cuda_host::run_match<T>, &m, line);
  return m.result;
}

#include "intrinsics.h"
#include "matrix.h"
