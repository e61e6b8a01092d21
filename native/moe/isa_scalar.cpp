// The moe family compiled for scalar.
#include "moe/combine.h"
#include "moe/route_top_k.h"
#include "simd/simd.h"

#include "simd/scalar_begin.h"

#include "simd/math-inl.h"

#include "moe/router_row-inl.h"

#include "moe/route_top_k-inl.h"

#include "moe/combine-inl.h"

#include "simd/end.h"
