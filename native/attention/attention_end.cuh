// How a row of attention ends on the device: its sum and sink, and where the results go.
#pragma once
#include "attention/attention.h"
#include "attention/attention_rows.cuh"

namespace heddle {

// What ends a row: the maximum logit m in units of ln 2 and the sum of 2^(z - m), before the sink.
struct RowEnd {
  float factor;  // of the sums
  float lse;
  bool empty;
};
__device__ __forceinline__ RowEnd end_row(const AttentionProblem& p, int64_t head, float m, float sum) {
  float shift = 1.0f;
  if (p.sinks) {
    const float sink = p.sinks[head] * kLog2OfE, top = fmaxf(m, sink);
    if (top > kNegInf) {
      shift = m > kNegInf ? exp2f(m - top) : 0.0f;
      sum = sum * shift + exp2f(sink - top);
      m = top;
    }
  }
  RowEnd end;
  end.empty = m == kNegInf && sum == 0.0f;  // a row of only NaN logits has the sum NaN
  end.factor = end.empty ? 0.0f : shift / sum;
  end.lse = end.empty ? kNegInf : (m + log2f(sum)) * kLnOf2;
  return end;
}

// Where a row's outputs go, and its log-sum-exp.
template <DType T>
struct RowOut {
  void* data;
  int64_t at;
  bool prefix;
  __device__ RowOut(const AttentionArgs& a, const Sequence& s, int64_t position, int64_t head) {
    const AttentionProblem& p = a.problem;
    prefix = p.is_prefix(position);
    data = prefix ? static_cast<void*>(a.prefix_output) : a.output;
    at = prefix ? p.prefix_at(s, p.query_heads, head) * p.value_dim : p.output_at(s, position, head);
  }
  __device__ void put(int64_t i, float x) const {
    if (!data) return;
    if (prefix) static_cast<float*>(data)[at + i] = x;
    else store_float<T>(data, at + i, x);
  }
};

__device__ inline void put_lse(const AttentionArgs& a, const Sequence& s, int64_t position, int64_t head, float lse) {
  const AttentionProblem& p = a.problem;
  if (p.is_prefix(position)) {
    if (a.prefix_lse) a.prefix_lse[p.prefix_at(s, p.query_heads, head)] = lse;
  } else if (a.log_sum_exp) {
    a.log_sum_exp[p.lse_at(s, position, head)] = lse;
  }
}

// Columns first, first + step, ... of a row that sees no key: the mean of all values of the sequence.
template <DType T>
__device__ inline void put_means(const AttentionProblem& p, const Sequence& s, int64_t key_head, int first, int step,
                                 const RowOut<T>& out) {
#pragma unroll 1
  for (int i = first; i < p.value_dim; i += step) {
    float sum = 0.0f;
#pragma unroll 1
    for (int64_t j = 0; j < s.keys; ++j) {
      sum += load_as_float<T>(p.value, p.value_at(s, j, key_head) + i * p.value_stride[3]);
    }
    out.put(i, s.keys ? sum / static_cast<float>(s.keys) : 0.0f);
  }
}

}  // namespace heddle
