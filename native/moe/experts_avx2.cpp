// Expert stages compiled for avx2.
#include "moe/experts.h"
#include "simd/simd.h"

#if defined(HEDDLE_TARGET_X86)
#include "simd/avx2_begin.h"

#include "simd/math-inl.h"

#include "simd/typed-inl.h"

#include "gemm/operand-inl.h"

#include "moe/experts-inl.h"

#include "simd/end.h"
#endif
