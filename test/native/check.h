// The native tests' own small harness. A test program is a list of
//   TEST(name) { CHECK(condition, "format", values...); }
// Its main (below) runs those whose name contains argv[1] and ends with the line `N passed, N failed`.
// CHECK may be used on any thread; a test stops reporting after 10 failures but goes on running.
#pragma once
#include <atomic>
#include <chrono>
#include <cstdarg>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <vector>

#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__) || defined(HEDDLE_UNDER_QEMU) || defined(__aarch64__)
constexpr bool kSlow = true;  // under a sanitizer or an emulator: sample more coarsely
#else
constexpr bool kSlow = false;
#endif

namespace check {

struct Test {
  const char* name;
  void (*run)();
};
inline std::vector<Test>& tests() {
  static std::vector<Test> list;
  return list;
}
struct Register {
  Register(const char* name, void (*run)()) { tests().push_back({name, run}); }
};
inline std::atomic<int> failures{0};

__attribute__((format(printf, 4, 5))) inline void fail(const char* file, int line, const char* condition,
                                                       const char* format, ...) {
  if (failures.fetch_add(1) >= 10) return;
  std::printf("  %s:%d: %s: ", file, line, condition);
  va_list args;
  va_start(args, format);
  std::vprintf(format, args);
  va_end(args);
  std::printf("\n");
}

// splitmix64: the same numbers on every machine.
class Random {
 public:
  explicit Random(uint64_t seed) : state_(seed) {}
  uint64_t bits() {
    uint64_t z = state_ += 0x9e3779b97f4a7c15u;
    z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9u;
    z = (z ^ z >> 27) * 0x94d049bb133111ebu;
    return z ^ z >> 31;
  }
  int64_t below(int64_t n) { return static_cast<int64_t>(bits() % static_cast<uint64_t>(n)); }
  double uniform() { return static_cast<double>(bits() >> 11) * 0x1p-53; }

 private:
  uint64_t state_;
};

inline int run_all(const char* filter) {
  int passed = 0, failed = 0;
  for (const Test& t : tests()) {
    if (filter && !std::strstr(t.name, filter)) continue;
    failures = 0;
    const auto start = std::chrono::steady_clock::now();
    t.run();
    const double s = std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
    std::printf("%s %s (%.2f s)\n", failures == 0 ? "ok  " : "FAIL", t.name, s);
    std::fflush(stdout);
    ++(failures == 0 ? passed : failed);
  }
  std::printf("%d passed, %d failed\n", passed, failed);
  return failed == 0 && passed > 0 ? 0 : 1;
}

}  // namespace check

#define TEST(name)                                                        \
  static void test_##name();                                              \
  static const check::Register register_##name(#name, test_##name);       \
  static void test_##name()
#define CHECK(condition, ...)                                             \
  do {                                                                    \
    if (!(condition)) check::fail(__FILE__, __LINE__, #condition, __VA_ARGS__); \
  } while (false)

int main(int argc, char** argv) { return check::run_all(argc > 1 ? argv[1] : nullptr); }
