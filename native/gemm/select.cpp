// Which tile products and operand an instruction set uses for a type.
#include "gemm/linear.h"
#include "gemm/packed.h"
#include "simd/simd.h"

namespace heddle {

#if defined(__x86_64__) || defined(_M_X64)
namespace avx512 {
const TileKernels& region_kernels(PackType type);
const LinearStages& linear_stages();
}
namespace avx2 {
const TileKernels& region_kernels(PackType type);
const LinearStages& linear_stages();
}
namespace avx512_dot {
const TileKernels& dot_kernels(PackType type);
}
#endif
#if defined(__aarch64__) || defined(_M_ARM64)
namespace neon {
const TileKernels& region_kernels(PackType type);
const LinearStages& linear_stages();
}
namespace neon_sdot {
const TileKernels& dot_kernels(PackType type);
}
namespace neon_smmla {
const TileKernels& dot_kernels(PackType type);
}
namespace neon_bfdot {
const TileKernels& dot_kernels();
}
#endif
namespace scalar {
const TileKernels& region_kernels(PackType type);
const LinearStages& linear_stages();
}

namespace {

// Whether a dot product instruction serves this type. On x86 one file is compiled for both extensions, so it is used
// where both are; on Arm each stands alone.
bool has_dot(Isa isa, PackType type) {
  const CpuFeatures& f = cpu_features();
#if defined(HEDDLE_ARM_DOT)
  if (isa == Isa::kNeon && type == PackType::kBFloat16) return f.arm_bf16;
  if (isa == Isa::kNeon) return f.arm_dotprod && type != PackType::kFloat32 && type != PackType::kFloat8;
#endif
  if (isa != Isa::kAvx512 || type == PackType::kFloat32 || type == PackType::kFloat8) return false;
  if (!f.avx512_bf16 || !f.avx512_vnni) return false;
  return type != PackType::kBFloat16 || f.fast_bf16_dot;
}

#if defined(HEDDLE_ARM_DOT)
const TileKernels& arm_dot_kernels(PackType type) {
  if (type == PackType::kBFloat16) return neon_bfdot::dot_kernels();
  return cpu_features().arm_i8mm ? neon_smmla::dot_kernels(type) : neon_sdot::dot_kernels(type);
}
#endif

}  // namespace

const TileKernels& tile_kernels(Isa isa, PackType type) {
  switch (isa) {
#if defined(__x86_64__) || defined(_M_X64)
    case Isa::kAvx512: return has_dot(isa, type) ? avx512_dot::dot_kernels(type) : avx512::region_kernels(type);
    case Isa::kAvx2: return avx2::region_kernels(type);
#endif
#if defined(__aarch64__) || defined(_M_ARM64)
#if defined(HEDDLE_ARM_DOT)
    case Isa::kNeon: return has_dot(isa, type) ? arm_dot_kernels(type) : neon::region_kernels(type);
#else
    case Isa::kNeon: return neon::region_kernels(type);
#endif
#endif
    default: return scalar::region_kernels(type);
  }
}

const LinearStages& linear_stages(Isa isa) {
  switch (isa) {
#if defined(__x86_64__) || defined(_M_X64)
    case Isa::kAvx512: return avx512::linear_stages();
    case Isa::kAvx2: return avx2::linear_stages();
#endif
#if defined(__aarch64__) || defined(_M_ARM64)
    case Isa::kNeon: return neon::linear_stages();
#endif
    default: return scalar::linear_stages();
  }
}

Operand operand_kind(Isa isa, PackType type) {
  const bool dot = has_dot(isa, type);
  switch (type) {
    case PackType::kFloat32:
    case PackType::kFloat8: return Operand::kFloat32;
    case PackType::kBFloat16: return dot ? Operand::kBFloat16 : Operand::kFloat32Pair;
    case PackType::kInt8: return !dot ? Operand::kIntFloat : isa == Isa::kNeon ? Operand::kInt8 : Operand::kUint8;
    default: return dot ? Operand::kInt8 : Operand::kIntFloat;
  }
}

void fill_tile(TileCall& t, Operand kind, const PackedMatrix& m, int64_t p, const char* operand, int rows) {
  t.a = operand;
  t.b = m.panel(p);
  t.steps = m.steps;
  t.accumulate = t.resident = false;
  t.prefetch = nullptr;
  t.prefetch_stride = t.group_steps = 0;
  t.b_scale = t.a_scale = nullptr;
  t.b_sum = t.a_sum = nullptr;
  t.b_zero = t.b_exponent = nullptr;
  if (m.type == PackType::kFloat32 || m.type == PackType::kBFloat16) return;
  const int64_t groups = m.groups();
  t.group_steps = m.group ? m.group / pack_unit(m.type) : m.steps;
  if (m.scale) t.b_scale = m.scale.as<float>() + p * groups * kPanel;
  if (kind == Operand::kFloat32) return;
  const int64_t value_bytes = kind == Operand::kIntFloat ? 4 : 1;  // the scales lie behind the values
  t.a_scale = reinterpret_cast<const float*>(operand + m.steps * pack_unit(m.type) * value_bytes * rows);
  t.a_sum = reinterpret_cast<const int32_t*>(t.a_scale + groups * rows);
  if (m.zero) t.b_sum = m.zero.as<int32_t>() + p * kPanel;
  if (m.point) t.b_zero = m.point.as<uint8_t>() + p * groups * kPanel;
  if (m.exponent) t.b_exponent = m.exponent.as<uint8_t>() + p * groups * kPanel;
}

int64_t operand_row_bytes(Operand kind, const PackedMatrix& m) {
  const int64_t padded = m.steps * pack_unit(m.type);
  switch (kind) {
    case Operand::kFloat32:
    case Operand::kFloat32Pair: return padded * 4;
    case Operand::kBFloat16: return padded * 2;
    case Operand::kUint8: return padded + 4 + 4;
    case Operand::kInt8: return padded + m.groups() * 8;
    case Operand::kIntFloat: return padded * 4 + m.groups() * 8;
  }
  return 0;
}

}  // namespace heddle
