// The training family compiled for avx2.
#include "training/activation.h"
#include "training/cross_entropy.h"
#include "training/group_norm.h"
#include "training/optimizer_update.h"
#include "simd/simd.h"

#if defined(HEDDLE_TARGET_X86)
#include "simd/avx2_begin.h"

#include "simd/math-inl.h"

#include "training/optimizer_update-inl.h"

#include "training/activation-inl.h"

#include "training/group_norm-inl.h"

#include "training/cross_entropy-inl.h"

#include "simd/end.h"
#endif
