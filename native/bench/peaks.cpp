#include "bench/peaks.h"

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstring>

#include "core/huge.h"
#include "simd/simd.h"

namespace heddle {
namespace {

struct PeakKernels {
  PeakArithmetic fma;
  int32_t (*read)(const int32_t* p, int64_t count) = nullptr;
};

}  // namespace
}  // namespace heddle

#if defined(HEDDLE_TARGET_X86)
#include "simd/avx512_begin.h"
#include "bench/peaks-inl.h"
#include "simd/end.h"

#include "simd/avx2_begin.h"
#include "bench/peaks-inl.h"
#include "simd/end.h"
#endif
#if defined(HEDDLE_TARGET_NEON)
#include "simd/neon_begin.h"
#include "bench/peaks-inl.h"
#include "simd/end.h"
#endif
#include "simd/scalar_begin.h"
#include "bench/peaks-inl.h"
#include "simd/end.h"

namespace heddle {
namespace {

PeakKernels kernels_of(Isa isa) {
  switch (isa) {
#if defined(HEDDLE_TARGET_X86)
    case Isa::kAvx512: return avx512::peak_kernels();
    case Isa::kAvx2: return avx2::peak_kernels();
#endif
#if defined(HEDDLE_TARGET_NEON)
    case Isa::kNeon: return neon::peak_kernels();
#endif
    default: return scalar::peak_kernels();
  }
}

double now() {
  return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

std::atomic<int64_t> sink{0};  // keeps the loops' results alive

// Repeats `pass` until the time is over; the work of one pass over its shortest time. The first pass is warm-up
// (threads wake, clocks rise) and counts only when there is no other.
template <class Pass>
Status best_rate(const PeakArgs& args, double work, Pass&& pass) {
  const double end = now() + args.milliseconds / 1000;
  double best = 0;
  for (int64_t i = 0;; ++i) {
    const double start = now();
    if (!pass()) return kCancelled;
    const double stop = now();
    if (i > 0 || stop >= end) best = std::max(best, work / std::max(stop - start, 1e-9));
    if (stop >= end) break;
  }
  *args.result = best;
  return kOk;
}

Status arithmetic(const PeakArgs& args, const Exec& exec, const PeakArithmetic& peak) {
  if (!peak.chunk) return kUnsupported;
  // About 0.1 ms per chunk on one core, 16 chunks per thread: long beside a wake-up, and shared out evenly.
  constexpr int64_t kIterations = 50'000;
  const int64_t chunks = int64_t{16} * exec.threads;
  return best_rate(args, static_cast<double>(chunks * kIterations) * peak.operations, [&] {
    return parallel_for(exec, chunks, 1, [&](int64_t begin, int64_t stop) {
      for (int64_t c = begin; c < stop; ++c) {
        sink.fetch_add(static_cast<int64_t>(peak.chunk(kIterations)), std::memory_order_relaxed);
      }
    });
  });
}

Status memory(const PeakArgs& args, const Exec& exec, const PeakKernels& kernels) {
  constexpr int64_t kTile = int64_t{1} << 20;
  const bool copy = args.kind == PeakKind::kCopy;
  const int64_t tiles = std::max<int64_t>(args.bytes / kTile / 2 * 2, 2);
  const size_t bytes = static_cast<size_t>(tiles * kTile);
  HugeBuffer buffer;
  if (!buffer.reset(bytes)) return kNoMemory;
  unsigned char* p = buffer.as<unsigned char>();
  // Writing makes the pages real: unwritten ones would all be the one page of zeros, in cache.
  const bool touched = parallel_for(exec, tiles, 1, [&](int64_t begin, int64_t stop) {
    for (int64_t t = begin; t < stop; ++t) std::memset(p + t * kTile, static_cast<int>(t & 0x7f) + 1, kTile);
  });
  if (!touched) return kCancelled;
  const int64_t half = tiles / 2;
  return best_rate(args, static_cast<double>(bytes), [&] {
    return parallel_for(exec, copy ? half : tiles, 1, [&](int64_t begin, int64_t stop) {
      for (int64_t t = begin; t < stop; ++t) {
        unsigned char* tile = p + t * kTile;
        if (copy) {
          std::memcpy(tile + half * kTile, tile, kTile);
        } else {
          sink.fetch_add(kernels.read(reinterpret_cast<const int32_t*>(tile), kTile / 4), std::memory_order_relaxed);
        }
      }
    });
  });
}

}  // namespace

Status measure_peak(const PeakArgs& args, const Exec& exec) {
  switch (args.kind) {
    case PeakKind::kF32: return arithmetic(args, exec, kernels_of(exec.isa).fma);
    case PeakKind::kBf16: return arithmetic(args, exec, peak_bf16(exec.isa));
    case PeakKind::kInt8: return arithmetic(args, exec, peak_int8(exec.isa));
    case PeakKind::kRead:
    case PeakKind::kCopy: return memory(args, exec, kernels_of(exec.isa));
  }
  return kUnsupported;
}

}  // namespace heddle
