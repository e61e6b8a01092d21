// Packed products of every type on every instruction set of this machine, against a plain float64 product of the same
// rounded weights and activations; M = 1..17, 31 and 45
// (several tiles on every set), odd N and K. A plain program: exit status 1 when a check fails.
// On Arm, emulators choose the path: qemu-aarch64 -cpu cortex-a53 (NEON), neoverse-n1 (sdot), max (smmla, bfdot).
#include <cmath>
#include <cstdio>
#include <cstring>
#include <memory>
#include <vector>

#include "gemm/linear.h"
#include "gemm/quantize.h"

using namespace heddle;

namespace {

int failures = 0, checks = 0;
#define CHECK(condition, ...)                                   \
  do {                                                          \
    ++checks;                                                   \
    if (!(condition)) {                                         \
      if (++failures <= 20) {                                   \
        std::printf("%s:%d: %s: ", __FILE__, __LINE__, #condition); \
        std::printf(__VA_ARGS__);                               \
        std::printf("\n");                                      \
      }                                                         \
    }                                                           \
  } while (0)

struct Random {
  uint64_t s = 88172645463325252u;
  double uniform() {
    s ^= s << 13, s ^= s >> 7, s ^= s << 17;
    return static_cast<double>(s >> 11) * 0x1p-53;
  }
  float normal() {
    const double r = std::sqrt(-2 * std::log(1 - uniform()));
    return static_cast<float>(r * std::cos(6.283185307179586 * uniform()));
  }
};

struct Variant {
  const char* name;
  PackType type;
  int64_t group;
  bool symmetric, search;
  double tolerance;
  float size = 0.0f;  // of the smallest weights, where they are not all of size 1; doubled from row to row, three rows
};
const Variant kVariants[] = {
    {"float32", PackType::kFloat32, 0, true, false, 2e-6},
    {"bfloat16", PackType::kBFloat16, 0, true, false, 5e-6},
    {"int8", PackType::kInt8, 0, true, false, 1e-6},
    {"int4 g32", PackType::kInt4, 32, true, false, 1e-6},
    {"int4 g64 zero points", PackType::kInt4, 64, false, false, 1e-6},
    {"int4 g128 zero points, search", PackType::kInt4, 128, false, true, 1e-6},
    {"mxfp4", PackType::kMxfp4, 32, true, false, 1e-6},
    {"mxfp4, exponents 0 to 2", PackType::kMxfp4, 32, true, false, 1e-6, 0x1p-126f},
    {"float8", PackType::kFloat8, 0, true, false, 2e-6},
};

// Weight (n, k) as the packed bytes say, by the layout in packed.h.
double weight_at(const PackedMatrix& m, int64_t n, int64_t k) {
  const int64_t p = n / kPanel, c = n % kPanel, unit = pack_unit(m.type);
  const auto* step = reinterpret_cast<const unsigned char*>(m.panel(p)) + k / unit * kStepBytes;
  const int64_t i = k % unit;
  const int64_t slot = (p * m.groups() + (m.group ? k / m.group : 0)) * kPanel + c;
  switch (m.type) {
    case PackType::kFloat32: return reinterpret_cast<const float*>(step)[c];
    case PackType::kBFloat16: return bf16_to_float(reinterpret_cast<const uint16_t*>(step)[c * 2 + i]);
    case PackType::kInt8: return static_cast<int8_t>(step[c * 4 + i]) * double{m.scale.as<float>()[slot]};
    case PackType::kFloat8: {
      const int code = step[c * 4 + i], e = code >> 3 & 15, f = code & 7;
      const double v = e ? std::ldexp(8 + f, e - 10) : std::ldexp(f, -9);
      return (code & 128 ? -v : v) * double{m.scale.as<float>()[slot]};
    }
    default: break;
  }
  const int code = i < 4 ? step[c * 4 + i] & 15 : step[c * 4 + i - 4] >> 4;
  if (m.type == PackType::kInt4) {
    const int zero = m.point ? m.point.as<uint8_t>()[slot] : 8;
    return (code - zero) * double{m.scale.as<float>()[slot]};
  }
  const double values[] = {0, 0.5, 1, 1.5, 2, 3, 4, 6};
  return (code & 8 ? -1 : 1) * std::ldexp(values[code & 7], m.exponent.as<uint8_t>()[slot] - 127);
}

// A row of x as the operand holds it.
std::vector<double> activations(const float* x, const PackedMatrix& m, Operand kind) {
  std::vector<double> out(x, x + m.k);
  if (kind == Operand::kFloat32 || kind == Operand::kFloat32Pair) return out;
  if (kind == Operand::kBFloat16) {
    for (int64_t i = 0; i < m.k; ++i) out[static_cast<size_t>(i)] = bf16_to_float(float_to_bf16(x[i]));
    return out;
  }
  const int64_t group = m.group ? m.group : m.k;
  for (int64_t g = 0; g < m.k; g += group) {
    float amax = 0;
    for (int64_t i = g; i < g + group; ++i) amax = std::fmax(amax, std::fabs(x[i]));
    if (amax == 0) continue;
    const float inverse = 127.0f / amax, scale = amax / 127.0f;
    for (int64_t i = g; i < g + group; ++i) out[static_cast<size_t>(i)] = std::nearbyint(x[i] * inverse) * double{scale};
  }
  return out;
}

std::shared_ptr<PackedMatrix> pack(const Variant& v, const std::vector<float>& w, int64_t n, int64_t k, Status* status) {
  auto m = std::make_shared<PackedMatrix>();
  PackMatrixArgs a;
  a.matrix = m;
  a.type = v.type;
  a.source.data = w.data();
  a.source.n_stride = k;
  a.n = n, a.k = k;
  a.options.group = v.group;
  a.options.symmetric = v.symmetric;
  a.options.search = v.search;
  *status = pack_matrix_job(a, Exec());
  return m;
}

// Returns the largest error of any M.
double test_product(Isa isa, const Variant& v, int64_t n, int64_t k) {
  Random random;
  constexpr int64_t kRows = 45;
  std::vector<float> w(static_cast<size_t>(n * k)), x(static_cast<size_t>(kRows * k));
  for (size_t i = 0; i < w.size(); ++i) w[i] = random.normal() + (i / 64 % 3 ? 0.7f : 0.0f);
  for (size_t i = 0; v.size > 0 && i < w.size(); ++i) w[i] *= std::ldexp(v.size, static_cast<int>(i / static_cast<size_t>(k) % 3));
  for (float& f : x) f = random.normal();
  Status status;
  const auto m = pack(v, w, n, k, &status);
  CHECK(status == kOk, "%s: status %d", v.name, static_cast<int>(status));

  if (v.size > 0) {  // the case is about these
    const auto* e = m->exponent.as<uint8_t>();
    for (int i = 0; i < 3; ++i) {
      CHECK(n * k < 1000 || std::memchr(e, i, m->exponent.size()), "no group with exponent %d", i);
    }
  }
  const Operand kind = operand_kind(isa, v.type);
  std::vector<double> expected(static_cast<size_t>(kRows * n));
  for (int64_t r = 0; r < kRows; ++r) {
    const std::vector<double> a = activations(x.data() + r * k, *m, kind);
    for (int64_t c = 0; c < n; ++c) {
      double sum = 0;
      for (int64_t i = 0; i < k; ++i) sum += a[static_cast<size_t>(i)] * weight_at(*m, c, i);
      expected[static_cast<size_t>(r * n + c)] = sum;
    }
  }
  double worst = 0;
  std::vector<float> all;
  for (int64_t rows = kRows; rows >= 1; rows -= rows > 17 ? 14 : 1) {
    std::vector<float> y(static_cast<size_t>(rows * n), NAN);
    LinearArgs a;
    a.weight = m;
    a.x = x.data();
    a.rows = rows;
    a.out = y.data();
    Exec exec;
    exec.isa = isa;
    exec.threads = rows % 2 ? 1 : 2;
    CHECK(linear(a, exec) == kOk, "%s on %s", v.name, isa_name(isa));
    double difference = 0, norm = 0;
    for (size_t i = 0; i < y.size(); ++i) {
      difference += (y[i] - expected[i]) * (y[i] - expected[i]);
      norm += expected[i] * expected[i];
    }
    const double error = norm > 0 ? std::sqrt(difference / norm) : std::sqrt(difference);
    CHECK(error <= v.tolerance, "%s on %s, M=%d N=%d K=%d: %.3g", v.name, isa_name(isa), static_cast<int>(rows),
          static_cast<int>(n), static_cast<int>(k), error);
    worst = std::isnan(error) || error > worst ? error : worst;
    if (rows == kRows) all = y;
    CHECK(std::memcmp(y.data(), all.data(), y.size() * sizeof(float)) == 0, "%s on %s: M=%d changes bits", v.name,
          isa_name(isa), static_cast<int>(rows));
  }
  return worst;
}

void test_e4m3() {
  for (int c = 0; c < 256; ++c) {
    if ((c & 127) == 127) {
      CHECK(std::isnan(e4m3_to_float(static_cast<uint8_t>(c))), "code %d", c);
      continue;
    }
    const double v = c & 0x78 ? std::ldexp(8 + (c & 7), (c >> 3 & 15) - 10) : std::ldexp(c & 7, -9);
    CHECK(e4m3_to_float(static_cast<uint8_t>(c)) == (c & 128 ? -v : v), "code %d", c);
    CHECK(float_to_e4m3(e4m3_to_float(static_cast<uint8_t>(c))) == c, "code %d", c);
    if ((c & 127) < 126) {  // halfway to the next goes to the even code, a little more or less to the nearer
      const float low = e4m3_to_float(static_cast<uint8_t>(c)), high = e4m3_to_float(static_cast<uint8_t>(c + 1));
      const float middle = (low + high) / 2;
      CHECK(float_to_e4m3(middle) == (c & 1 ? c + 1 : c), "middle above code %d", c);
      CHECK(float_to_e4m3(std::nextafter(middle, low)) == c, "below the middle above code %d", c);
      CHECK(float_to_e4m3(std::nextafter(middle, high)) == c + 1, "above the middle above code %d", c);
    }
  }
  CHECK(float_to_e4m3(1e30f) == 0x7e && float_to_e4m3(-449.0f) == 0xfe, "saturation");
}

void test_bad_values() {
  for (const Variant& v : kVariants) {
    for (const float bad : {NAN, HUGE_VALF, -HUGE_VALF}) {
      std::vector<float> w(70 * 256, 1.0f);
      w[69 * 256 + 3] = NAN;
      w[40 * 256 + 255] = bad;
      Status status;
      pack(v, w, 70, 256, &status);
      const bool carries = v.type == PackType::kFloat32 || v.type == PackType::kBFloat16;
      CHECK(status == (carries ? kOk : bad_value(40 * 256 + 255)), "%s: status %d", v.name, static_cast<int>(status));
    }
  }
}

}  // namespace

int main() {
  test_e4m3();
  test_bad_values();
  constexpr const char* kinds[] = {"float32", "float32 pairs", "bfloat16", "uint8", "int8", "integers as floats"};
  for (const Isa isa : {Isa::kScalar, Isa::kNeon, Isa::kAvx2, Isa::kAvx512}) {
    if (!isa_available(isa)) continue;
    for (const Variant& v : kVariants) {
      double worst = 0;
      for (const int64_t n : {1, 33, 47}) {
        if (v.group) {
          for (const int64_t groups : {1, 3}) worst = std::fmax(worst, test_product(isa, v, n, groups * v.group));
        } else {
          for (const int64_t k : {1, 7, 131, 419}) worst = std::fmax(worst, test_product(isa, v, n, k));
        }
      }
      std::printf("%-7s %-30s operand %-20s error %.2e\n", isa_name(isa), v.name,
                  kinds[static_cast<int>(operand_kind(isa, v.type))], worst);
    }
  }
#if defined(__aarch64__)
  const CpuFeatures& f = cpu_features();
  std::printf("dotprod %d, i8mm %d, bf16 %d\n", f.arm_dotprod, f.arm_i8mm, f.arm_bf16);
#endif
  std::printf("%d checks, %d failed\n", checks, failures);
  return failures ? 1 : 0;
}
