// Expert-choice routing: every expert takes its `capacity` best tokens.
//
// Definition: s = score(l) per token (softmax over its experts, sigmoid or sqrt-softplus; logits read as in
// route_top_k.h); expert e takes the `capacity` largest s[t, e] in descending order, ties to the lower token;
// the weights are those scores, not renormalised.
//
// Two passes. The scores (SIMD, parallel over tokens) go into one [experts, tokens] fp32 scratch; then each expert
// (parallel, plain C++) selects on 64-bit keys (score bits, complement of the token), a total order, by
// std::nth_element and a sort of the winners: expected O(tokens) per expert, no matter how large the capacity.
//
// Precision: fp32 scores, relative error <= 1e-6 against float64. Scratch: 4 E T bytes, and 8 T per thread.
#pragma once
#include "moe/route_top_k.h"

namespace heddle {

struct ExpertChoiceArgs {
  const void* logits = nullptr;  // [tokens, experts], fp32 | bf16 | fp16
  DType type = DType::kFloat32;
  int64_t tokens = 0;  // < 2^31
  int32_t experts = 0;
  RouterScore score = RouterScore::kSoftmax;
  int64_t capacity = 0;        // <= tokens
  int32_t* indices = nullptr;  // [experts, capacity] token ids
  float* weights = nullptr;    // [experts, capacity]
  float* scores = nullptr;     // [experts, tokens] scratch, set by route_expert_choice
};

// kOk, kCancelled or kNoMemory.
Status route_expert_choice(const ExpertChoiceArgs& args, const Exec& exec);

// First pass: fills args.scores.
HEDDLE_DECLARE_OP(expert_scores, ExpertChoiceArgs)

}  // namespace heddle
