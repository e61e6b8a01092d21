// Test only: the queue behind the shim's streams.
#pragma once
#include <cuda_runtime.h>

#include <functional>
#include <string>

namespace cuda_host {
// Runs `task` on the device thread, after everything queued before it; a text that it returns is a sticky error.
void enqueue(cudaStream_t stream, std::function<std::string()> task);
// A launch that the driver would refuse: the next cudaGetLastError() returns it.
void refuse(const std::string& text);
}  // namespace cuda_host
