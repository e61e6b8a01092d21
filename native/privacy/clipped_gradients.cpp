#include "privacy/clipped_gradients.h"

#include <atomic>

#include "privacy/product.h"
#include "privacy/row_list.h"

namespace heddle {
namespace {

// Chunk sides, halved until every thread has work: neither changes a bit of the result.
void chunk_sides(int64_t p, int64_t d, int threads, int64_t* sp, int64_t* sd) {
  *sp = kTall, *sd = kChunk;
  auto tasks = [&] { return ((p + *sp - 1) / *sp) * ((d + *sd - 1) / *sd); };
  while (threads > 1 && tasks() < 2 * threads && (*sp > 2 * kBlock || *sd > 2 * kBlock)) {
    if (*sp >= *sd) *sp /= 2;
    else *sd /= 2;
  }
}

}  // namespace

void add_chunk(const float* blocks, int64_t n0, int64_t n1, float* out, int64_t stride) {
  for (int64_t r = 0; r < n0; ++r) {
    for (int64_t j = 0; j < panels_of(n1); ++j) {
      const float* from = blocks + ((r / kBlock) * kChunkPanels + j) * kBlockSize + r % kBlock * kBlock;
      float* to = out + r * stride + j * kBlock;
      const int64_t n = std::min<int64_t>(kBlock, n1 - j * kBlock);
      for (int64_t c = 0; c < n; ++c) to[c] += from[c];
    }
  }
}

Status linear_clipped_gradients(const ClippedArgs& args, const Exec& exec) {
  const RowLayer& l = args.layer;
  const PrivacyKernels& k = privacy_kernels(exec.isa);
  RowList list;
  if (!list.build(l, args.factors)) return kNoMemory;
  int64_t sp, sd;
  chunk_sides(l.output_count, l.input_count, exec.threads, &sp, &sd);
  const int64_t columns = std::max<int64_t>(1, (l.input_count + sd - 1) / sd);
  const int64_t tasks = (l.output_count + sp - 1) / sp * columns;
  std::atomic<bool> failed{false};
  const bool done = parallel_for(exec, tasks, 1, [&](int64_t begin, int64_t end) {
    ChunkScratch s;
    if (!s.get()) return failed.store(true);
    alignas(64) float sums[kTall];
    for (int64_t task = begin; task < end; ++task) {
      const int64_t x0 = task / columns * sp, n0 = std::min(sp, l.output_count - x0);
      const int64_t x1 = task % columns * sd, n1 = std::min(sd, l.input_count - x1);
      ChunkProduct c;
      c.p.source = l.grad_outputs, c.q.source = l.inputs;
      c.x0 = x0, c.n0 = n0, c.x1 = x1, c.n1 = n1;
      const bool bias = args.bias && x1 == 0;
      // In slices, so that an abort is noticed.
      constexpr int64_t kSlice = 64 * kDepth;
      const int64_t depth = list.count();
      for (int64_t y = 0; y < depth && !exec.cancelled(); y += kSlice) {
        c.p.rows = c.q.rows = list.rows.data() + y;
        c.p.scale = list.scale.data() + y;
        c.depth = std::min(kSlice, depth - y);
        c.run(k, s, y == 0, s.first, bias ? sums : nullptr, nullptr);
      }
      if (depth == 0 || exec.cancelled()) continue;
      add_chunk(s.first, n0, n1, args.weight + x0 * l.input_count + x1, l.input_count);
      for (int64_t r = 0; bias && r < n0; ++r) args.bias[x0 + r] += sums[r];
    }
  });
  return failed.load() ? kNoMemory : done && !exec.cancelled() ? kOk : kCancelled;
}

Status embedding_clipped_gradients(const ClippedArgs& args, const Exec& exec) {
  const RowLayer& l = args.layer;
  const PrivacyKernels& k = privacy_kernels(exec.isa);
  RowList list;
  if (!list.build(l, args.factors)) return kNoMemory;
  std::vector<size_t> runs;
  try {
    sort_by_id(l, list.rows);
    list.scale.resize(list.rows.size());
    for (size_t i = 0; i < list.rows.size(); ++i) list.scale[i] = args.factors[list.rows[i] / l.positions];
    for (size_t i = 0; i < list.rows.size(); i = run_end(l, list.rows, i)) runs.push_back(i);
    runs.push_back(list.rows.size());
  } catch (const std::bad_alloc&) {
    return kNoMemory;
  }
  const bool done = parallel_for(exec, static_cast<int64_t>(runs.size()) - 1, 16, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const size_t from = runs[static_cast<size_t>(i)], to = runs[static_cast<size_t>(i) + 1];
      k.sum_rows(l.grad_outputs, list.rows.data() + from, list.scale.data() + from, static_cast<int64_t>(to - from),
                 l.output_count, args.weight + l.indices[list.rows[from]] * l.output_count);
    }
  });
  return done ? kOk : kCancelled;
}

Status scale_clipped_gradients(const ClippedArgs& args, const Exec& exec) {
  const RowLayer& l = args.layer;
  const PrivacyKernels& k = privacy_kernels(exec.isa);
  RowList list;
  if (!list.build(l, args.factors)) return kNoMemory;
  constexpr int64_t kStep = 64;
  const bool done = parallel_for(exec, (l.output_count + kStep - 1) / kStep, 1, [&](int64_t begin, int64_t end) {
    alignas(64) float weight[kStep], bias[kStep];
    for (int64_t i = begin; i < end; ++i) {
      const int64_t column = i * kStep, n = std::min(kStep, l.output_count - column);
      k.scale_rows(l.inputs, l.grad_outputs, list.rows.data(), list.scale.data(), list.count(), column, n, weight, bias);
      for (int64_t c = 0; c < n; ++c) {
        args.weight[column + c] += weight[c];
        if (args.bias) args.bias[column + c] += bias[c];
      }
    }
  });
  return done ? kOk : kCancelled;
}

Status channel_clipped_gradients(const ClippedArgs& args, const Exec& exec) {
  const RowLayer& l = args.layer;
  const PrivacyKernels& k = privacy_kernels(exec.isa);
  const bool done = parallel_for(exec, l.positions, 1, [&](int64_t begin, int64_t end) {
    for (int64_t c = begin; c < end; ++c) {
      double weight = 0, bias = 0;
      for (int64_t i = 0; i < l.samples; ++i) {
        if (args.factors[i] == 0.0f) continue;
        double product = 0, sum = 0;
        k.channel_sums(l.inputs, l.grad_outputs, i * l.positions + c, l.output_count, &product, &sum);
        weight += args.factors[i] * product;
        bias += args.factors[i] * sum;
      }
      args.weight[c] += static_cast<float>(weight);
      if (args.bias) args.bias[c] += static_cast<float>(bias);
    }
  });
  return done ? kOk : kCancelled;
}

}  // namespace heddle
