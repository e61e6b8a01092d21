// The shared matrix products compiled for scalar.
#include "gemm/linear.h"
#include "gemm/packed.h"
#include "simd/simd.h"

#include "simd/scalar_begin.h"

#include "simd/math-inl.h"

#include "simd/typed-inl.h"

#include "gemm/operand-inl.h"

#include "gemm/tile-inl.h"

#include "gemm/linear-inl.h"

#include "simd/end.h"
