// The host shim itself: what it computes against plain definitions, and that it reports what it promises to report.
#include <fcntl.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <string>

#include "check.h"
#include "cuda/group.cuh"
#include "cuda/matrix.cuh"

using namespace heddle;

namespace {

// Runs `run` in a process of its own, because an error is sticky; returns its error text ("" for none, "died" for one
// that was ended, by AddressSanitizer say).
template <class F>
std::string error_of(F run) {
  int pipes[2];
  if (pipe(pipes) != 0) return "no pipe";
  const pid_t child = fork();
  if (child == 0) {
    dup2(open("/dev/null", 1), 2);
    run();
    cudaStreamSynchronize(nullptr);
    const cudaError_t error = cudaGetLastError();
    const std::string text = error == cudaSuccess ? "" : cudaGetErrorString(error);
    if (write(pipes[1], text.data(), text.size()) < 0) _exit(2);
    _exit(0);
  }
  close(pipes[1]);
  char buffer[1024];
  const ssize_t n = read(pipes[0], buffer, sizeof(buffer));
  close(pipes[0]);
  int status = 0;
  waitpid(child, &status, 0);
  if (!WIFEXITED(status) || WEXITSTATUS(status) != 0) return "died";
  return std::string(buffer, n > 0 ? static_cast<size_t>(n) : 0);
}

#define CHECK_ERROR(run, text)                                                                          \
  do {                                                                                                  \
    const std::string e = error_of(run);                                                                \
    CHECK(e.find(text) != std::string::npos, "expected '%s', got '%s'", text, e.c_str());               \
  } while (false)

__global__ void early_exit() {
  if (threadIdx.x == 3) return;
  __syncthreads();
}
__global__ void two_barriers() {
  if (threadIdx.x < 32) {
    __syncthreads();
  } else {
    __syncthreads();
  }
}
__global__ void missing_lane() {
  if (threadIdx.x != 5) __shfl_sync(kFullMask, 1, 0);
  else __syncthreads();
}
__global__ void exited_lane() {
  if (threadIdx.x == 5) return;
  __syncwarp();
}
__global__ void foreign_mask() { __shfl_sync(0xffffu, 1, 0); }
__global__ void unused() {}
#if defined(HEDDLE_CUDA_HOST_ASAN)
__global__ void global_read(const int* p, int* out, int at) { out[0] = p[at]; }
__global__ void dynamic_write(int at) {
  HEDDLE_DYNAMIC_SHARED(int, shared);
  shared[at] = 1;
}
__global__ void static_write(int at) {
  __shared__ int shared[8];
  atomicAdd(&shared[at], 1);
}
// Reads eight rows of 16 bytes from row `first` of dynamic shared memory on.
__global__ void matrix_read(uint32_t* out, int first) {
  HEDDLE_DYNAMIC_SHARED(uint16_t, rows);
  const int lane = static_cast<int>(threadIdx.x);
  for (int i = lane; i < 64; i += 32) rows[i] = 0;
  __syncwarp();
  uint32_t r[4];
  ldmatrix_x4(r, rows + (first + lane % 8) * 8);
  out[lane] = r[0];
}
__global__ void copy_beyond(const uint32_t* from, uint32_t* to, int at) {
  HEDDLE_DYNAMIC_SHARED(uint32_t, words);
  if (threadIdx.x == 0) {
    cp_async_16(words, from + at);
    cp_async_commit();
    cp_async_wait<0>();
    to[0] = words[0];
  }
}
#endif

// Neighbours exchange values through shared memory; `synchronise` leaves the barrier out or in.
__global__ void exchange(int* out, bool synchronise) {
  __shared__ int values[128];
  const int i = static_cast<int>(threadIdx.x);
  values[i] = 0;
  __syncthreads();
  values[i] = i;
  if (synchronise) __syncthreads();
  out[i] = values[(i + 1) % 128];
}

__global__ void copy_without_wait(const float* from, float* to, bool wait) {
  __shared__ __align__(16) float values[128];
  const int i = static_cast<int>(threadIdx.x) * 4;
  for (int j = 0; j < 4; ++j) values[i + j] = -1.0f;
  cp_async_16(values + i, from + i, i == 4 ? 8 : 16);
  cp_async_commit();
  if (wait) cp_async_wait<0>();
  for (int j = 0; j < 4; ++j) to[i + j] = values[i + j];
}

template <class T>
struct Buffer {
  T* p = nullptr;
  explicit Buffer(size_t n) {
    void* v = nullptr;
    cudaMalloc(&v, n * sizeof(T));
    p = static_cast<T*>(v);
    HEDDLE_GUARD_BLOCK(v, n * sizeof(T), (n * sizeof(T) + 511) / 512 * 512);
  }
  T& operator[](size_t i) { return p[i]; }
};

template <class K, class... A>
void run(K kernel, int threads, size_t shared, A... args) {
  HEDDLE_LAUNCH(kernel, dim3(1), dim3(static_cast<unsigned>(threads)), shared, nullptr, args...);
  cudaStreamSynchronize(nullptr);
}

__global__ void scans(int* scan, int* total, float* sum, int* most) {
  __shared__ int words[4];
  __shared__ float floats[4];
  const int i = static_cast<int>(threadIdx.x);
  scan[i] = block_scan<128>(i % 7, words, &total[i]);
  sum[i] = block_sum<128>(static_cast<float>(i), floats);
  most[i] = Group<32>(nullptr).largest((i * 37) % 101);
}

__global__ void votes(uint32_t* out) {
  const int i = static_cast<int>(threadIdx.x);
  out[i * 4] = __ballot_sync(kFullMask, i % 3 == 0);
  out[i * 4 + 1] = __match_any_sync(kFullMask, i / 8);
  out[i * 4 + 2] = static_cast<uint32_t>(__shfl_up_sync(kFullMask, i, 3));
  out[i * 4 + 3] = static_cast<uint32_t>(__shfl_xor_sync(kFullMask, i, 5, 8));
}

// D = A B for A [16, 16], B [16, 8], through ldmatrix and mma.
__global__ void multiply(const uint16_t* a, const uint16_t* b, float* d) {
  __shared__ __align__(16) uint16_t left[16 * 16];
  __shared__ __align__(16) uint16_t right[16 * 8];
  const int lane = static_cast<int>(threadIdx.x);
  for (int i = lane; i < 256; i += 32) left[i] = a[i];
  for (int i = lane; i < 128; i += 32) right[i] = b[i];
  __syncwarp();
  uint32_t af[4], bf[2];
  // Matrices: rows 0-7 and 8-15 of the left half of k, then of the right half.
  ldmatrix_x4(af, left + (lane % 16) * 16 + lane / 16 * 8);
  ldmatrix_x2_trans(bf, right + (lane % 16) * 8);
  float sum[4] = {};
  mma_bf16(sum, af, bf);
  for (int i = 0; i < 4; ++i) d[(lane / 4 + i / 2 * 8) * 8 + lane % 4 * 2 + i % 2] = sum[i];
}

// D = A B for int8 A [16, 32], B given as [8, 32].
__global__ void multiply_s8(const uint32_t* a, const uint32_t* b, int32_t* d) {
  const int g = static_cast<int>(threadIdx.x) / 4, t = static_cast<int>(threadIdx.x) % 4;
  const uint32_t af[4] = {a[g * 8 + t], a[(g + 8) * 8 + t], a[g * 8 + t + 4], a[(g + 8) * 8 + t + 4]};
  const uint32_t bf[2] = {b[g * 8 + t], b[g * 8 + t + 4]};
  int32_t sum[4] = {1, 1, 1, 1};
  mma_s8(sum, af, bf);
  for (int i = 0; i < 4; ++i) d[(g + i / 2 * 8) * 8 + t * 2 + i % 2] = sum[i];
}

}  // namespace

TEST(errors) {
  CHECK_ERROR([] { run(early_exit, 64, 0); }, "has exited while others wait at the barrier");
  CHECK_ERROR([] { run(two_barriers, 64, 0); }, "wait at different barriers");
  CHECK_ERROR([] { run(missing_lane, 32, 0); }, "for lanes of its mask that never come");
  CHECK_ERROR([] { run(exited_lane, 32, 0); }, "names a lane that has exited");
  CHECK_ERROR([] { run(foreign_mask, 32, 0); }, "leaves out the calling lane");
  CHECK_ERROR([] { run(unused, 48, 0); }, "not whole warps");
  CHECK_ERROR([] { run(unused, 2048, 0); }, "a block of 2048 threads");
  CHECK_ERROR([] { run(unused, 32, 49 << 10); }, "49152 allowed");
  CHECK_ERROR([] { HEDDLE_ALLOW_SHARED(unused, 200 << 10); }, "sm_80 has");
  CHECK_ERROR([] { HEDDLE_LAUNCH(unused, dim3(0), dim3(32), 0, nullptr); }, "an empty grid");
  const std::string none = error_of([] { run(unused, 1024, 48 << 10); });
  CHECK(none.empty(), "%s", none.c_str());
}

#if defined(HEDDLE_CUDA_HOST_ASAN)
TEST(bounds) {
  auto global = [](int at) {
    return error_of([at] {
      Buffer<int> p(5), out(1);
      run(global_read, 32, 0, p.p, out.p, at);
    });
  };
  CHECK(global(4).empty(), "the last element");
  CHECK(global(5) == "died", "one beyond the end of global memory");
  CHECK(error_of([] { run(dynamic_write, 32, 20, 4); }).empty(), "the last element");
  CHECK(error_of([] { run(dynamic_write, 32, 20, 5); }) == "died", "one beyond dynamic shared memory");
  CHECK(error_of([] { run(static_write, 32, 0, 7); }).empty(), "the last element");
  CHECK(error_of([] { run(static_write, 32, 0, 8); }) == "died", "one beyond static shared memory");
  auto matrix = [](int first) {
    return error_of([first] {
      Buffer<uint32_t> out(32);
      run(matrix_read, 32, 128, out.p, first);
    });
  };
  CHECK(matrix(0).empty(), "all eight rows");
  CHECK(matrix(1) == "died", "one row beyond dynamic shared memory");
  auto copy = [](int at) {
    return error_of([at] {
      Buffer<uint32_t> from(8), to(1);
      run(copy_beyond, 32, 16, static_cast<const uint32_t*>(from.p), to.p, at);
    });
  };
  CHECK(copy(4).empty(), "the last 16 bytes");
  CHECK(copy(8) == "died", "a copy beyond the end of global memory");
}
#endif

TEST(missing_barrier_shows) {
  Buffer<int> out(128);
  int wrong = 0, different = 0;
  int first[128];
  for (int round = 0; round < 4; ++round) {
    run(exchange, 128, 0, out.p, true);
    for (int i = 0; i < 128; ++i) wrong += out[static_cast<size_t>(i)] != (i + 1) % 128;
    run(exchange, 128, 0, out.p, false);
    for (int i = 0; i < 128; ++i) {
      if (round == 0) first[i] = out[static_cast<size_t>(i)];
      different += out[static_cast<size_t>(i)] != first[i];
    }
  }
  CHECK(wrong == 0, "%d values with the barrier", wrong);
  CHECK(different > 0, "without the barrier every order gave the same");
}

TEST(asynchronous_copies) {
  Buffer<float> from(128), to(128);
  for (size_t i = 0; i < 128; ++i) from[i] = static_cast<float>(i);
  run(copy_without_wait, 32, 0, static_cast<const float*>(from.p), to.p, true);
  for (size_t i = 0; i < 128; ++i) {
    const float expected = i == 6 || i == 7 ? 0.0f : static_cast<float>(i);
    CHECK(to[i] == expected, "[%zu] is %g", i, static_cast<double>(to[i]));
  }
  run(copy_without_wait, 32, 0, static_cast<const float*>(from.p), to.p, false);
  for (size_t i = 0; i < 128; ++i) CHECK(to[i] == -1.0f, "[%zu] is there before the wait", i);
}

TEST(scans_and_reductions) {
  Buffer<int> scan(128), total(128), most(128);
  Buffer<float> sum(128);
  run(scans, 128, 0, scan.p, total.p, sum.p, most.p);
  int expected = 0, all = 0;
  for (int i = 0; i < 128; ++i) all += i % 7;
  for (size_t i = 0; i < 128; ++i) {
    expected += static_cast<int>(i) % 7;
    int largest = 0;
    for (size_t j = i / 32 * 32; j < i / 32 * 32 + 32; ++j) largest = std::max(largest, static_cast<int>(j * 37 % 101));
    CHECK(scan[i] == expected && total[i] == all, "[%zu] %d of %d", i, scan[i], total[i]);
    CHECK(sum[i] == 8128.0f, "[%zu] %g", i, static_cast<double>(sum[i]));
    CHECK(most[i] == largest, "[%zu] %d", i, most[i]);
  }
}

TEST(votes_and_shuffles) {
  Buffer<uint32_t> out(128);
  run(votes, 32, 0, out.p);
  for (uint32_t i = 0; i < 32; ++i) {
    CHECK(out[i * 4] == 0x49249249u, "ballot %x", out[i * 4]);
    CHECK(out[i * 4 + 1] == 0xffu << (i / 8 * 8), "match %x", out[i * 4 + 1]);
    CHECK(out[i * 4 + 2] == (i < 3 ? i : i - 3), "up %u", out[i * 4 + 2]);
    CHECK(out[i * 4 + 3] == (i ^ 5u), "xor %u", out[i * 4 + 3]);
  }
}

TEST(matrix_products) {
  check::Random random(7);
  Buffer<uint16_t> a(256), b(128);
  Buffer<float> d(128);
  for (size_t i = 0; i < 256; ++i) a[i] = float_to_bf16(static_cast<float>(random.below(17) - 8));
  for (size_t i = 0; i < 128; ++i) b[i] = float_to_bf16(static_cast<float>(random.below(17) - 8));
  run(multiply, 32, 0, static_cast<const uint16_t*>(a.p), static_cast<const uint16_t*>(b.p), d.p);
  for (size_t r = 0; r < 16; ++r) {
    for (size_t c = 0; c < 8; ++c) {
      float sum = 0.0f;
      for (size_t k = 0; k < 16; ++k) sum += bf16_to_float(a[r * 16 + k]) * bf16_to_float(b[k * 8 + c]);
      CHECK(d[r * 8 + c] == sum, "[%zu, %zu] is %g, expected %g", r, c, static_cast<double>(d[r * 8 + c]), static_cast<double>(sum));
    }
  }
  Buffer<uint32_t> x(128), y(64);
  Buffer<int32_t> z(128);
  for (size_t i = 0; i < 128; ++i) x[i] = static_cast<uint32_t>(random.bits());
  for (size_t i = 0; i < 64; ++i) y[i] = static_cast<uint32_t>(random.bits());
  run(multiply_s8, 32, 0, static_cast<const uint32_t*>(x.p), static_cast<const uint32_t*>(y.p), z.p);
  for (size_t r = 0; r < 16; ++r) {
    for (size_t c = 0; c < 8; ++c) {
      int32_t sum = 1;
      for (size_t k = 0; k < 32; ++k) {
        sum += static_cast<int8_t>(x[r * 8 + k / 4] >> (k % 4 * 8)) * static_cast<int8_t>(y[c * 8 + k / 4] >> (k % 4 * 8));
      }
      CHECK(z[r * 8 + c] == sum, "[%zu, %zu] is %d, expected %d", r, c, z[r * 8 + c], sum);
    }
  }
}
