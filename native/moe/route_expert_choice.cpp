#include "moe/route_expert_choice.h"

#include <algorithm>
#include <functional>

#include "core/workspace.h"

namespace heddle {
namespace {

// Scores are never negative, so their bits order like the numbers; the complement makes the lower token win.
inline uint64_t key_of(float score, uint32_t token) {
  return static_cast<uint64_t>(float_to_bits(score)) << 32 | (0xffffffffu - token);
}

void choose(const ExpertChoiceArgs& a, int64_t expert, uint64_t* keys) {
  const float* s = a.scores + expert * a.tokens;
  for (int64_t t = 0; t < a.tokens; ++t) keys[t] = key_of(s[t], static_cast<uint32_t>(t));
  std::nth_element(keys, keys + a.capacity, keys + a.tokens, std::greater<uint64_t>());
  std::sort(keys, keys + a.capacity, std::greater<uint64_t>());
  for (int64_t i = 0; i < a.capacity; ++i) {
    const auto token = static_cast<int32_t>(0xffffffffu - static_cast<uint32_t>(keys[i]));
    a.indices[expert * a.capacity + i] = token;
    a.weights[expert * a.capacity + i] = s[token];
  }
}

}  // namespace

Status route_expert_choice(const ExpertChoiceArgs& args, const Exec& exec) {
  ExpertChoiceArgs a = args;
  AlignedBuffer<float> scores;
  if (static_cast<uint64_t>(a.tokens) > SIZE_MAX / sizeof(float) / static_cast<uint64_t>(a.experts) ||
      !scores.reset(static_cast<size_t>(a.tokens * a.experts))) {
    return kNoMemory;
  }
  a.scores = scores.data();
  const Status status = expert_scores(a, exec);
  if (status != kOk) return status;
  std::atomic<bool> short_of_memory{false};
  const bool done = parallel_for(exec, a.experts, 1, [&](int64_t begin, int64_t end) {
    auto* keys = static_cast<uint64_t*>(Workspace::local().get(static_cast<size_t>(a.tokens) * sizeof(uint64_t)));
    if (!keys) {
      short_of_memory.store(true, std::memory_order_relaxed);
      return;
    }
    for (int64_t e = begin; e < end; ++e) choose(a, e, keys);
  });
  if (!done) return kCancelled;
  return short_of_memory.load() ? kNoMemory : kOk;
}

}  // namespace heddle
