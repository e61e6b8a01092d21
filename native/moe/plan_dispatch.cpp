#include "moe/plan_dispatch.h"

#include <algorithm>
#include <cmath>

#include "core/workspace.h"

namespace heddle {
namespace {

constexpr int32_t kDropped = -2;  // in `inverse`, until the dropped routes are listed

inline float rank_of(float w) { return w == w ? w : -HUGE_VALF; }

// A total order on the routes of one expert: those that stay come first.
struct Before {
  DropRule rule;
  int32_t k;
  const float* weights;
  const float* priority;  // [tokens]

  bool operator()(int32_t x, int32_t y) const {
    if (rule == DropRule::kWeight) {
      const float a = rank_of(weights[x]), b = rank_of(weights[y]);
      return a != b ? a > b : x < y;
    }
    const int32_t slot_x = x % k, slot_y = y % k;
    if (slot_x != slot_y) return slot_x < slot_y;
    if (rule == DropRule::kBatchPriority) {
      const float a = priority[x / k], b = priority[y / k];
      if (a != b) return a > b;
    }
    return x < y;
  }
};

struct Chunks {
  const PlanDispatchArgs& a;
  int64_t routes, size, count;

  explicit Chunks(const PlanDispatchArgs& args) : a(args), routes(args.tokens * args.k) {
    // A histogram of `experts` counters must be small beside the routes that it counts.
    size = std::max<int64_t>(8192, 8 * static_cast<int64_t>(args.experts));
    count = (routes + size - 1) / size;
  }
  int32_t local(int64_t i) const {
    const int32_t id = a.indices[i];
    return id < 0 ? -1 : a.expert_map ? a.expert_map[id] : id;
  }
};

// Counts each chunk's routes per expert; returns 1 + the first route whose id is out of range, or 0.
int64_t count_chunk(const Chunks& c, int64_t chunk, int32_t* histogram) {
  std::fill_n(histogram, c.a.experts, 0);
  const int64_t end = std::min(c.routes, (chunk + 1) * c.size);
  for (int64_t i = chunk * c.size; i < end; ++i) {
    const int32_t id = c.a.indices[i];
    if (id < -1 || id >= c.a.global_experts) return bad_value(i);
    const int32_t e = c.local(i);
    if (e >= 0) ++histogram[e];
  }
  return kOk;
}

void scatter_chunk(const Chunks& c, int64_t chunk, int32_t* next, int32_t* order) {
  const int64_t end = std::min(c.routes, (chunk + 1) * c.size);
  for (int64_t i = chunk * c.size; i < end; ++i) {
    const int32_t e = c.local(i);
    if (e < 0) {
      c.a.inverse[i] = -1;
      continue;
    }
    const int32_t at = next[e]++;
    order[at] = static_cast<int32_t>(i);
    c.a.inverse[i] = at;
  }
}

// Keeps the first `capacity` of one expert's routes (ascending in `all`) and moves them to `order`.
void keep_best(const PlanDispatchArgs& a, const Before& before, int32_t* all, int64_t n, int32_t at) {
  const int64_t kept = std::min(n, a.capacity);
  if (kept < n && a.drop != DropRule::kPosition) {
    std::nth_element(all, all + kept, all + n, before);
    std::sort(all, all + kept);
  }
  for (int64_t i = 0; i < kept; ++i) {
    a.order[at + i] = all[i];
    a.inverse[all[i]] = static_cast<int32_t>(at + i);
  }
  for (int64_t i = kept; i < n; ++i) a.inverse[all[i]] = kDropped;
}

}  // namespace

Status plan_dispatch(const PlanDispatchArgs& a, const Exec& exec) {
  const Chunks c(a);
  const int64_t experts = a.experts;
  AlignedBuffer<int32_t> next(static_cast<size_t>(c.count * experts));
  AlignedBuffer<int64_t> invalid(static_cast<size_t>(c.count));
  AlignedBuffer<int32_t> all_offsets(static_cast<size_t>(experts + 1));
  if (!next || !invalid || !all_offsets) return kNoMemory;
  bool done = parallel_for(exec, c.count, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) invalid[i] = count_chunk(c, i, next.data() + i * experts);
  });
  if (!done) return kCancelled;
  for (int64_t i = 0; i < c.count; ++i) {
    if (invalid[i] != kOk) return invalid[i];
  }

  int32_t total = 0, kept = 0;
  bool over = false;
  for (int64_t e = 0; e < experts; ++e) {
    all_offsets[e] = total;
    a.offsets[e] = kept;
    for (int64_t i = 0; i < c.count; ++i) {
      const int32_t n = next[i * experts + e];
      next[i * experts + e] = total;
      total += n;
    }
    const int32_t n = total - all_offsets[e];
    const bool limited = a.capacity >= 0 && n > a.capacity;
    kept += limited ? static_cast<int32_t>(a.capacity) : n;
    over = over || limited;
  }
  all_offsets[experts] = total;
  a.offsets[experts] = kept;
  a.counts[0] = total - kept;
  a.counts[1] = kept;

  AlignedBuffer<int32_t> all;
  if (over && !all.reset(static_cast<size_t>(total))) return kNoMemory;
  int32_t* order = over ? all.data() : a.order;
  done = parallel_for(exec, c.count, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) scatter_chunk(c, i, next.data() + i * experts, order);
  });
  if (!done) return kCancelled;
  if (!over) return kOk;

  AlignedBuffer<float> priority;
  if (a.drop == DropRule::kBatchPriority) {
    if (!priority.reset(static_cast<size_t>(a.tokens))) return kNoMemory;
    for (int64_t t = 0; t < a.tokens; ++t) {
      float top = -HUGE_VALF;
      for (int64_t i = t * a.k; i < (t + 1) * a.k; ++i) top = std::max(top, rank_of(a.weights[i]));
      priority[t] = top;
    }
  }
  const Before before{a.drop, a.k, a.weights, priority.data()};
  done = parallel_for(exec, experts, 1, [&](int64_t begin, int64_t end) {
    for (int64_t e = begin; e < end; ++e) {
      keep_best(a, before, order + all_offsets[e], all_offsets[e + 1] - all_offsets[e], a.offsets[e]);
    }
  });
  if (!done) return kCancelled;
  int32_t n = 0;
  for (int64_t i = 0; i < c.routes; ++i) {
    if (a.inverse[i] != kDropped) continue;
    a.inverse[i] = -1;
    a.dropped[n++] = static_cast<int32_t>(i);
  }
  return kOk;
}

}  // namespace heddle
