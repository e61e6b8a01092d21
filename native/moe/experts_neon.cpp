// Expert stages compiled for neon.
#include "moe/experts.h"
#include "simd/simd.h"

#if defined(HEDDLE_TARGET_NEON)
#include "simd/neon_begin.h"

#include "simd/math-inl.h"

#include "simd/typed-inl.h"

#include "gemm/operand-inl.h"

#include "moe/experts-inl.h"

#include "simd/end.h"
#endif
