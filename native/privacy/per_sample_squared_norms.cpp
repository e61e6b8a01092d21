#include "privacy/per_sample_squared_norms.h"

#include <atomic>

#include "privacy/product.h"
#include "privacy/row_list.h"

namespace heddle {
namespace {

Status result(bool done, const std::atomic<bool>& failed) { return failed.load() ? kNoMemory : done ? kOk : kCancelled; }

int64_t chunks_of(int64_t n) { return (n + kChunk - 1) / kChunk; }

// The part of a ghost norm in chunks i <= j of the positions.
double ghost_part(const PrivacyKernels& k, const ChunkScratch& s, const RowLayer& l, const int64_t* rows, int64_t length,
                  int64_t i, int64_t j) {
  const int64_t x0 = i * kChunk, n0 = std::min<int64_t>(kChunk, length - x0);
  const int64_t x1 = j * kChunk, n1 = std::min<int64_t>(kChunk, length - x1);
  ChunkProduct a, g;
  a.p.source = l.inputs, a.p.rows = rows, a.p.by_rows = false;
  a.x0 = x0, a.n0 = n0, a.x1 = x1, a.n1 = n1, a.depth = l.input_count, a.symmetric = i == j;
  a.q = a.p;
  g = a;
  g.p.source = g.q.source = l.grad_outputs, g.depth = l.output_count;
  a.run(k, s, true, s.first, nullptr, &g);
  g.run(k, s, true, s.second, nullptr, nullptr);
  const double d = chunk_dot(k, s.first, s.second, l.bias ? 1.0f : 0.0f, n0, n1, i == j);
  return i == j ? d : 2 * d;
}

// The part of an instantiated norm in chunk i of the outputs and j of the inputs.
double gradient_part(const PrivacyKernels& k, const ChunkScratch& s, const RowLayer& l, const int64_t* rows,
                     int64_t length, int64_t i, int64_t j) {
  const int64_t x0 = i * kChunk, n0 = std::min<int64_t>(kChunk, l.output_count - x0);
  const int64_t x1 = j * kChunk, n1 = std::min<int64_t>(kChunk, l.input_count - x1);
  ChunkProduct c;
  c.p.source = l.grad_outputs, c.q.source = l.inputs;
  c.p.rows = c.q.rows = rows;
  c.x0 = x0, c.n0 = n0, c.x1 = x1, c.n1 = n1, c.depth = length;
  alignas(64) float sums[kChunk];
  const bool bias = l.bias && j == 0;
  c.run(k, s, true, s.first, bias ? sums : nullptr, nullptr);
  double d = chunk_dot(k, s.first, s.first, 0.0f, n0, n1, false);
  for (int64_t r = 0; bias && r < n0; ++r) d += static_cast<double>(sums[r]) * sums[r];
  return d;
}

}  // namespace

Status linear_squared_norms(const NormsArgs& args, const Exec& exec) {
  const RowLayer& l = args.layer;
  const PrivacyKernels& k = privacy_kernels(exec.isa);
  RowList list;
  if (!list.build(l, nullptr)) return kNoMemory;
  // Tasks of one sample; each leaves a double, added up in their order below.
  const int64_t t = chunks_of(l.positions);
  const int64_t di = chunks_of(l.output_count), dj = std::max<int64_t>(1, chunks_of(l.input_count));
  const bool single = l.positions == 1;
  const int64_t parts = single ? 1 : args.ghost ? t * (t + 1) / 2 : di * dj;
  std::vector<double> part;
  try {
    part.assign(static_cast<size_t>(l.samples * parts), 0.0);
  } catch (const std::bad_alloc&) {
    return kNoMemory;
  }
  std::atomic<bool> failed{false};
  const bool done = parallel_for(exec, l.samples * parts, single ? 64 : 1, [&](int64_t begin, int64_t end) {
    ChunkScratch s;
    if (!single && !s.get()) return failed.store(true);
    for (int64_t task = begin; task < end; ++task) {
      const int64_t sample = task / parts, at = task % parts;
      const int64_t* rows = list.sample(sample);
      const int64_t length = list.length(sample);
      double d = 0;
      if (length == 0) continue;
      if (length == 1 && (single || args.ghost)) {
        if (at == 0) {
          d = (k.squared_row(l.inputs, rows[0], l.input_count) + (l.bias ? 1 : 0)) *
              k.squared_row(l.grad_outputs, rows[0], l.output_count);
        }
      } else if (args.ghost) {
        int64_t j = 0;
        while ((j + 1) * (j + 2) / 2 <= at) ++j;
        const int64_t i = at - j * (j + 1) / 2;
        if (j * kChunk < length) d = ghost_part(k, s, l, rows, length, i, j);
      } else {
        d = gradient_part(k, s, l, rows, length, at / dj, at % dj);
      }
      part[static_cast<size_t>(task)] = d;
    }
  });
  for (int64_t i = 0; i < l.samples; ++i) {
    double sum = 0;
    for (int64_t at = 0; at < parts; ++at) sum += part[static_cast<size_t>(i * parts + at)];
    args.out[i] = static_cast<float>(sum < 0 ? 0 : sum);  // a Gram sum is a square: below 0 only by rounding
  }
  return result(done, failed);
}

Status embedding_squared_norms(const NormsArgs& args, const Exec& exec) {
  const RowLayer& l = args.layer;
  const PrivacyKernels& k = privacy_kernels(exec.isa);
  RowList list;
  if (!list.build(l, nullptr)) return kNoMemory;
  std::atomic<bool> failed{false};
  const bool done = parallel_for(exec, l.samples, 1, [&](int64_t begin, int64_t end) {
    try {
      for (int64_t i = begin; i < end; ++i) {
        std::vector<int64_t> rows(list.sample(i), list.sample(i) + list.length(i));
        sort_by_id(l, rows);
        double sum = 0;
        for (size_t at = 0; at < rows.size();) {
          const size_t next = run_end(l, rows, at);
          sum += k.sum_rows(l.grad_outputs, rows.data() + at, nullptr, static_cast<int64_t>(next - at), l.output_count,
                            nullptr);
          at = next;
        }
        args.out[i] = static_cast<float>(sum);
      }
    } catch (const std::bad_alloc&) {
      failed.store(true);
    }
  });
  return result(done, failed);
}

Status scale_squared_norms(const NormsArgs& args, const Exec& exec) {
  const RowLayer& l = args.layer;
  const PrivacyKernels& k = privacy_kernels(exec.isa);
  RowList list;
  if (!list.build(l, nullptr)) return kNoMemory;
  const bool done = parallel_for(exec, l.samples, 1, [&](int64_t begin, int64_t end) {
    alignas(64) float weight[kChunk], bias[kChunk];
    for (int64_t i = begin; i < end; ++i) {
      double sum = 0;
      for (int64_t column = 0; column < l.output_count; column += kChunk) {
        const int64_t n = std::min<int64_t>(kChunk, l.output_count - column);
        k.scale_rows(l.inputs, l.grad_outputs, list.sample(i), nullptr, list.length(i), column, n, weight, bias);
        for (int64_t c = 0; c < n; ++c) {
          sum += static_cast<double>(weight[c]) * weight[c];
          if (l.bias) sum += static_cast<double>(bias[c]) * bias[c];
        }
      }
      args.out[i] = static_cast<float>(sum);
    }
  });
  return done ? kOk : kCancelled;
}

Status channel_squared_norms(const NormsArgs& args, const Exec& exec) {
  const RowLayer& l = args.layer;
  const PrivacyKernels& k = privacy_kernels(exec.isa);
  const bool done = parallel_for(exec, l.samples, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      double total = 0;
      for (int64_t c = 0; c < l.positions; ++c) {
        double product = 0, sum = 0;
        k.channel_sums(l.inputs, l.grad_outputs, i * l.positions + c, l.output_count, &product, &sum);
        total += product * product + (l.bias ? sum * sum : 0.0);
      }
      args.out[i] = static_cast<float>(total);
    }
  });
  return done ? kOk : kCancelled;
}

}  // namespace heddle
