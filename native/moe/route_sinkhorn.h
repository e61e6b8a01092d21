// Sinkhorn routing: balance the experts by scaling rows and columns before the top-k (Megatron).
//
// Definition: c = exp(l - max(l)) per token; r = 1 per expert; repeat
//   d[t] = 1 / (T (sum_e r[e] c[t, e] + epsilon))      r'[e] = 1 / (E (sum_t d[t] c[t, e] + epsilon))
// until mean_e |r[e] - r'[e]| <= tolerance or max_iterations were made. ids = top-k of l + log(r) (the order of
// d c r, which is what Megatron compares, without its underflow; ties to the lower id). Weights come from the
// logits alone: score(l)[ids].
//
// Megatron scales exp(l) itself, which overflows beyond l = 88. A factor exp(-max) of a row is absorbed by d[t]
// except in `epsilon`, which is relative to the row's largest term here: the two differ by a relative
// epsilon |1 - exp(-max)|, and here a constant added to a row's logits never changes its route.
//
// Precision: c and row sums in fp32 (blocked), d, r and column sums in double. Column sums are added up in blocks
// of kSinkhornRows tokens and the blocks in order, so nothing depends on the threads. Scratch: 4 T E bytes and
// 8 E per block.
#pragma once
#include "moe/route_top_k.h"

namespace heddle {

constexpr int64_t kSinkhornRows = 64;

struct SinkhornArgs {
  const void* logits = nullptr;  // [tokens, experts], fp32 | bf16 | fp16
  DType type = DType::kFloat32;
  int64_t tokens = 0;
  int32_t experts = 0, k = 0;
  RouterScore score = RouterScore::kSoftmax;
  double tolerance = 1e-4, epsilon = 1e-8;
  int32_t max_iterations = 100;  // 0: plain top-k
  int32_t* indices = nullptr;    // [tokens, k]
  float* weights = nullptr;      // [tokens, k]
  int32_t* report = nullptr;     // [2]: iterations made, 1 when converged
};

enum class SinkhornPhase : int32_t { kExp, kScale, kSelect };

// One pass over the tokens, in blocks of kSinkhornRows.
struct SinkhornPass {
  SinkhornPhase phase = SinkhornPhase::kExp;
  SinkhornArgs args;
  int32_t stride = 0;                // of cost, right and log_right: a multiple of 16, padding is 0
  float* cost = nullptr;             // [tokens, stride]
  const float* right = nullptr;      // [stride]
  const float* log_right = nullptr;  // [stride]
  double* partial = nullptr;         // [blocks, experts] column sums
};

// kOk, kCancelled or kNoMemory.
Status route_sinkhorn(const SinkhornArgs& args, const Exec& exec);

HEDDLE_DECLARE_OP(sinkhorn_pass, SinkhornPass)

}  // namespace heddle
