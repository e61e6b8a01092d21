// One row of a router on the device: the counterpart of router_row-inl.h, which has the reasons.
#pragma once
#include "cuda/group.cuh"
#include "moe/route_top_k.h"

namespace heddle {

constexpr int32_t kRemoved = INT32_MIN;  // below the key of every float, -Inf included

// Order-preserving integers: a < b as floats iff key(a) < key(b); -0 equals +0.
__device__ __forceinline__ int32_t sort_key(float x) {
  const int32_t bits = __float_as_int(x + 0.0f);
  return bits ^ static_cast<int32_t>(static_cast<uint32_t>(bits >> 31) >> 1);
}

__device__ __forceinline__ float sigmoid(float x) {
  const float e = expf(-fabsf(x));
  return (x < 0.0f ? e : 1.0f) / (1.0f + e);
}
__device__ __forceinline__ float sqrt_softplus(float x) { return sqrtf(fmaxf(x, 0.0f) + log1pf(expf(-fabsf(x)))); }
__device__ __forceinline__ float apply_score(float x, RouterScore score) {
  return score == RouterScore::kSigmoid ? sigmoid(x) : sqrt_softplus(x);
}

__device__ __forceinline__ float load_logit(const void* p, DType type, int64_t i) {
  const float x = load_as_float(p, type, i);
  return x == x ? x : kNegInf;
}

// A row without a finite maximum becomes its limit: its largest logits are 0, all others -Inf.
struct RowLimit {
  float raw;     // the largest logit that exists
  float top;     // the same after the limit; finite
  bool limited;  // raw is infinite
  __device__ __forceinline__ explicit RowLimit(float m) : raw(m), limited(!(m > kNegInf && m < HUGE_VALF)) {
    top = limited ? 0.0f : m;
  }
  __device__ __forceinline__ float apply(float x, bool exists) const {
    if (!exists) return kNegInf;
    return limited ? (x == raw ? 0.0f : kNegInf) : x;
  }
};

__host__ __device__ __forceinline__ bool needs_full_softmax(const RouterOptions& o) {
  return o.score == RouterScore::kSoftmax && !o.over_selected && !(o.normalize && o.epsilon == 0.0f && o.floor == 0.0f);
}

__device__ __forceinline__ float weight_divisor(const RouterOptions& o, bool full, float sum) {
  if (o.score == RouterScore::kSoftmax && !full) return sum;
  if (!o.normalize) return 1.0f;
  sum += o.epsilon;
  return sum < o.floor ? o.floor : sum;
}

// Weights of the k selected experts: logit(j) is their logit as RowLimit left it, -Inf beside an id of -1.
template <int Threads, class Logit>
__device__ __forceinline__ void selected_weights(const Group<Threads>& group, const RouterOptions& o, float top,
                                                 float full_sum, const int32_t* ids, int32_t k, const Logit& logit,
                                                 float* weights) {
  const bool full = needs_full_softmax(o);
  bool uniform = false;  // only -Inf selected: equal weights for the valid ones
  if (o.score == RouterScore::kSoftmax && !full) {
    float largest = kNegInf;
    for (int32_t j = group.rank; j < k; j += Threads) largest = fmaxf(largest, logit(j));
    top = group.largest(largest);
    uniform = top == kNegInf;
    if (uniform) top = 0.0f;
  }
  auto score = [&](int32_t j) {
    const float x = uniform ? (ids[j] < 0 ? kNegInf : 0.0f) : logit(j);
    if (o.score != RouterScore::kSoftmax) return apply_score(x, o.score);
    const float e = expf(x - top);
    return full ? e / full_sum : e;
  };
  float sum = 0.0f;
  bool vanished = false;
  if (o.normalize || (o.score == RouterScore::kSoftmax && !full)) {
    for (int32_t j = group.rank; j < k; j += Threads) sum += score(j);
    sum = group.sum(sum);
    vanished = sum <= 0.0f && o.normalize && o.score != RouterScore::kSoftmax && o.epsilon == 0.0f && o.floor == 0.0f;
  }
  float largest = kNegInf;
  const float slope = o.score == RouterScore::kSigmoid ? 1.0f : 0.5f;
  if (vanished) {
    for (int32_t j = group.rank; j < k; j += Threads) largest = fmaxf(largest, logit(j));
    largest = group.largest(largest);
    float again = 0.0f;
    if (largest > kNegInf) {
      for (int32_t j = group.rank; j < k; j += Threads) again += expf((logit(j) - largest) * slope);
    }
    sum = group.sum(again);
  }
  const float divisor = weight_divisor(o, full, sum);
  for (int32_t j = group.rank; j < k; j += Threads) {
    float s = vanished ? (largest > kNegInf ? expf((logit(j) - largest) * slope) : 0.0f) : score(j);
    if (divisor <= 0.0f) s = 0.0f;
    else if (divisor != 1.0f) s = s / divisor;
    weights[j] = s * o.scale;
  }
}

}  // namespace heddle
