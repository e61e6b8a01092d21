// The privacy family compiled for neon.
#include "privacy/gaussian_noise.h"
#include "privacy/kernels.h"
#include "simd/simd.h"

#if defined(HEDDLE_TARGET_NEON)
#include "simd/neon_begin.h"

#include "simd/math-inl.h"

#include "simd/typed-inl.h"

#include "privacy/block-inl.h"

#include "privacy/rows-inl.h"

#include "privacy/noise-inl.h"

#include "simd/end.h"
#endif
