// Large blocks on 2 MiB pages where the system has them: a stream over packed weights then needs one page walk
// per 2 MiB instead of one per 4 KiB, and first touches cost 512 times fewer faults.
#pragma once
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#if defined(__linux__)
#include <sys/mman.h>
#endif

#include "core/workspace.h"

namespace heddle {

class HugeBuffer {
 public:
  HugeBuffer() = default;
  HugeBuffer(const HugeBuffer&) = delete;
  HugeBuffer& operator=(const HugeBuffer&) = delete;
  HugeBuffer(HugeBuffer&& o) noexcept : data_(o.data_), bytes_(o.bytes_) { o.data_ = nullptr, o.bytes_ = 0; }
  HugeBuffer& operator=(HugeBuffer&& o) noexcept {
    if (this != &o) {
      release();
      data_ = o.data_, bytes_ = o.bytes_;
      o.data_ = nullptr, o.bytes_ = 0;
    }
    return *this;
  }
  ~HugeBuffer() { release(); }

  // Uninitialised memory; false when there is none. kPadding readable bytes follow, for prefetching kernels.
  bool reset(size_t bytes) {
    release();
    const size_t total = bytes + kPadding;
    if (total < bytes) return false;
#if defined(__linux__)
    if (total >= kHuge) {
      void* p = nullptr;
      if (posix_memalign(&p, kHuge, (total + kHuge - 1) / kHuge * kHuge) != 0) return false;
      madvise(p, total, MADV_HUGEPAGE);
      data_ = static_cast<unsigned char*>(p);
      bytes_ = bytes;
      return true;
    }
#endif
    data_ = static_cast<unsigned char*>(aligned_alloc_bytes(total));
    bytes_ = data_ ? bytes : 0;
    return data_ != nullptr;
  }
  void release() {
    if (data_) aligned_free_bytes(data_);
    data_ = nullptr, bytes_ = 0;
  }
  // Asks for 2 MiB pages in memory that something else has allocated and nothing has touched.
  static void advise(void* data, size_t bytes) {
#if defined(__linux__)
    const uintptr_t begin = (reinterpret_cast<uintptr_t>(data) + kHuge - 1) / kHuge * kHuge;
    const uintptr_t end = (reinterpret_cast<uintptr_t>(data) + bytes) / kHuge * kHuge;
    if (end > begin) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#else
    (void)data, (void)bytes;
#endif
  }
  size_t size() const { return bytes_; }
  explicit operator bool() const { return data_ != nullptr; }
  template <class T>
  T* as() { return reinterpret_cast<T*>(data_); }
  template <class T>
  const T* as() const { return reinterpret_cast<const T*>(data_); }

 private:
  static constexpr size_t kHuge = size_t{2} << 20;
  static constexpr size_t kPadding = 64;
  unsigned char* data_ = nullptr;
  size_t bytes_ = 0;
};

}  // namespace heddle
