#include "privacy/clipped_gradients.h"

#include <atomic>

#include "privacy/compact.h"
#include "privacy/product.h"
#include "privacy/row_list.h"

namespace heddle {
namespace {

// Chunk sides, halved until every thread has work: neither changes a bit of the result.
void chunk_sides(int64_t p, int64_t d, int64_t runs, int threads, int64_t* sp, int64_t* sd) {
  *sp = kTall, *sd = kChunk;
  auto tasks = [&] { return runs * ((p + *sp - 1) / *sp) * ((d + *sd - 1) / *sd); };
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

Status add_products(const RowLayer& l, const int64_t* rows, const float* scale, const int64_t* begin, int64_t runs,
                    float* weight, float* bias, const Exec& exec) {
  const PrivacyKernels& k = privacy_kernels(exec.isa);
  int64_t sp, sd;
  chunk_sides(l.output_count, l.input_count, runs, exec.threads, &sp, &sd);
  const int64_t columns = std::max<int64_t>(1, (l.input_count + sd - 1) / sd);
  const int64_t tiles = (l.output_count + sp - 1) / sp * columns;
  std::atomic<bool> failed{false};
  const bool done = parallel_for(exec, runs * tiles, 1, [&](int64_t from, int64_t to) {
    ChunkScratch s;
    if (!s.get()) return failed.store(true);
    alignas(64) float sums[kTall];
    for (int64_t task = from; task < to; ++task) {
      const int64_t run = task / tiles, tile = task % tiles;
      const int64_t x0 = tile / columns * sp, n0 = std::min(sp, l.output_count - x0);
      const int64_t x1 = tile % columns * sd, n1 = std::min(sd, l.input_count - x1);
      ChunkProduct c;
      c.p.source = l.grad_outputs, c.q.source = l.inputs;
      c.x0 = x0, c.n0 = n0, c.x1 = x1, c.n1 = n1;
      const bool with_bias = bias && x1 == 0;
      // In slices, so that an abort is noticed.
      constexpr int64_t kSlice = 64 * kDepth;
      for (int64_t y = begin[run]; y < begin[run + 1] && !exec.cancelled(); y += kSlice) {
        c.p.rows = c.q.rows = rows + y;
        c.p.scale = scale + y;
        c.depth = std::min(kSlice, begin[run + 1] - y);
        c.run(k, s, y == begin[run], s.first, with_bias ? sums : nullptr, nullptr);
      }
      if (begin[run] == begin[run + 1] || exec.cancelled()) continue;
      add_chunk(s.first, n0, n1, weight + (run * l.output_count + x0) * l.input_count + x1, l.input_count);
      for (int64_t r = 0; with_bias && r < n0; ++r) bias[run * l.output_count + x0 + r] += sums[r];
    }
  });
  return failed.load() ? kNoMemory : done && !exec.cancelled() ? kOk : kCancelled;
}

Status linear_clipped_gradients(const ClippedArgs& args, const Exec& exec) {
  RowList list;
  if (!list.build(args.layer, args.factors)) return kNoMemory;
  const int64_t begin[2] = {0, list.count()};
  return add_products(args.layer, list.rows.data(), list.scale.data(), begin, 1, args.weight, args.bias, exec);
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
  std::atomic<bool> failed{false};
  const bool done = parallel_for(exec, l.positions, l.mask ? 16 : 1, [&](int64_t begin, int64_t end) {
    UnpaddedRows x, g;
    double weight[16] = {}, bias[16] = {};
    for (int64_t from = begin; from < end; from += 16) {
      const int64_t to = std::min(end, from + 16);
      std::fill(weight, weight + 16, 0.0), std::fill(bias, bias + 16, 0.0);
      for (int64_t i = 0; i < l.samples; ++i) {
        if (args.factors[i] == 0.0f) continue;
        if (!x.begin(l.mask, i, l.output_count) || !g.begin(l.mask, i, l.output_count)) return failed.store(true);
        for (int64_t c = from; c < to; ++c) {
          double product = 0, sum = 0;
          const RowSource xs = x.row(l.inputs, i * l.positions + c), gs = g.row(l.grad_outputs, i * l.positions + c);
          k.channel_sums(xs, gs, 0, x.count(), &product, &sum);
          weight[c - from] += args.factors[i] * product;
          bias[c - from] += args.factors[i] * sum;
        }
      }
      for (int64_t c = from; c < to; ++c) {
        args.weight[c] += static_cast<float>(weight[c - from]);
        if (args.bias) args.bias[c] += static_cast<float>(bias[c - from]);
      }
    }
  });
  return failed.load() ? kNoMemory : done ? kOk : kCancelled;
}

}  // namespace heddle
