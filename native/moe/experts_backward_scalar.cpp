// Stages of the experts' backward compiled for scalar.
#include "moe/experts_backward.h"
#include "simd/simd.h"

#include "simd/scalar_begin.h"

#include "simd/math-inl.h"

#include "gemm/operand-inl.h"

#include "moe/experts_backward-inl.h"

#include "simd/end.h"
