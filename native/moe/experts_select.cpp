// Expert stages by instruction set.
#include "moe/experts.h"

namespace heddle {

#define HEDDLE_STAGES(isa)                  \
  namespace isa {                           \
  const ExpertStages& expert_stages();      \
  }
#if defined(__x86_64__) || defined(_M_X64)
HEDDLE_STAGES(avx512)
HEDDLE_STAGES(avx2)
#endif
#if defined(__aarch64__) || defined(_M_ARM64)
HEDDLE_STAGES(neon)
#endif
HEDDLE_STAGES(scalar)

const ExpertStages& expert_stages(Isa isa) {
  switch (isa) {
#if defined(__x86_64__) || defined(_M_X64)
    case Isa::kAvx512: return avx512::expert_stages();
    case Isa::kAvx2: return avx2::expert_stages();
#endif
#if defined(__aarch64__) || defined(_M_ARM64)
    case Isa::kNeon: return neon::expert_stages();
#endif
    default: return scalar::expert_stages();
  }
}

}  // namespace heddle
