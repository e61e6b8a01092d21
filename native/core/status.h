// What a kernel reports. Nothing in native/ throws across a boundary or aborts the process.
#pragma once
#include <cstdint>

namespace heddle {

// A status travels to TypeScript as one number: 0 done, negative below, positive = 1 + index of the first
// input element whose value is not allowed (the front words the error, so every backend says the same).
using Status = int64_t;
constexpr Status kOk = 0;
constexpr Status kCancelled = -1;
constexpr Status kNoMemory = -2;
constexpr Status kUnsupported = -3;
constexpr Status kDeviceError = -4;  // CUDA; the text is in heddle_cuda_error()

inline Status bad_value(int64_t index) { return index + 1; }

}  // namespace heddle
