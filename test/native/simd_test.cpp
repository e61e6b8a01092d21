// Every function of the vector vocabulary, on every instruction set this machine runs, against plain C++; and the
// error of the elementary functions in units in the last place, against double.
#include "simd/simd.h"

#include <cmath>
#include <cstdlib>

#include "check.h"

// Plain counterparts; none is inline, so no region can recompile one with wide instructions.
namespace plain {

using heddle::bits_to_float;
using heddle::float_to_bits;

// The bounds stated in simd/math-inl.h: change both together. Every float there is, on avx2, gave 0.990, 0.894,
// 2.469, 2.481 and 1.957.
constexpr double kExpUlp = 1, kLogUlp = 1, kLog1pUlp = 2.5, kSigmoidUlp = 2.5, kSqrtSoftplusUlp = 2, kTanhUlp = 1.5;
constexpr int kRounds = kSlow ? 300 : 3000;

static const char* g_isa = "";

static float add(float a, float b) { return a + b; }
static float sub(float a, float b) { return a - b; }
static float mul(float a, float b) { return a * b; }
static float div(float a, float b) {
  // The sanitizer calls x / 0 an error; here it is IEEE arithmetic.
  if (b == 0.0f) return a == 0.0f || a != a ? NAN : std::signbit(a) != std::signbit(b) ? -HUGE_VALF : HUGE_VALF;
  return a / b;
}
static float fma(float a, float b, float c, bool fused) { return fused ? std::fma(a, b, c) : a * b + c; }
static float sqrt(float a) { return std::sqrt(a); }
static float flip(float a, uint32_t keep, uint32_t toggle) { return bits_to_float((float_to_bits(a) & keep) ^ toggle); }
static int32_t wrap(uint32_t x) { return static_cast<int32_t>(x); }
static int32_t nearest(float a) { return static_cast<int32_t>(std::nearbyint(a)); }
static uint16_t quiet_bf16(float a) { return heddle::float_to_bf16(a); }

static double exp(double x) { return std::exp(x); }
static double tanh(double x) { return std::tanh(x); }
static double log_normal(double x) { return std::log(x); }
static double log1p_unit(double x) { return std::log1p(x); }
static double sigmoid(double x) { return 1.0 / (1.0 + std::exp(-x)); }
static double sqrt_softplus(double x) { return std::sqrt(std::fmax(x, 0.0) + std::log1p(std::exp(-std::fabs(x)))); }

static void check_same(const char* op, int lane, float got, float want) {
  const bool same = want != want ? got != got : float_to_bits(got) == float_to_bits(want);
  CHECK(same, "%s %s lane %d: %a, expected %a", g_isa, op, lane, got, want);
}
static void check_same_int(const char* op, int lane, int32_t got, int32_t want) {
  CHECK(got == want, "%s %s lane %d: %d, expected %d", g_isa, op, lane, got, want);
}
static void check_near(const char* op, double got, double want, double tolerance) {
  CHECK(std::fabs(got - want) <= tolerance, "%s %s: %a, expected %a", g_isa, op, got, want);
}

// Random lanes: any bit pattern, ordinary numbers, small integers and the special values.
class Draw {
 public:
  explicit Draw(uint64_t seed) : random_(seed) {}
  void floats(float* p, int n) {
    static const float special[] = {0.0f, -0.0f, 1.0f, -1.0f, HUGE_VALF, -HUGE_VALF, NAN, 1e-45f, -1e-45f, 1.17549435e-38f, 3.4e38f};
    for (int i = 0; i < n; ++i) {
      switch (random_.below(4)) {
        case 0: p[i] = special[random_.below(11)]; break;
        case 1: p[i] = bits_to_float(static_cast<uint32_t>(random_.bits())); break;
        case 2: p[i] = static_cast<float>(random_.below(7) - 3); break;
        default: p[i] = static_cast<float>(random_.uniform() * 20.0 - 10.0);
      }
    }
  }
  void moderate(float* p, int n) {
    for (int i = 0; i < n; ++i) p[i] = static_cast<float>((random_.uniform() - 0.5) * (random_.below(2) ? 8.0 : 4e6));
  }
  void ints(int32_t* p, int n) {
    for (int i = 0; i < n; ++i) {
      const uint64_t r = random_.bits();
      p[i] = random_.below(2) ? static_cast<int32_t>(r % 5) - 2 : static_cast<int32_t>(static_cast<uint32_t>(r));
    }
  }
  void halves(uint16_t* p, int n) {
    for (int i = 0; i < n; ++i) p[i] = static_cast<uint16_t>(random_.bits());
  }

 private:
  check::Random random_;
};

// Heap blocks of exactly n elements, so that the address sanitizer reports a read or write of element n.
static float* exact_floats(int n) { return static_cast<float*>(std::malloc(static_cast<size_t>(n) * 4)); }
static uint16_t* exact_halves(int n) { return static_cast<uint16_t*>(std::malloc(static_cast<size_t>(n) * 2)); }
static int32_t* exact_ints(int n) { return static_cast<int32_t*>(std::malloc(static_cast<size_t>(n) * 4)); }
static void free_exact(float* a, uint16_t* b, int32_t* c) {
  std::free(a);
  std::free(b);
  std::free(c);
}

// Feeds a function the floats of [low, high] (every step-th bit pattern, so every binade is covered alike, then
// evenly spaced values of the part within +-100) and keeps the largest error. HEDDLE_TEST_EXHAUSTIVE=1 takes every
// float there is, in minutes.
class Sweep {
 public:
  Sweep(const char* name, double (*exact)(double), float low, float high, double bound)
      : name_(name), exact_(exact), low_(order(low)), high_(order(high)), at_(low_), bound_(bound) {
    step_ = std::getenv("HEDDLE_TEST_EXHAUSTIVE") ? 1 : (high_ - low_) / (kSlow ? 100000 : 4000000) + 1;
    even_low_ = low < -100.0f ? -100.0 : low;
    even_high_ = high > 100.0f ? 100.0 : high;
  }
  ~Sweep() {
    std::printf("     %-7s %-14s max error %.3f ULP at %a (%lld values)\n", g_isa, name_, worst_, worst_at_, (long long)count_);
    CHECK(worst_ <= bound_, "%s %s: %.3f ULP at %a, bound %.2f", g_isa, name_, worst_, worst_at_, bound_);
  }
  bool next(float* p, int n) {
    if (even_ > kEven) return false;
    for (int i = 0; i < n; ++i) {
      if (at_ <= high_) {
        p[i] = unorder(at_);
        at_ += at_ < high_ && at_ + step_ > high_ ? high_ - at_ : step_;
      } else {
        const int64_t e = even_ < kEven ? even_ : kEven;
        p[i] = static_cast<float>(even_low_ + (even_high_ - even_low_) * (static_cast<double>(e) / kEven));
        ++even_;
      }
    }
    return true;
  }
  void judge(const float* in, const float* out, int n) {
    for (int i = 0; i < n; ++i) {
      const double want = exact_(in[i]);
      int exponent;
      std::frexp(want, &exponent);  // want = m 2^exponent, m in [1/2, 1)
      const double ulp = std::ldexp(1.0, (exponent < -125 ? -125 : exponent) - 24);
      const double error = std::fabs(out[i] - want) / ulp;
      ++count_;
      if (!(error <= worst_)) {
        worst_ = error;
        worst_at_ = in[i];
      }
    }
  }

 private:
  static constexpr int64_t kEven = kSlow ? 100000 : 4000000;
  static int64_t order(float f) {
    const int32_t b = static_cast<int32_t>(float_to_bits(f));
    return b < 0 ? -static_cast<int64_t>(b & 0x7fffffff) : b;
  }
  static float unorder(int64_t o) {
    return bits_to_float(o < 0 ? static_cast<uint32_t>(-o) | 0x80000000u : static_cast<uint32_t>(o));
  }
  const char* name_;
  double (*exact_)(double);
  int64_t low_, high_, at_, step_, even_ = 0, count_ = 0;
  double bound_, even_low_, even_high_, worst_ = 0.0;
  float worst_at_ = 0.0f;
};

}  // namespace plain

#if defined(HEDDLE_TARGET_X86)
#include "simd/avx512_begin.h"
#include "simd/math-inl.h"
#include "simd_test-inl.h"
#include "simd/end.h"

#include "simd/avx2_begin.h"
#include "simd/math-inl.h"
#include "simd_test-inl.h"
#include "simd/end.h"
#endif

#if defined(HEDDLE_TARGET_NEON)
#include "simd/neon_begin.h"
#include "simd/math-inl.h"
#include "simd_test-inl.h"
#include "simd/end.h"
#endif

#include "simd/scalar_begin.h"
#include "simd/math-inl.h"
#include "simd_test-inl.h"
#include "simd/end.h"

static void run_on(heddle::Isa isa, void (*test)()) {
  plain::g_isa = heddle::isa_name(isa);
  if (heddle::isa_available(isa)) {
    test();
  } else {
    std::printf("skipped: this machine has no %s\n", plain::g_isa);
  }
}

#define TEST_REGION(region, isa)                                                        \
  TEST(region##_arithmetic) { run_on(heddle::Isa::isa, heddle::region::run_arithmetic); } \
  TEST(region##_memory) { run_on(heddle::Isa::isa, heddle::region::run_memory); }         \
  TEST(region##_math) { run_on(heddle::Isa::isa, heddle::region::run_math); }

#if defined(HEDDLE_TARGET_X86)
TEST_REGION(avx512, kAvx512)
TEST_REGION(avx2, kAvx2)
#endif
#if defined(HEDDLE_TARGET_NEON)
TEST_REGION(neon, kNeon)
#endif
TEST_REGION(scalar, kScalar)
