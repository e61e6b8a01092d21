// The attention family compiled for neon.
#include "attention/attention.h"
#include "attention/attention_backward.h"
#include "attention/decode_attention.h"
#include "attention/part.h"
#include "attention/stream_attention.h"
#include "attention/rotary_embedding.h"
#include "simd/simd.h"

#if defined(HEDDLE_TARGET_NEON)
#define HEDDLE_ATTENTION_ROWS 12  // 32 registers: 12 x 2 sums, 2 columns, broadcasts
#include "simd/neon_begin.h"

#include "simd/math-inl.h"

#include "attention/lanes_generic-inl.h"

#include "attention/panel-inl.h"

#include "attention/micro-inl.h"

#include "attention/logits-inl.h"

#include "attention/attention-inl.h"

#include "attention/attention_backward-inl.h"

#include "attention/part-inl.h"

#include "attention/part_rows-inl.h"

#include "attention/part_dot-inl.h"

#include "attention/decode_attention-inl.h"

#include "attention/stream_attention-inl.h"

#include "attention/rotary_embedding-inl.h"

#include "simd/end.h"
#endif
