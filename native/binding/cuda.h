// The CUDA library, loaded on demand, and the ops that it serves.
//
// An op on CUDA uses the same binding function as on the CPU: registered again with a CudaTarget as its data, the
// Call turns every array into a device pointer (staging host arrays) and submit() hands the args struct, which must
// be trivially copyable, to the library's heddle_cuda_<op>.
#pragma once
#include <napi.h>

#include <deque>
#include <memory>

#include "cuda/api.h"

namespace heddle::binding {

struct CudaLibrary {
#define HEDDLE_CUDA_SYMBOLS(X) \
  X(abi) X(open) X(error) X(alloc) X(free) X(memory) X(set_limit) X(trim) X(job_begin) X(job_array) X(job_copy) \
  X(job_cancel) X(job_submit) X(job_wait) X(job_discard)
#define HEDDLE_CUDA_POINTER(name) decltype(&heddle_cuda_##name) name = nullptr;
  HEDDLE_CUDA_SYMBOLS(HEDDLE_CUDA_POINTER)
#undef HEDDLE_CUDA_POINTER
  void* module = nullptr;
  void* symbol(const char* name) const;
};

// A device block with shared ownership: its handle and every job that uses it.
struct DeviceBlock {
  const CudaLibrary* library;
  void* device;
  int64_t bytes;
  DeviceBlock(const CudaLibrary* l, void* d, int64_t n) : library(l), device(d), bytes(n) {}
  DeviceBlock(const DeviceBlock&) = delete;
  ~DeviceBlock() { library->free(device); }
};
using DeviceHandle = std::shared_ptr<DeviceBlock>;  // behind the External; empty once disposed

// What an op's binding function finds as its data on CUDA; null on the CPU.
struct CudaTarget {
  const CudaLibrary* library;
  heddle_cuda_launch launch;  // null: only copies
};

// Collects the ops of the loaded library.
class CudaExports {
 public:
  CudaExports(Napi::Env env, const CudaLibrary* library, Napi::Object ops) : env_(env), library_(library), ops_(ops) {}
  // `symbol` may be missing from the library: then the op is not there.
  void add(const char* name, Napi::Value (*call)(const Napi::CallbackInfo&), const char* symbol);

 private:
  Napi::Env env_;
  const CudaLibrary* library_;
  Napi::Object ops_;
};

void register_cuda(Napi::Env env, Napi::Object exports);

// Each family adds its CUDA ops.
void register_cuda_moe(CudaExports& ops);
void register_cuda_experts(CudaExports& ops);
void register_cuda_matrices(CudaExports& ops);
void register_cuda_nn(CudaExports& ops);
void register_cuda_attention(CudaExports& ops);
void register_cuda_privacy(CudaExports& ops);

}  // namespace heddle::binding
