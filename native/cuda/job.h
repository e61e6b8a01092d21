// What a launch entry sees of its job: the stream, scratch memory, and the status word.
//
//   HEDDLE_CUDA_OP(route_top_k, RouteTopKArgs) {     // a: the args with device pointers, job: this
//     HEDDLE_LAUNCH(kernel, grid, block, shared_bytes, job.stream, a);
//     return job.launched();
//   }
#pragma once
#include <cstddef>
#include <vector>

#include "core/status.h"
#include "cuda/api.h"
#include "cuda/device.cuh"

struct heddle_cuda_job {
  cudaStream_t stream = nullptr;

  // Device memory until the job is complete; null when there is none left (return heddle::kNoMemory then).
  template <class T>
  T* scratch(int64_t count) {
    return static_cast<T*>(block(count * static_cast<int64_t>(sizeof(T))));
  }
  // A word on the device for heddle::report_bad_value; asking for it makes the job read it back. Null: no memory.
  unsigned long long* status();
  // kOk, or kDeviceError when a launch before this was refused.
  int64_t launched();

  void* block(int64_t bytes);

  struct Transfer {
    void* device;
    void* host;
    void* pinned;  // null: straight from pageable memory
    int64_t bytes;
    int32_t direction;
  };
  std::vector<Transfer> transfers;
  std::vector<void*> blocks, pinned;
  std::vector<std::max_align_t> args;
  bool own_stream = false, no_memory = false;
  unsigned long long* word = nullptr;
  unsigned long long* word_on_host = nullptr;
  cudaEvent_t event = nullptr;
  heddle_cuda_launch launch = nullptr;
  heddle_cuda_done done = nullptr;
  void* user = nullptr;
  const volatile int32_t* flags[2] = {nullptr, nullptr};
  int64_t result = 0;

  bool cancelled() const { return (flags[0] && *flags[0]) || (flags[1] && *flags[1]); }
};

namespace heddle::cuda {

int64_t multiprocessors();
// Records the text for heddle_cuda_error(); returns kDeviceError, or kNoMemory for cudaErrorMemoryAllocation.
int64_t failed(cudaError_t error, const char* what);

// memory.cu
void* pinned_alloc(int64_t bytes);
void pinned_free(void* block);
void note_jobs(int64_t change);

}  // namespace heddle::cuda

#define HEDDLE_CUDA_OP(op, Args)                                                            \
  static int64_t launch_##op(const Args& a, heddle_cuda_job& job);                          \
  extern "C" HEDDLE_CUDA_API int64_t heddle_cuda_##op(const void* args, heddle_cuda_job* job) { \
    return launch_##op(*static_cast<const Args*>(args), *job);                              \
  }                                                                                         \
  static int64_t launch_##op([[maybe_unused]] const Args& a, [[maybe_unused]] heddle_cuda_job& job)
