// What the ops that are made of attention() share on the device.
#pragma once
#include "attention/attention.h"
#include "cuda/job.h"

namespace heddle {

// Sequences of up to this many keys have a kernel of their own where it serves (attention_short.cuh). The choice depends
// on the sequence alone, so that a row's bits do not depend on what is beside it.
constexpr int64_t kShortKeys = 64;

// Launches attention() on the job's stream; `a` has device pointers.
int64_t launch_attention_on(const AttentionArgs& a, heddle_cuda_job& job);

// Rows of a block of the exact kernel, the smallest of all.
constexpr int kExactRows = 8;

// The exact kernel of any type, and those on the matrix cores for head sizes up to 256, a file a type so that they
// compile side by side.
inline int32_t attention_width(const AttentionProblem& p) { return p.head_dim > p.value_dim ? p.head_dim : p.value_dim; }
int64_t launch_attention_exact(const AttentionArgs& a, heddle_cuda_job& job);
int64_t launch_attention_bf16(const AttentionArgs& a, heddle_cuda_job& job);
int64_t launch_attention_f16(const AttentionArgs& a, heddle_cuda_job& job);

// Whether the kernel of short sequences serves this type and these head sizes.
bool serves_short(const AttentionProblem& p);
// Whether every sequence is one of its.
bool all_short(const AttentionProblem& p);
// Computes the short sequences and leaves the others alone.
int64_t launch_short_attention(const AttentionArgs& a, heddle_cuda_job& job);

// Whether rows of q, k and v can be read 16 bytes at a time.
inline bool aligned_rows(const AttentionProblem& p) {
  auto fits = [](const void* base, const int64_t* stride, int64_t inner, const int64_t* extra) {
    int64_t all = inner | stride[0] | stride[1] | stride[2] | extra[0] | extra[1] | extra[2];
    return stride[3] == 1 && all % 8 == 0 && reinterpret_cast<uintptr_t>(base) % 16 == 0;
  };
  const int64_t q[3] = {p.prefix.query, p.prefix.query_stride[0], p.prefix.query_stride[1]};
  const int64_t k[3] = {p.prefix.key, p.prefix.key_stride[0], p.prefix.key_stride[1]};
  const int64_t v[3] = {p.prefix.value, p.prefix.value_stride[0], p.prefix.value_stride[1]};
  return fits(p.query, p.query_stride, p.inner_stride.query, q) && fits(p.key, p.key_stride, p.inner_stride.key, k) &&
         fits(p.value, p.value_stride, p.inner_stride.value, v);
}

}  // namespace heddle
