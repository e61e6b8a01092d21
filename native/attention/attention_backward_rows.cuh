// What the kernels of attention's backward share on the device: rows, their terms, and the gradients of one pair.
#pragma once
#include "attention/attention_backward.h"
#include "attention/attention_rows.cuh"

namespace heddle {

// What a kernel computes. It owns queries and streams keys, or owns keys and streams queries.
enum class BackwardPart { kQuery, kKey, kValue, kKeyValue };

// What the pre-pass keeps of a row, for weight = 2^(logit - shift) in units of ln 2: the log-sum-exp, and the sum of
// upstream times output. Rows without a visible key have the shift +Inf, or -Inf where they are the mean of the values:
// delta is then the weight of each.
struct RowTerms {
  float shift, delta;
};
__host__ inline int64_t terms_count(const AttentionProblem& p) {
  return (p.query_offsets ? p.queries : p.sequences() * p.queries) * p.query_heads;
}
__device__ inline int64_t terms_at(const AttentionProblem& p, const Sequence& s, int64_t position, int64_t head) {
  const int64_t begin = p.query_offsets ? s.query_begin : (s.batch * p.inner + s.inner) * p.queries;
  return (begin + position) * p.query_heads + head;
}

// One row as the pairs see it; head -1: there is no such row.
struct alignas(8) GradRow {
  float shift, delta;
  int32_t position, head, lo, hi;
};
__device__ inline GradRow no_row() { return {-kNegInf, 0.0f, 0, -1, 0, 0}; }
__device__ inline GradRow grad_row(const AttentionProblem& p, const RowTerms& t, const Sequence& s, int64_t position,
                                   int64_t head) {
  const KeyRange range = key_range(p, s, position);
  return {t.shift,
          t.delta,
          static_cast<int32_t>(position),
          static_cast<int32_t>(head),
          static_cast<int32_t>(range.lo),
          static_cast<int32_t>(range.hi)};
}
__device__ inline GradRow grad_row(const AttentionProblem& p, const RowTerms* terms, const Sequence& s, int64_t position,
                                   int64_t head) {
  return grad_row(p, terms[terms_at(p, s, position, head)], s, position, head);
}

// row / group, without the slow division of 64 bits where it can be avoided.
__device__ __forceinline__ int64_t position_of(int64_t row, int32_t group) {
  if (group == 1) return row;
  if (row >> 32 == 0) return static_cast<uint32_t>(row) / static_cast<uint32_t>(group);
  return row / group;
}

// Positions that may see one of keys [lo, hi): both bounds of key_range grow with the position.
__device__ inline KeyRange seeing_positions(const AttentionProblem& p, const Sequence& s, int64_t lo, int64_t hi) {
  if (p.query_ids || p.uniform_empty) return {0, s.queries};
  int64_t first = 0, end = s.queries;
  while (first < end) {
    const int64_t mid = (first + end) / 2;
    if (key_range(p, s, mid).hi > lo) end = mid;
    else first = mid + 1;
  }
  int64_t last = first;
  end = s.queries;
  while (last < end) {
    const int64_t mid = (last + end) / 2;
    if (key_range(p, s, mid).lo >= hi) end = mid;
    else last = mid + 1;
  }
  return {first, last};
}

// The weight of a pair, and the gradients by its logit and by its scaled product. `formed`: has_transform(p).
struct PairGrad {
  float weight, logit, product;
};
__device__ inline PairGrad pair_grad(const AttentionProblem& p, const Sequence& s, const GradRow& row, int64_t key,
                                     bool formed, float product, float upstream_product) {
  PairGrad out = {0.0f, 0.0f, 0.0f};
  if (row.head < 0 || key >= s.keys) return out;
  if (row.shift == kNegInf) {
    out.weight = row.delta;
    return out;
  }
  if (!sees(p, s, row.position, row.head, {row.lo, row.hi}, key)) return out;
  float slope = 1.0f;
  const float z = formed ? logit_of(p, s, row.position, row.head, key, product, &slope) : product;
  out.weight = exp2f(fmaf(z, formed ? kLog2OfE : p.scale * kLog2OfE, -row.shift));
  // Weight 0 first: what nobody sees may have a product that is not a number.
  if (out.weight != 0.0f) out.logit = out.weight * (upstream_product - row.delta);
  if (out.logit != 0.0f) out.product = out.logit * slope;
  return out;
}

// Whether several pairs share an element of the bias: then its gradient is a sum, with a kernel of its own.
inline bool shares_bias(const AttentionProblem& p) {
  return (p.batch > 1 && p.bias_stride[0] == 0) || (p.inner > 1 && p.inner_stride.bias == 0) ||
         (p.query_heads > 1 && p.bias_stride[1] == 0) || (p.queries > 1 && p.bias_stride[2] == 0);
}
// Its elements, which are contiguous.
inline int64_t bias_elements(const AttentionProblem& p) {
  int64_t last = p.keys;
  const auto add = [&](int64_t count, int64_t stride) { last = stride && !count ? INT64_MIN / 2 : last + stride * (count - 1); };
  add(p.batch, p.bias_stride[0]);
  add(p.inner, p.inner_stride.bias);
  add(p.query_heads, p.bias_stride[1]);
  add(p.queries, p.bias_stride[2]);
  return last > 0 && p.keys > 0 ? last : 0;
}

// Where the gradients of one line go: the patches' in the type of q, the prefix's in fp32.
template <DType T>
struct GradOut {
  void* data;
  int64_t at;
  bool prefix;
  // Elements i and i + 1 of `dim`; i is even.
  __device__ void put_two(int32_t i, int32_t dim, float x, float y) const {
    if (i >= dim) return;
    if constexpr (T != DType::kFloat32) {
      uint16_t* to = static_cast<uint16_t*>(data) + at + i;
      if (!prefix && i + 1 < dim && reinterpret_cast<uintptr_t>(to) % 4 == 0) {
        *reinterpret_cast<uint32_t*>(to) =
            T == DType::kBFloat16 ? pack_bf16(x, y) : round_f16(x) | static_cast<uint32_t>(round_f16(y)) << 16;
        return;
      }
    }
    put(i, x);
    if (i + 1 < dim) put(i + 1, y);
  }
  __device__ void put(int32_t i, float x) const {
    if (prefix) static_cast<float*>(data)[at + i] = x;
    else store_float<T>(data, at + i, x);
  }
};
template <DType T>
__device__ inline GradOut<T> query_grad_of(const AttentionBackwardArgs& a, const Sequence& s, int64_t position, int64_t head) {
  const bool prefix = a.problem.is_prefix(position);
  return {prefix ? a.prefix_query_grad : a.query_grad, a.row_at(s, position, head, a.problem.head_dim), prefix};
}
template <DType T>
__device__ inline GradOut<T> key_grad_of(const AttentionBackwardArgs& a, const Sequence& s, int64_t key, int64_t key_head) {
  const bool prefix = a.problem.is_prefix(key);
  return {prefix ? a.prefix_key_grad : a.key_grad, a.key_row_at(s, key, key_head, a.problem.head_dim), prefix};
}
template <DType T>
__device__ inline GradOut<T> value_grad_of(const AttentionBackwardArgs& a, const Sequence& s, int64_t key, int64_t key_head) {
  const bool prefix = a.problem.is_prefix(key);
  return {prefix ? a.prefix_value_grad : a.value_grad, a.key_row_at(s, key, key_head, a.problem.value_dim), prefix};
}

}  // namespace heddle
