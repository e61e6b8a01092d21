// The privacy family compiled for scalar.
#include "privacy/gaussian_noise.h"
#include "privacy/kernels.h"
#include "simd/simd.h"

#include "simd/scalar_begin.h"

#include "simd/math-inl.h"

#include "simd/typed-inl.h"

#include "privacy/block-inl.h"

#include "privacy/rows-inl.h"

#include "privacy/noise-inl.h"

#include "simd/end.h"
