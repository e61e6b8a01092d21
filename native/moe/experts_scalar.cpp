// Expert stages compiled for scalar.
#include "moe/experts.h"
#include "simd/simd.h"

#include "simd/scalar_begin.h"

#include "simd/math-inl.h"

#include "simd/typed-inl.h"

#include "gemm/operand-inl.h"

#include "moe/experts-inl.h"

#include "simd/end.h"
