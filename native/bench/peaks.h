// The machine's own limits, measured: what `heddle bench` divides by.
//
// Arithmetic: independent multiply-add chains in registers, no memory. One multiply-add counts as two operations.
// Memory: passes over a buffer that must be much larger than the last-level cache; `copy` counts the bytes read
// and the bytes written. Every figure is the best pass, because a peak is what the machine can do, not what it
// did while something else ran.
#pragma once
#include "core/status.h"
#include "core/thread_pool.h"

namespace heddle {

enum class PeakKind : int32_t {
  kF32 = 0,   // fused multiply-add (multiply, then add, on the scalar instruction set)
  kBf16 = 1,  // vdpbf16ps
  kInt8 = 2,  // vpdpbusd
  kRead = 3,
  kCopy = 4,
};

struct PeakArgs {
  PeakKind kind = PeakKind::kF32;
  double milliseconds = 100;
  int64_t bytes = 0;         // memory kinds: size of the buffer(s) together
  double* result = nullptr;  // operations or bytes per second
};

// kUnsupported when exec.isa has no such instruction on this machine.
Status measure_peak(const PeakArgs& args, const Exec& exec);

using PeakChunk = float (*)(int64_t iterations);
struct PeakArithmetic {
  PeakChunk chunk = nullptr;  // nullptr: not on this machine
  double operations = 0;      // of one iteration
};

// Dot-product instructions that only some processors of an instruction set have (peaks_x86.cpp).
PeakArithmetic peak_bf16(Isa isa);
PeakArithmetic peak_int8(Isa isa);

}  // namespace heddle
