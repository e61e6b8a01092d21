// The attention family compiled for scalar.
#include "attention/attention.h"
#include "attention/attention_backward.h"
#include "attention/decode_attention.h"
#include "attention/part.h"
#include "attention/stream_attention.h"
#include "attention/rotary_embedding.h"
#include "simd/simd.h"

#define HEDDLE_ATTENTION_ROWS 4  // 8 sums
#include "simd/scalar_begin.h"

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
