// The moe family compiled for avx512.
#include "moe/combine.h"
#include "moe/route_expert_choice.h"
#include "moe/route_sinkhorn.h"
#include "moe/route_top_k.h"
#include "moe/route_top_k_backward.h"
#include "moe/router_loss.h"
#include "simd/simd.h"

#if defined(HEDDLE_TARGET_X86)
#include "simd/avx512_begin.h"

#include "simd/math-inl.h"

#include "simd/typed-inl.h"

#include "moe/router_row-inl.h"

#include "moe/route_top_k-inl.h"

#include "moe/combine-inl.h"

#include "moe/route_expert_choice-inl.h"

#include "moe/route_sinkhorn-inl.h"

#include "moe/router_loss-inl.h"

#include "moe/route_top_k_backward-inl.h"

#include "simd/end.h"
#endif
