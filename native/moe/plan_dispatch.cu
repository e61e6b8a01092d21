// planDispatch on the device; definition in plan_dispatch.h.
//
// A counting sort in four steps: a histogram per chunk of routes, a prefix over each expert's chunks (a warp an
// expert), a prefix over the experts, a stable scatter (a warp walks its chunk; equal experts within 32 routes are
// ranked by __match_any). `position` drops by rank while scattering. The other rules scatter everything first; then
// a block per expert finds the last route that stays by radix selection on a total order of 96 bits and compacts.
// Integer counters only: the plan does not depend on scheduling.
#include "moe/plan_dispatch.h"

#include "cuda/job.h"
#include "cuda/warp.cuh"
#include "moe/router_row.cuh"

namespace heddle {
namespace {

constexpr int kThreads = 256;
constexpr int32_t kDropped = -2;  // in `inverse`, until the dropped routes are listed

struct Plan {
  PlanDispatchArgs a;
  int64_t routes;
  int32_t chunk, chunks;
  int32_t* before;       // [experts, chunks]: routes of the expert in a chunk, then in all chunks before it
  int32_t* all_offsets;  // [experts + 1]: places before any drop
  int32_t* all;          // [routes]: routes by expert before any drop, for rules that select
  float* priority;       // [tokens]
  int32_t* lost;         // [chunks]: routes dropped in a chunk
  unsigned long long* bad;

  // The local expert of route i, -1 when it is masked; ids out of range count as masked.
  __device__ int32_t local(int64_t i) const {
    const int32_t id = a.indices[i];
    if (id < 0 || id >= a.global_experts) return -1;
    return a.expert_map ? a.expert_map[id] : id;
  }
};

__global__ void __launch_bounds__(kThreads) count_kernel(Plan p) {
  HEDDLE_DYNAMIC_SHARED(int32_t, histogram);
  for (int32_t e = static_cast<int32_t>(threadIdx.x); e < p.a.experts; e += kThreads) histogram[e] = 0;
  __syncthreads();
  const int64_t begin = int64_t{blockIdx.x} * p.chunk;
  const int64_t end = begin + p.chunk < p.routes ? begin + p.chunk : p.routes;
  for (int64_t i = begin + threadIdx.x; i < end; i += kThreads) {
    const int32_t id = p.a.indices[i];
    if (id < -1 || id >= p.a.global_experts) report_bad_value(p.bad, i);
    const int32_t e = p.local(i);
    if (e >= 0) atomicAdd(&histogram[e], 1);
  }
  __syncthreads();
  for (int32_t e = static_cast<int32_t>(threadIdx.x); e < p.a.experts; e += kThreads) {
    p.before[int64_t{e} * p.chunks + blockIdx.x] = histogram[e];
  }
}

// A warp per expert: exclusive prefix over its chunks, total into all_offsets[e].
__global__ void __launch_bounds__(kThreads) prefix_kernel(Plan p) {
  const int32_t e = static_cast<int32_t>(blockIdx.x * (kThreads / kWarp) + threadIdx.x / kWarp);
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  if (e >= p.a.experts) return;
  int32_t* row = p.before + int64_t{e} * p.chunks;
  int32_t total = 0;
  for (int32_t begin = 0; begin < p.chunks; begin += kWarp) {
    const bool inside = begin + lane < p.chunks;
    const int32_t n = inside ? row[begin + lane] : 0;
    const int32_t through = warp_scan(n);
    if (inside) row[begin + lane] = total + through - n;
    total += __shfl_sync(kFullMask, through, kWarp - 1);
  }
  if (lane == 0) p.all_offsets[e] = total;
}

// One block: offsets of the experts, before and after the drop.
__global__ void __launch_bounds__(kThreads) offsets_kernel(Plan p) {
  __shared__ int32_t words[kThreads / kWarp];
  int32_t all = 0, kept = 0;
  for (int32_t begin = 0; begin < p.a.experts; begin += kThreads) {
    const int32_t e = begin + static_cast<int32_t>(threadIdx.x);
    const int32_t n = e < p.a.experts ? p.all_offsets[e] : 0;
    const int32_t m = p.a.capacity >= 0 && n > p.a.capacity ? static_cast<int32_t>(p.a.capacity) : n;
    int32_t all_total, kept_total;
    const int32_t all_through = block_scan<kThreads>(n, words, &all_total);
    const int32_t kept_through = block_scan<kThreads>(m, words, &kept_total);
    if (e < p.a.experts) {
      p.all_offsets[e] = all + all_through - n;
      p.a.offsets[e] = kept + kept_through - m;
    }
    all += all_total;
    kept += kept_total;
  }
  if (threadIdx.x == 0) {
    p.all_offsets[p.a.experts] = all;
    p.a.offsets[p.a.experts] = kept;
    p.a.counts[0] = all - kept;
    p.a.counts[1] = kept;
  }
}

// A warp per chunk, 32 routes at a time, so that places ascend with the routes.
__global__ void __launch_bounds__(kWarp) scatter_kernel(Plan p) {
  HEDDLE_DYNAMIC_SHARED(int32_t, next);  // rank of the next route of each expert, among all of the expert's
  const int lane = static_cast<int>(threadIdx.x);
  for (int32_t e = lane; e < p.a.experts; e += kWarp) next[e] = p.before[int64_t{e} * p.chunks + blockIdx.x];
  __syncwarp();
  const int64_t begin = int64_t{blockIdx.x} * p.chunk;
  for (int64_t base = begin; base < begin + p.chunk && base < p.routes; base += kWarp) {
    const int64_t i = base + lane;
    const int32_t e = i < p.routes ? p.local(i) : -1;
    const unsigned peers = __match_any_sync(kFullMask, e);
    const int32_t earlier = __popc(peers & ((1u << lane) - 1u));
    const int32_t rank = e >= 0 ? next[e] + earlier : 0;
    __syncwarp();
    if (e >= 0 && earlier == 0) next[e] = rank + __popc(peers);
    __syncwarp();
    if (i >= p.routes) continue;
    if (e < 0) {
      p.a.inverse[i] = -1;
    } else if (p.all) {
      p.all[p.all_offsets[e] + rank] = static_cast<int32_t>(i);
    } else if (p.a.capacity >= 0 && rank >= p.a.capacity) {
      p.a.inverse[i] = kDropped;
    } else {
      const int32_t at = p.a.offsets[e] + rank;
      p.a.order[at] = static_cast<int32_t>(i);
      p.a.inverse[i] = at;
    }
  }
}

__device__ __forceinline__ float rank_of(float w) { return w == w ? w : kNegInf; }

__global__ void __launch_bounds__(kThreads) priority_kernel(Plan p) {
  const int64_t t = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  if (t >= p.a.tokens) return;
  float top = kNegInf;
  for (int64_t i = t * p.a.k; i < (t + 1) * p.a.k; ++i) top = fmaxf(top, rank_of(p.a.weights[i]));
  p.priority[t] = top;
}

// The place of a route in the order of its rule, as 96 bits: smaller stays. word 2 is the highest.
struct Key {
  uint32_t word[3];
};
__device__ __forceinline__ uint32_t descending(float w) {
  return ~(static_cast<uint32_t>(sort_key(w)) ^ 0x80000000u);
}
__device__ __forceinline__ Key key_of(const Plan& p, int32_t route) {
  Key key{{static_cast<uint32_t>(route), 0u, 0u}};
  if (p.a.drop == DropRule::kWeight) {
    key.word[1] = descending(rank_of(p.a.weights[route]));
  } else {
    key.word[2] = static_cast<uint32_t>(route % p.a.k);
    if (p.priority) key.word[1] = descending(p.priority[route / p.a.k]);
  }
  return key;
}
__device__ __forceinline__ bool not_after(const Key& x, const Key& y) {
  if (x.word[2] != y.word[2]) return x.word[2] < y.word[2];
  if (x.word[1] != y.word[1]) return x.word[1] < y.word[1];
  return x.word[0] <= y.word[0];
}

// The key of rank `rank` (from 0) among one expert's routes, a byte at a time from the highest.
__device__ __forceinline__ Key select_rank(const Plan& p, const int32_t* routes, int32_t n, int32_t rank,
                                           int32_t* bins, int32_t* chosen) {
  Key key{{0u, 0u, 0u}};
  for (int digit = 11; digit >= 0; --digit) {
    const int word = digit / 4, shift = digit % 4 * 8;
    for (int b = static_cast<int>(threadIdx.x); b < 256; b += kThreads) bins[b] = 0;
    __syncthreads();
    for (int32_t i = static_cast<int32_t>(threadIdx.x); i < n; i += kThreads) {
      const Key x = key_of(p, routes[i]);
      bool same = true;  // in all bytes above this one
#pragma unroll
      for (int w = 0; w < 3; ++w) {
        if (w > word) same = same && x.word[w] == key.word[w];
        if (w == word && shift < 24) same = same && x.word[w] >> (shift + 8) == key.word[w] >> (shift + 8);
      }
      const uint32_t value = word == 2 ? x.word[2] : word == 1 ? x.word[1] : x.word[0];
      if (same) atomicAdd(&bins[value >> shift & 255u], 1);
    }
    __syncthreads();
    if (threadIdx.x == 0) {
      int32_t below = 0;
      int b = 0;
      while (below + bins[b] <= rank) below += bins[b++];
      chosen[0] = b;
      chosen[1] = below;
    }
    __syncthreads();
    const uint32_t byte = static_cast<uint32_t>(chosen[0]) << shift;
#pragma unroll
    for (int w = 0; w < 3; ++w) key.word[w] |= w == word ? byte : 0u;
    rank -= chosen[1];
    __syncthreads();
  }
  return key;
}

// A block per expert: keeps the first `capacity` of its routes in the order of the rule, ascending.
__global__ void __launch_bounds__(kThreads) keep_kernel(Plan p) {
  __shared__ int32_t bins[256];
  __shared__ int32_t chosen[2];
  __shared__ int32_t words[kThreads / kWarp];
  const auto e = static_cast<int32_t>(blockIdx.x);
  const int32_t* routes = p.all + p.all_offsets[e];
  const int32_t n = p.all_offsets[e + 1] - p.all_offsets[e];
  const bool over = n > p.a.capacity;
  Key last{{~0u, ~0u, ~0u}};
  if (over && p.a.capacity > 0) last = select_rank(p, routes, n, static_cast<int32_t>(p.a.capacity) - 1, bins, chosen);
  int32_t at = p.a.offsets[e];
  for (int32_t begin = 0; begin < n; begin += kThreads) {
    const int32_t i = begin + static_cast<int32_t>(threadIdx.x);
    const bool keep = i < n && (!over || (p.a.capacity > 0 && not_after(key_of(p, routes[i]), last)));
    int32_t total;
    const int32_t through = block_scan<kThreads>(static_cast<int32_t>(keep), words, &total);
    if (keep) {
      p.a.order[at + through - 1] = routes[i];
      p.a.inverse[routes[i]] = at + through - 1;
    } else if (i < n) {
      p.a.inverse[routes[i]] = kDropped;
    }
    at += total;
  }
}

__global__ void __launch_bounds__(kThreads) count_dropped_kernel(Plan p) {
  __shared__ int32_t words[kThreads / kWarp];
  const int64_t begin = int64_t{blockIdx.x} * p.chunk;
  const int64_t end = begin + p.chunk < p.routes ? begin + p.chunk : p.routes;
  int32_t n = 0;
  for (int64_t i = begin + threadIdx.x; i < end; i += kThreads) n += p.a.inverse[i] == kDropped;
  n = block_sum<kThreads>(n, words);
  if (threadIdx.x == 0) p.lost[blockIdx.x] = n;
}

__global__ void __launch_bounds__(kThreads) list_dropped_kernel(Plan p) {
  __shared__ int32_t words[kThreads / kWarp];
  int32_t at = 0;
  for (unsigned c = threadIdx.x; c < blockIdx.x; c += kThreads) at += p.lost[c];
  at = block_sum<kThreads>(at, words);
  const int64_t begin = int64_t{blockIdx.x} * p.chunk;
  const int64_t end = begin + p.chunk < p.routes ? begin + p.chunk : p.routes;
  for (int64_t base = begin; base < end; base += kThreads) {
    const int64_t i = base + threadIdx.x;
    const bool dropped = i < end && p.a.inverse[i] == kDropped;
    int32_t total;
    const int32_t through = block_scan<kThreads>(static_cast<int32_t>(dropped), words, &total);
    if (dropped) {
      p.a.dropped[at + through - 1] = static_cast<int32_t>(i);
      p.a.inverse[i] = -1;
    }
    at += total;
  }
}

}  // namespace

HEDDLE_CUDA_OP(plan_dispatch, PlanDispatchArgs) {
  Plan p{};
  p.a = a;
  p.routes = a.tokens * a.k;
  p.chunk = a.experts > 1024 ? 4096 : 1024;
  p.chunks = static_cast<int32_t>(ceil_div(p.routes, p.chunk));
  const bool limited = a.capacity >= 0;
  const bool selects = limited && a.drop != DropRule::kPosition;
  p.bad = job.status();
  p.before = job.scratch<int32_t>(int64_t{a.experts} * p.chunks);
  p.all_offsets = job.scratch<int32_t>(a.experts + 1);
  if (selects) p.all = job.scratch<int32_t>(p.routes);
  if (limited) p.lost = job.scratch<int32_t>(p.chunks);
  if (a.drop == DropRule::kBatchPriority) p.priority = job.scratch<float>(a.tokens);
  if (job.no_memory) return kNoMemory;

  const auto chunks = static_cast<unsigned>(p.chunks);
  const int64_t counters = int64_t{a.experts} * 4;
  if (chunks > 0) HEDDLE_LAUNCH(count_kernel, dim3(chunks), dim3(kThreads), counters, job.stream, p);
  HEDDLE_LAUNCH(prefix_kernel, dim3(static_cast<unsigned>(ceil_div(a.experts, kThreads / kWarp))), dim3(kThreads), 0,
                job.stream, p);
  HEDDLE_LAUNCH(offsets_kernel, dim3(1), dim3(kThreads), 0, job.stream, p);
  if (chunks > 0) {
    HEDDLE_LAUNCH(scatter_kernel, dim3(chunks), dim3(kWarp), counters, job.stream, p);
    if (p.priority) {
      HEDDLE_LAUNCH(priority_kernel, dim3(static_cast<unsigned>(ceil_div(a.tokens, kThreads))), dim3(kThreads), 0,
                    job.stream, p);
    }
    if (selects) HEDDLE_LAUNCH(keep_kernel, dim3(static_cast<unsigned>(a.experts)), dim3(kThreads), 0, job.stream, p);
    if (limited) {
      HEDDLE_LAUNCH(count_dropped_kernel, dim3(chunks), dim3(kThreads), 0, job.stream, p);
      HEDDLE_LAUNCH(list_dropped_kernel, dim3(chunks), dim3(kThreads), 0, job.stream, p);
    }
  }
  return job.launched();
}

}  // namespace heddle
