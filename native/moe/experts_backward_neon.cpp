// Stages of the experts' backward compiled for neon.
#include "moe/experts_backward.h"
#include "simd/simd.h"

#if defined(HEDDLE_TARGET_NEON)
#include "simd/neon_begin.h"

#include "simd/math-inl.h"

#include "gemm/operand-inl.h"

#include "moe/experts_backward-inl.h"

#include "simd/end.h"
#endif
