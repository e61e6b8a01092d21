// routeTopK on the device; definition and promises in route_top_k.h.
//
// A warp takes a row of up to 512 experts, its logits and keys in registers (expert e = 32 i + lane in register i of
// the lane): one pass over the logits, k rounds of two warp reductions. Longer rows take a block of 256 threads with
// the same code. Group scores go through shared memory. Bound by reading the logits for k up to about 8, by the
// rounds beyond.
#include "moe/router_row.cuh"
#include "cuda/job.h"

namespace heddle {
namespace {

constexpr int kWarpsPerBlock = 4;

// 32-bit words of shared memory of one row: reductions, selected ids, and with groups c and the groups' scores.
template <int Threads>
__host__ __device__ constexpr int64_t row_words(const RouteTopKArgs& a) {
  const bool grouped = a.group_count > 1 && a.group_keep < a.group_count;
  return Group<Threads>::kWords + a.k + (grouped ? int64_t{a.experts} + 2 * int64_t{a.group_count} : 0);
}

// Marks the keys of the groups that are not among the best group_keep (ties to the lower group) as removed.
template <int Threads, int N>
__device__ __forceinline__ void limit_groups(const Group<Threads>& group, const RouteTopKArgs& a, const float (&c)[N],
                                             int32_t (&keys)[N], float* choice) {
  const int32_t size = a.experts / a.group_count;
  float* scores = choice + a.experts;
  auto* kept = reinterpret_cast<int32_t*>(scores + a.group_count);
#pragma unroll
  for (int i = 0; i < N; ++i) {
    const int32_t e = i * Threads + group.rank;
    if (e < a.experts) choice[e] = keys[i] == kRemoved ? kNegInf : c[i];
  }
  group.sync();
  for (int32_t g = group.rank; g < a.group_count; g += Threads) {
    float first = kNegInf, second = kNegInf;
    for (int32_t i = 0; i < size; ++i) {
      // Each thread starts elsewhere in its group: equal offsets would share a bank.
      const float v = choice[g * size + (i + g) % size];
      second = fmaxf(second, fminf(first, v));
      first = fmaxf(first, v);
    }
    scores[g] = a.group_top2 ? first + second : first;
  }
  group.sync();
  for (int32_t g = group.rank; g < a.group_count; g += Threads) {
    int32_t better = 0;
    for (int32_t h = 0; h < a.group_count; ++h) better += scores[h] > scores[g] || (scores[h] == scores[g] && h < g);
    kept[g] = better < a.group_keep;
  }
  group.sync();
#pragma unroll
  for (int i = 0; i < N; ++i) {
    const int32_t e = i * Threads + group.rank;
    if (e < a.experts && !kept[e / size]) keys[i] = kRemoved;
  }
}

// The k largest keys, ties to the lower id, into ids (shared memory); -1 when none is left.
template <int Threads, int N>
__device__ __forceinline__ void select_top_k(const Group<Threads>& group, int32_t (&keys)[N], int32_t k, int32_t* ids) {
  for (int32_t j = 0; j < k; ++j) {
    int32_t best = keys[0], at = group.rank;
#pragma unroll
    for (int i = 1; i < N; ++i) {
      if (keys[i] > best) {
        best = keys[i];
        at = i * Threads + group.rank;
      }
    }
    const int32_t top = group.largest(best);
    const int32_t id = group.smallest(best == top ? at : INT32_MAX);
#pragma unroll
    for (int i = 0; i < N; ++i) {
      if (i * Threads + group.rank == id) keys[i] = kRemoved;
    }
    if (group.rank == 0) ids[j] = top == kRemoved ? -1 : id;
  }
}

// Blocks a multiprocessor should hold: leaves the registers that each size needs without spilling.
constexpr int min_blocks(int threads, int n) { return threads > kWarp ? 2 : n <= 4 ? 8 : n == 8 ? 6 : 4; }

template <int Threads, int N>
__global__ void __launch_bounds__(Threads == kWarp ? kWarpsPerBlock * kWarp : Threads, min_blocks(Threads, N))
    route_kernel(RouteTopKArgs a, unsigned long long* bad) {
  HEDDLE_DYNAMIC_SHARED(uint32_t, shared);
  const int slot = static_cast<int>(threadIdx.x) / Threads;
  const int64_t row = int64_t{blockIdx.x} * (blockDim.x / Threads) + slot;
  if (row >= a.tokens) return;  // a whole group: a block's rows share no barrier
  uint32_t* words = shared + slot * row_words<Threads>(a);
  const Group<Threads> group(words);
  auto* ids = reinterpret_cast<int32_t*>(words + Group<Threads>::kWords);
  auto* choice = reinterpret_cast<float*>(ids + a.k);
  const uint8_t* mask = a.mask ? a.mask + row * a.mask_stride : nullptr;
  const int64_t base = row * a.experts;

  float l[N];
  float largest = kNegInf;
#pragma unroll
  for (int i = 0; i < N; ++i) {
    const int32_t e = i * Threads + group.rank;
    l[i] = e < a.experts && !(mask && !mask[e]) ? load_logit(a.logits, a.type, base + e) : kNegInf;
    largest = fmaxf(largest, l[i]);
  }
  const RowLimit limit(group.largest(largest));
  int32_t keys[N];
#pragma unroll
  for (int i = 0; i < N; ++i) {
    const int32_t e = i * Threads + group.rank;
    const bool exists = e < a.experts && !(mask && !mask[e]);
    l[i] = limit.apply(l[i], exists);
    keys[i] = exists ? 0 : kRemoved;
  }

  const RouterOptions& o = a.router;
  const bool scored = !a.given && !o.over_selected && (a.selection_bias || a.group_top2);
  float full_sum = 1.0f;
  if (needs_full_softmax(o) || (scored && o.score == RouterScore::kSoftmax)) {
    float sum = 0.0f;
#pragma unroll
    for (int i = 0; i < N; ++i) sum += expf(l[i] - limit.top);
    full_sum = group.sum(sum);
  }

  if (a.given) {
    for (int32_t j = group.rank; j < a.k; j += Threads) {
      const int32_t id = a.given[row * a.k + j];
      const bool valid = id >= -1 && id < a.experts;
      if (!valid) report_bad_value(bad, row * a.k + j);
      ids[j] = valid ? id : -1;
    }
  } else {
    float c[N];
#pragma unroll
    for (int i = 0; i < N; ++i) {
      const int32_t e = i * Threads + group.rank;
      c[i] = !scored                            ? l[i]
             : o.score == RouterScore::kSoftmax ? expf(l[i] - limit.top) / full_sum
                                                : apply_score(l[i], o.score);
      if (a.selection_bias && e < a.experts) {
        c[i] += a.selection_bias[e];
        if (c[i] != c[i]) c[i] = kNegInf;
      }
      if (keys[i] != kRemoved) keys[i] = sort_key(c[i]);
    }
    if (a.group_count > 1 && a.group_keep < a.group_count) limit_groups(group, a, c, keys, choice);
    select_top_k(group, keys, a.k, ids);
  }
  group.sync();

  for (int32_t j = group.rank; j < a.k; j += Threads) a.indices[row * a.k + j] = ids[j];
  auto logit = [&](int32_t j) {
    return ids[j] < 0 ? kNegInf : limit.apply(load_logit(a.logits, a.type, base + ids[j]), true);
  };
  selected_weights(group, o, limit.top, full_sum, ids, a.k, logit, a.weights + row * a.k);
}

template <int Threads, int N>
int64_t launch(const RouteTopKArgs& a, heddle_cuda_job& job, unsigned long long* bad) {
  const int rows = Threads == kWarp ? kWarpsPerBlock : 1;
  const int64_t bytes = rows * row_words<Threads>(a) * 4;
  HEDDLE_ALLOW_SHARED((route_kernel<Threads, N>), bytes);
  HEDDLE_LAUNCH((route_kernel<Threads, N>), dim3(static_cast<unsigned>(ceil_div(a.tokens, rows))),
                dim3(static_cast<unsigned>(rows * Threads)), bytes, job.stream, a, bad);
  return job.launched();
}

}  // namespace

HEDDLE_CUDA_OP(route_top_k, RouteTopKArgs) {
  if (a.tokens == 0) return kOk;
  unsigned long long* bad = nullptr;
  if (a.given && !(bad = job.status())) return kNoMemory;
  if (a.experts <= 32) return launch<kWarp, 1>(a, job, bad);
  if (a.experts <= 64) return launch<kWarp, 2>(a, job, bad);
  if (a.experts <= 128) return launch<kWarp, 4>(a, job, bad);
  if (a.experts <= 256) return launch<kWarp, 8>(a, job, bad);
  if (a.experts <= 512) return launch<kWarp, 16>(a, job, bad);
  return launch<256, 16>(a, job, bad);
}

}  // namespace heddle
