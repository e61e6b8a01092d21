#include "core/cpu_features.h"

#include <cstdlib>
#include <cstring>
#include <initializer_list>

#if defined(__x86_64__) || defined(_M_X64)
#define HEDDLE_X86 1
#if defined(_MSC_VER)
#include <intrin.h>
#else
#include <cpuid.h>
#endif
#endif
#if defined(__aarch64__) && defined(__linux__)
#include <sys/auxv.h>
#endif
#if defined(__APPLE__)
#include <sys/sysctl.h>
#endif
#if defined(__unix__)
#include <unistd.h>
#endif

namespace heddle {
namespace {

#if defined(HEDDLE_X86)
struct Regs {
  uint32_t a, b, c, d;
};

Regs cpuid(uint32_t leaf, uint32_t subleaf) {
  Regs r{};
#if defined(_MSC_VER)
  int v[4];
  __cpuidex(v, static_cast<int>(leaf), static_cast<int>(subleaf));
  r = {static_cast<uint32_t>(v[0]), static_cast<uint32_t>(v[1]), static_cast<uint32_t>(v[2]),
       static_cast<uint32_t>(v[3])};
#else
  __cpuid_count(leaf, subleaf, r.a, r.b, r.c, r.d);
#endif
  return r;
}

uint64_t xgetbv0() {
#if defined(_MSC_VER)
  return _xgetbv(0);
#else
  uint32_t lo, hi;
  __asm__ volatile("xgetbv" : "=a"(lo), "=d"(hi) : "c"(0));
  return static_cast<uint64_t>(hi) << 32 | lo;
#endif
}

void detect_x86(CpuFeatures& f) {
  const Regs l0 = cpuid(0, 0);
  const uint32_t max_leaf = l0.a;
  const bool amd = l0.b == 0x68747541u;  // "Auth"enticAMD
  const Regs l1 = cpuid(1, 0);
  auto bit = [](uint32_t r, int i) { return (r >> i & 1u) != 0; };
  f.sse42 = bit(l1.c, 20);
  // The OS must save the wide registers on a context switch (XCR0), or using them corrupts data.
  const uint64_t xcr0 = bit(l1.c, 27) ? xgetbv0() : 0;
  const bool os_ymm = (xcr0 & 0x6) == 0x6;
  const bool os_zmm = (xcr0 & 0xe6) == 0xe6;
  const bool os_amx = (xcr0 & 0x60000) == 0x60000;
  if (max_leaf < 7) return;
  const Regs l7 = cpuid(7, 0);
  const Regs l71 = l7.a >= 1 ? cpuid(7, 1) : Regs{};
  const bool fma = bit(l1.c, 12), avx = bit(l1.c, 28), f16c = bit(l1.c, 29);
  f.avx2 = os_ymm && avx && fma && f16c && bit(l7.b, 5);
  f.avx512 = f.avx2 && os_zmm && bit(l7.b, 16) && bit(l7.b, 17) && bit(l7.b, 30) && bit(l7.b, 31);
  f.avx512_vnni = f.avx512 && bit(l7.c, 11);
  f.avx512_bf16 = f.avx512 && bit(l71.a, 5);
  f.fast_bf16_dot = f.avx512_bf16 && amd;
  // For measuring and for testing both paths on one machine.
  if (const char* forced = std::getenv("HEDDLE_BF16_DOT")) f.fast_bf16_dot = f.avx512_bf16 && std::strcmp(forced, "on") == 0;
  f.avx512_fp16 = f.avx512 && bit(l7.d, 23);
  f.avx_vnni = f.avx2 && bit(l71.a, 4);
  f.amx_tile = os_amx && bit(l7.d, 24);
  f.amx_bf16 = f.amx_tile && bit(l7.d, 22);
  f.amx_int8 = f.amx_tile && bit(l7.d, 25);
}
#endif

CpuFeatures detect() {
  CpuFeatures f;
#if defined(HEDDLE_X86)
  detect_x86(f);
#elif defined(__aarch64__)
  f.neon = true;
#if defined(__linux__)
  const unsigned long hw = getauxval(AT_HWCAP), hw2 = getauxval(AT_HWCAP2);
  f.arm_dotprod = hw >> 20 & 1;  // HWCAP_ASIMDDP
  f.arm_i8mm = hw2 >> 13 & 1;    // HWCAP2_I8MM
  f.arm_bf16 = hw2 >> 14 & 1;    // HWCAP2_BF16
#elif defined(__APPLE__)
  auto has = [](const char* name) {
    int v = 0;
    size_t n = sizeof v;
    return sysctlbyname(name, &v, &n, nullptr, 0) == 0 && v != 0;
  };
  f.arm_dotprod = has("hw.optional.arm.FEAT_DotProd");
  f.arm_i8mm = has("hw.optional.arm.FEAT_I8MM");
  f.arm_bf16 = has("hw.optional.arm.FEAT_BF16");
#endif
#endif
#if defined(_SC_LEVEL2_CACHE_SIZE)
  const long l1 = sysconf(_SC_LEVEL1_DCACHE_SIZE), l2 = sysconf(_SC_LEVEL2_CACHE_SIZE);
  if (l1 > 0) f.l1d_bytes = l1;
  if (l2 > 0) f.l2_bytes = l2;
#endif
  return f;
}

}  // namespace

const CpuFeatures& cpu_features() {
  static const CpuFeatures f = detect();
  return f;
}

bool isa_available(Isa isa) {
  const CpuFeatures& f = cpu_features();
  switch (isa) {
    case Isa::kScalar: return true;
    case Isa::kNeon: return f.neon;
    case Isa::kAvx2: return f.avx2;
    case Isa::kAvx512: return f.avx512;
  }
  return false;
}

Isa best_isa() {
  for (Isa isa : {Isa::kAvx512, Isa::kAvx2, Isa::kNeon}) {
    if (isa_available(isa)) return isa;
  }
  return Isa::kScalar;
}

const char* isa_name(Isa isa) {
  constexpr const char* names[] = {"scalar", "neon", "avx2", "avx512"};
  return names[static_cast<int32_t>(isa)];
}

}  // namespace heddle
