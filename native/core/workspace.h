// Aligned memory: 64-byte allocations that report failure, and a per-thread scratch buffer that is reused.
#pragma once
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <new>
#if defined(_MSC_VER)
#include <malloc.h>
#endif

namespace heddle {

constexpr size_t kAlignment = 64;

inline void* aligned_alloc_bytes(size_t bytes) {
  const size_t rounded = (bytes + kAlignment - 1) / kAlignment * kAlignment;
  if (rounded < bytes) return nullptr;
#if defined(_MSC_VER)
  return _aligned_malloc(rounded ? rounded : kAlignment, kAlignment);
#else
  void* p = nullptr;
  return posix_memalign(&p, kAlignment, rounded ? rounded : kAlignment) == 0 ? p : nullptr;
#endif
}

inline void aligned_free_bytes(void* p) {
#if defined(_MSC_VER)
  _aligned_free(p);
#else
  std::free(p);
#endif
}

// Owns one aligned block; empty after a failed allocation, which callers turn into kNoMemory.
template <class T>
class AlignedBuffer {
 public:
  AlignedBuffer() = default;
  explicit AlignedBuffer(size_t count) { reset(count); }
  AlignedBuffer(const AlignedBuffer&) = delete;
  AlignedBuffer& operator=(const AlignedBuffer&) = delete;
  ~AlignedBuffer() { aligned_free_bytes(data_); }

  bool reset(size_t count) {
    aligned_free_bytes(data_);
    data_ = count > SIZE_MAX / sizeof(T) ? nullptr : static_cast<T*>(aligned_alloc_bytes(count * sizeof(T)));
    count_ = data_ ? count : 0;
    return data_ != nullptr;
  }
  explicit operator bool() const { return data_ != nullptr; }
  T* data() { return data_; }
  const T* data() const { return data_; }
  size_t size() const { return count_; }
  T& operator[](size_t i) { return data_[i]; }
  const T& operator[](size_t i) const { return data_[i]; }

 private:
  T* data_ = nullptr;
  size_t count_ = 0;
};

// Scratch of the current thread. It grows to the largest request and stays: kernels ask once per tile, so a
// warm call allocates nothing. Above kKeep bytes it is given back by the next smaller request.
class Workspace {
 public:
  static Workspace& local() {
    static thread_local Workspace w;
    return w;
  }
  // At least `bytes`, 64-byte aligned; nullptr when memory is short. Valid until the next call on this thread.
  void* get(size_t bytes) {
    if (bytes > buffer_.size() || (buffer_.size() > kKeep && bytes <= kKeep)) {
      if (!buffer_.reset(bytes)) return nullptr;
    }
    return buffer_.data();
  }

 private:
  static constexpr size_t kKeep = size_t{16} << 20;
  AlignedBuffer<unsigned char> buffer_;
};

}  // namespace heddle
