// The transformer block ops compiled for avx512.
#include "nn/elementwise.h"
#include "nn/fused_linear.h"
#include "nn/norm.h"
#include "simd/simd.h"

#if defined(HEDDLE_TARGET_X86)
#include "simd/avx512_begin.h"

#include "simd/math-inl.h"

#include "simd/typed-inl.h"

#include "nn/norm-inl.h"

#include "nn/elementwise-inl.h"

#include "gemm/operand-inl.h"

#include "gemm/activation-inl.h"

#include "nn/fused_linear-inl.h"

#include "simd/end.h"
#endif
