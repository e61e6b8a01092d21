// The one place where an attention op meets the instruction set chosen at run time; planning and scratch.
#include "attention/attention.h"
#include "attention/attention_backward.h"
#include "attention/rotary_embedding.h"

namespace heddle {

HEDDLE_DEFINE_OP(attention_units, AttentionArgs)
HEDDLE_DEFINE_OP(attention_backward, AttentionBackwardArgs)
HEDDLE_DEFINE_OP(rotary_embedding, RotaryEmbeddingArgs)

Status attention(const AttentionArgs& args, const Exec& exec) {
  AttentionPlan plan;
  if (!make_plan(args.problem, exec.threads, &plan)) return kNoMemory;
  AttentionArgs planned = args;
  planned.plan = &plan;
  return attention_units(planned, exec);
}

void Failure::set() { failed_.store(1, std::memory_order_relaxed); }
bool Failure::get() const { return failed_.load(std::memory_order_relaxed) != 0; }

void* attention_scratch(int64_t bytes) { return Workspace::local().get(static_cast<size_t>(bytes)); }

bool make_plan(const AttentionProblem& p, int threads, AttentionPlan* plan) {
  const int64_t sequences = p.sequences(), group = p.group();
  if (group == 0) return true;
  // Packed q and the sums of a unit take at most half a MiB, so that they and a key panel share L2.
  int64_t rows = (int64_t{512} << 10) / (4 * (p.head_dim + p.value_dim));
  if (rows > 1024) rows = 1024;
  int64_t block = rows / group > 1 ? rows / group : 1;
  auto count = [&](int64_t b) {
    int64_t n = 0;
    if (!p.query_offsets) return sequences * ((p.queries + b - 1) / b) * p.key_heads;
    for (int64_t s = 0; s < sequences; ++s) n += (sequence_of(p, s).queries + b - 1) / b;
    return n * p.key_heads;
  };
  // Enough units that the last ones to finish leave no thread idle for long; 56 rows still pay for their panel.
  while (threads > 1 && block * group > 112 && count(block) < 8 * threads) block = (block + 1) / 2;
  plan->block = block;
  plan->units = count(block);
  if (p.query_offsets) {
    if (!plan->first.reset(static_cast<size_t>(sequences) + 1)) return false;
    int64_t n = 0;
    for (int64_t s = 0; s < sequences; ++s) {
      plan->first[s] = n;
      n += (sequence_of(p, s).queries + block - 1) / block * p.key_heads;
    }
    plan->first[sequences] = n;
  }
  // Short sequences: many units per tile, half a millisecond of work, in whole sequences: a unit fetches the memory of
  // the next one of its tile, and the heads of a sequence share lines of pages.
  const int64_t longest = p.query_offsets && sequences ? p.keys / sequences + 1 : p.keys;
  const int64_t positions = p.queries < block ? p.queries : block;
  const int64_t work = 1 + positions * group * longest * (p.head_dim + p.value_dim);
  plan->grain = 1 + 60'000'000 / work;
  if (plan->grain > p.key_heads) plan->grain = plan->grain / p.key_heads * p.key_heads;
  const int64_t fair = plan->units / (4 * threads);
  if (plan->grain > fair) plan->grain = fair > 1 ? fair : 1;
  return true;
}

AttentionUnit unit_of(const AttentionProblem& p, const AttentionPlan& plan, int64_t index) {
  int64_t s = 0, at = index;
  if (p.query_offsets) {
    int64_t lo = 0, hi = p.segments;  // the last segment whose first unit is <= index
    while (hi - lo > 1) {
      const int64_t mid = (lo + hi) / 2;
      (plan.first[mid] <= index ? lo : hi) = mid;
    }
    s = lo;
    at = index - plan.first[s];
  } else {
    const int64_t each = (p.queries + plan.block - 1) / plan.block * p.key_heads;
    s = index / each;
    at = index % each;
  }
  AttentionUnit u;
  u.sequence = sequence_of(p, s);
  const int64_t blocks = (u.sequence.queries + plan.block - 1) / plan.block;
  u.key_head = at / blocks;
  const int64_t block = blocks - 1 - at % blocks;  // causal: the longest first
  u.begin = block * plan.block;
  u.end = u.begin + plan.block < u.sequence.queries ? u.begin + plan.block : u.sequence.queries;
  return u;
}

}  // namespace heddle
