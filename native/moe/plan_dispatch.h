// Dropless or capacity-limited dispatch: which routes go to which expert, in which order.
//
// Definition: route i = t * k + j sends token t to expert local(indices[i]), where local(-1) = -1 (masked) and
// local(g) = expert_map ? expert_map[g] : g. `order` lists the kept routes sorted by expert, ascending within one;
// offsets[e] .. offsets[e + 1] are expert e's; inverse[i] is route i's place in `order`, -1 when masked or dropped.
// With a capacity each expert keeps its first `capacity` routes in the order that `drop` names:
//   position        t, then j: the routes as they come (Megatron, MegaBlocks)
//   slot            j, then t: all first choices before second choices (Tutel, GShard, V-MoE)
//   weight          weights[i] descending, then i (Megatron "probs")
//   batch-priority  j, then the token's largest weight descending, then t (V-MoE)
// A NaN weight ranks below all others. The drop rule decides only who stays, never the order inside an expert.
//
// Plain C++: integer work bound by memory, where SIMD gains nothing. A counting sort over chunks whose size
// depends on the shape alone: a histogram per chunk, one prefix over (expert, chunk), a scatter per chunk; the
// result does not depend on the threads. Reads 2 x 4 T k bytes, writes 8 T k. Only an expert over its capacity is
// selected from, by a partial sort on a total order.
#pragma once
#include "core/status.h"
#include "core/thread_pool.h"

namespace heddle {

enum class DropRule : int32_t { kPosition = 0, kSlot = 1, kWeight = 2, kBatchPriority = 3 };

struct PlanDispatchArgs {
  const int32_t* indices = nullptr;  // [tokens, k]
  int64_t tokens = 0;
  int32_t k = 0;                 // tokens * k < 2^31
  int32_t experts = 0;           // local experts
  int32_t global_experts = 0;    // ids run from -1 to global_experts - 1
  const int32_t* expert_map = nullptr;  // [global_experts], each -1 to experts - 1
  int64_t capacity = -1;         // -1: none
  DropRule drop = DropRule::kPosition;
  const float* weights = nullptr;  // [tokens, k], for kWeight and kBatchPriority
  int32_t* order = nullptr;        // [tokens * k]
  int32_t* offsets = nullptr;      // [experts + 1]
  int32_t* inverse = nullptr;      // [tokens, k]
  int32_t* dropped = nullptr;      // [tokens * k] where there is a capacity
  int32_t* counts = nullptr;       // [2]: routes dropped, routes kept
};

// kOk, kCancelled, kNoMemory, or bad_value(route) for an id out of range.
Status plan_dispatch(const PlanDispatchArgs& args, const Exec& exec);

}  // namespace heddle
