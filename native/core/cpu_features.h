// Which instructions this machine AND its operating system allow, and the instruction set chosen from them.
#pragma once
#include <cstdint>

namespace heddle {

enum class Isa : int32_t { kScalar = 0, kNeon = 1, kAvx2 = 2, kAvx512 = 3 };
constexpr int kIsaCount = 4;

struct CpuFeatures {
  bool avx2 = false;         // AVX2 + FMA + F16C, registers saved by the OS
  bool avx512 = false;       // F + BW + DQ + VL, registers saved by the OS
  bool avx512_bf16 = false;  // vdpbf16ps
  // vdpbf16ps at full rate (AMD Zen 4 and later). Intel's runs at half the rate of an fp32 FMA on twice the work:
  // measured 80 GFLOP/s a core against 178 for widening to fp32 on Emerald Rapids, so bf16 is widened there.
  bool fast_bf16_dot = false;
  bool avx512_vnni = false;  // vpdpbusd on zmm
  bool avx512_fp16 = false;
  bool avx_vnni = false;     // vpdpbusd on ymm, VEX encoding
  bool amx_tile = false, amx_bf16 = false, amx_int8 = false;
  bool neon = false, arm_dotprod = false, arm_bf16 = false, arm_i8mm = false;
  bool sse42 = false;
  int64_t l1d_bytes = 32 << 10, l2_bytes = 1 << 20;
};

const CpuFeatures& cpu_features();
bool isa_available(Isa isa);
Isa best_isa();
const char* isa_name(Isa isa);

}  // namespace heddle
