// The privacy family compiled for avx2.
#include "privacy/gaussian_noise.h"
#include "privacy/kernels.h"
#include "simd/simd.h"

#if defined(HEDDLE_TARGET_X86)
#include "simd/avx2_begin.h"

#include "simd/math-inl.h"

#include "simd/typed-inl.h"

#include "privacy/block-inl.h"

#include "privacy/rows-inl.h"

#include "privacy/noise-inl.h"

#include "simd/end.h"
#endif
