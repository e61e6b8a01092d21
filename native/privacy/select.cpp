// Privacy kernels by instruction set.
#include "privacy/gaussian_noise.h"
#include "privacy/kernels.h"

namespace heddle {

#define HEDDLE_PRIVACY(isa)                   \
  namespace isa {                             \
  const PrivacyKernels& privacy_kernels();    \
  const NoiseKernels& noise_kernels();        \
  }
#if defined(__x86_64__) || defined(_M_X64)
HEDDLE_PRIVACY(avx512)
HEDDLE_PRIVACY(avx2)
#endif
#if defined(__aarch64__) || defined(_M_ARM64)
HEDDLE_PRIVACY(neon)
#endif
HEDDLE_PRIVACY(scalar)

const PrivacyKernels& privacy_kernels(Isa isa) {
  switch (isa) {
#if defined(__x86_64__) || defined(_M_X64)
    case Isa::kAvx512: return avx512::privacy_kernels();
    case Isa::kAvx2: return avx2::privacy_kernels();
#endif
#if defined(__aarch64__) || defined(_M_ARM64)
    case Isa::kNeon: return neon::privacy_kernels();
#endif
    default: return scalar::privacy_kernels();
  }
}

const NoiseKernels& noise_kernels(Isa isa) {
  switch (isa) {
#if defined(__x86_64__) || defined(_M_X64)
    case Isa::kAvx512: return avx512::noise_kernels();
    case Isa::kAvx2: return avx2::noise_kernels();
#endif
#if defined(__aarch64__) || defined(_M_ARM64)
    case Isa::kNeon: return neon::noise_kernels();
#endif
    default: return scalar::noise_kernels();
  }
}

}  // namespace heddle
