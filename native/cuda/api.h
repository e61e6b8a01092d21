// C ABI of the separately loaded library `heddle_cuda` (native/binding/cuda.cpp loads it; the addon links no CUDA).
//
// A job is one op: device blocks for the arrays that live on the host, copies in, kernels, copies out. Jobs are
// submitted from any thread and run by one thread of the library, each on a stream of its own; that thread polls
// the jobs' events and calls `done`. (Not cudaLaunchHostFunc: a stream that failed never calls it.) Blocks and
// streams return to their caches only after their job is complete, so a cached block is free for any stream.
//
// Statuses are those of core/status.h; kDeviceError comes with a text in heddle_cuda_error().
#pragma once
#include <stdint.h>

#define HEDDLE_CUDA_ABI 1

#if defined(_WIN32)
#define HEDDLE_CUDA_API __declspec(dllexport)
#else
#define HEDDLE_CUDA_API __attribute__((visibility("default")))
#endif

extern "C" {

typedef struct heddle_cuda_job heddle_cuda_job;  // native/cuda/job.h

typedef struct {
  char name[256];
  int32_t major, minor, multiprocessors, driver, runtime;
  int64_t total_bytes;
} heddle_cuda_device;

// Device memory in bytes: `live` is in use by tensors and jobs, `cached` is kept for reuse; live + cached never
// exceeds `limit` (0: none), `peak` is the largest live so far.
typedef struct {
  int64_t live, live_blocks, cached, peak, limit, pinned, jobs;
} heddle_cuda_memory_info;

// What every op exports, as heddle_cuda_<op>: `args` is the op's args struct with device pointers.
typedef int64_t (*heddle_cuda_launch)(const void* args, heddle_cuda_job* job);
typedef void (*heddle_cuda_done)(void* user, int64_t status);

enum { HEDDLE_CUDA_IN = 1, HEDDLE_CUDA_OUT = 2 };

HEDDLE_CUDA_API int32_t heddle_cuda_abi(void);
// Fills `device`; kUnsupported, with a text, where there is no usable device.
HEDDLE_CUDA_API int64_t heddle_cuda_open(heddle_cuda_device* device);
// Copies the text of the last error, ended by 0.
HEDDLE_CUDA_API void heddle_cuda_error(char* text, int64_t size);

// A block of `bytes`, 512-byte aligned, or null; freed blocks are cached. The caller frees it only when no job
// uses it.
HEDDLE_CUDA_API void* heddle_cuda_alloc(int64_t bytes);
HEDDLE_CUDA_API void heddle_cuda_free(void* block);
HEDDLE_CUDA_API void heddle_cuda_memory(heddle_cuda_memory_info* info);
HEDDLE_CUDA_API void heddle_cuda_set_limit(int64_t bytes);
HEDDLE_CUDA_API void heddle_cuda_trim(void);  // gives the cached blocks back to the device

// `stream`: the caller's own, for heddle_cuda_job_run; null for a job that is submitted. Null: out of memory.
HEDDLE_CUDA_API heddle_cuda_job* heddle_cuda_job_begin(void* stream);
// A device block of the job for a host array; `direction`: copied in before, out after, or both. Null: no memory.
HEDDLE_CUDA_API void* heddle_cuda_job_array(heddle_cuda_job* job, void* host, int64_t bytes, int32_t direction);
// Copies between a host array and a block that the caller keeps.
HEDDLE_CUDA_API void heddle_cuda_job_copy(heddle_cuda_job* job, void* device, void* host, int64_t bytes,
                                          int32_t direction);
// Flags that stop the job before it starts; may be null.
HEDDLE_CUDA_API void heddle_cuda_job_cancel(heddle_cuda_job* job, const void* user_flag, const void* env_flag);
// Queues the job; `launch` may be null (copies only), `args` are copied. `done` is called on the library's thread,
// after which the job is gone.
HEDDLE_CUDA_API void heddle_cuda_job_submit(heddle_cuda_job* job, heddle_cuda_launch launch, const void* args,
                                            int64_t args_bytes, heddle_cuda_done done, void* user);
// The same, waiting here for the status.
HEDDLE_CUDA_API int64_t heddle_cuda_job_wait(heddle_cuda_job* job, heddle_cuda_launch launch, const void* args,
                                             int64_t args_bytes);
// Launches now on the caller's stream, without copies or waiting (benchmarks); again and again on one job.
HEDDLE_CUDA_API int64_t heddle_cuda_job_run(heddle_cuda_job* job, heddle_cuda_launch launch, const void* args);
// Frees a job that was not submitted.
HEDDLE_CUDA_API void heddle_cuda_job_discard(heddle_cuda_job* job);
}
