// The one place where an attention op meets the instruction set chosen at run time; planning and scratch.
#include <algorithm>
#include <new>
#include <thread>

#include "attention/attention.h"
#include "attention/attention_backward.h"
#include "attention/rotary_embedding.h"

namespace heddle {

HEDDLE_DEFINE_OP(attention_units, AttentionArgs)
HEDDLE_DEFINE_OP(attention_backward_units, AttentionBackwardArgs)
HEDDLE_DEFINE_OP(rotary_embedding, RotaryEmbeddingArgs)

Status attention(const AttentionArgs& args, const Exec& exec) {
  AttentionPlan plan;
  if (!make_plan(args.problem, exec.threads, &plan)) return kNoMemory;
  AttentionArgs planned = args;
  planned.plan = &plan;
  return attention_units(planned, exec);
}

PanelProgress::~PanelProgress() { delete[] done_; }

bool PanelProgress::reset(int64_t panels) {
  delete[] done_;
  done_ = new (std::nothrow) std::atomic<int64_t>[static_cast<size_t>(panels)];
  for (int64_t i = 0; done_ && i < panels; ++i) done_[i].store(0, std::memory_order_relaxed);
  return done_ != nullptr;
}

void PanelProgress::set(int64_t panel, int64_t blocks) { done_[panel].store(blocks, std::memory_order_release); }

bool PanelProgress::wait(int64_t panel, int64_t blocks, const Exec& exec) const {
  for (int spins = 0; done_[panel].load(std::memory_order_acquire) < blocks; ++spins) {
    if (exec.cancelled()) return false;
    if (spins > 64) std::this_thread::yield();
  }
  return true;
}

Status attention_backward(const AttentionBackwardArgs& args, const Exec& exec) {
  const AttentionProblem& p = args.problem;
  BackwardPlan plan;
  plan.join_batch = args.bias_grad && ((p.batch > 1 && p.bias_stride[0] == 0) || (p.inner > 1 && p.inner_stride.bias == 0));
  plan.join_heads = args.bias_grad && p.key_heads > 1 && p.bias_stride[1] == 0;
  const int64_t units = p.sequences() * p.key_heads;
  if (exec.threads > 1 && units < 4 * exec.threads && !plan.join_batch && !plan.join_heads) {
    int64_t keys = 0;
    for (int64_t i = 0; i < p.sequences(); ++i) {
      const Sequence s = sequence_of(p, i);
      const int64_t floats = (backward_row_floats(p, s.queries * p.group(), s.keys) + 15) / 16 * 16;
      if (floats > plan.unit_floats) plan.unit_floats = floats;
      if (s.keys > keys) keys = s.keys;
    }
    const int panel = backward_panel_keys(p.head_dim, p.value_dim);
    const int64_t panels = (keys + panel - 1) / panel;
    // Without the memory, a unit is one thread's.
    if (panels > 1 && plan.rows.reset(static_cast<size_t>(units * plan.unit_floats)) && plan.progress.reset(units * panels)) {
      plan.panels = panels;
    }
  }
  AttentionBackwardArgs planned = args;
  planned.plan = &plan;
  return attention_backward_units(planned, exec);
}

void Failure::set() { failed_.store(1, std::memory_order_relaxed); }
bool Failure::get() const { return failed_.load(std::memory_order_relaxed) != 0; }

void* attention_scratch(int64_t bytes) { return Workspace::local().get(static_cast<size_t>(bytes)); }

bool make_plan(const AttentionProblem& p, int threads, AttentionPlan* plan) {
  const int64_t sequences = p.sequences(), group = p.group();
  if (group == 0) return true;
  // Packed q and the sums of a unit take half of L2 (512 KiB to 1 MiB), which they share with a key panel. Many rows pay:
  // every unit packs all keys that it sees.
  const int64_t room = std::clamp<int64_t>(cpu_features().l2_bytes / 2, 512 << 10, 1 << 20);
  int64_t rows = room / (4 * (p.head_dim + p.value_dim));
  if (rows > 2048) rows = 2048;
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
  u.key_head = at % p.key_heads;
  const int64_t block = blocks - 1 - at / p.key_heads;  // causal: the longest first
  u.begin = block * plan.block;
  u.end = u.begin + plan.block < u.sequence.queries ? u.begin + plan.block : u.sequence.queries;
  return u;
}

}  // namespace heddle
