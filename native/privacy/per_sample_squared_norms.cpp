#include "privacy/per_sample_squared_norms.h"

#include <atomic>

#include "core/workspace.h"
#include "privacy/compact.h"
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

// Sums in double to the float32 result.
template <class Sums>
Status rounded(const NormsArgs& args, const Sums& compute) {
  AlignedBuffer<double> sums(static_cast<size_t>(args.layer.samples));
  if (!sums) return kNoMemory;
  const Status status = compute(sums.data());
  for (int64_t i = 0; status == kOk && i < args.layer.samples; ++i) args.out[i] = static_cast<float>(sums.data()[i]);
  return status;
}

}  // namespace

Status run_norm_sums(const RowLayer& l, const int64_t* rows, const int64_t* begin, int64_t runs, NormMethod method,
                     const Exec& exec, double* sums) {
  const PrivacyKernels& k = privacy_kernels(exec.isa);
  const int64_t di = chunks_of(l.output_count), dj = std::max<int64_t>(1, chunks_of(l.input_count));
  auto is_ghost = [&](int64_t length) {
    return method == NormMethod::kGhost ||
           (method == NormMethod::kByLength && 2 * length * length <= l.input_count * l.output_count);
  };
  // Tasks of one run; each leaves a double, added up in their order below.
  std::vector<int64_t> first;  // [runs + 1]
  std::vector<double> part;
  try {
    first.reserve(static_cast<size_t>(runs) + 1);
    first.push_back(0);
    for (int64_t i = 0; i < runs; ++i) {
      const int64_t length = begin[i + 1] - begin[i], t = chunks_of(length);
      first.push_back(first.back() + (length <= 1 ? length : is_ghost(length) ? t * (t + 1) / 2 : di * dj));
    }
    part.assign(static_cast<size_t>(first.back()), 0.0);
  } catch (const std::bad_alloc&) {
    return kNoMemory;
  }
  const int64_t tasks = first.back();
  std::atomic<bool> failed{false};
  const bool done = parallel_for(exec, tasks, begin[runs] - begin[0] == tasks ? 64 : 1, [&](int64_t from, int64_t to) {
    ChunkScratch s;
    int64_t run = std::upper_bound(first.begin(), first.end(), from) - first.begin() - 1;
    for (int64_t task = from; task < to; ++task) {
      while (first[static_cast<size_t>(run) + 1] <= task) ++run;
      const int64_t at = task - first[static_cast<size_t>(run)], length = begin[run + 1] - begin[run];
      const int64_t* list = rows + begin[run];
      double d;
      if (length == 1) {
        d = (k.squared_row(l.inputs, list[0], l.input_count) + (l.bias ? 1 : 0)) *
            k.squared_row(l.grad_outputs, list[0], l.output_count);
      } else if (!s.get()) {
        return failed.store(true);
      } else if (is_ghost(length)) {
        int64_t j = 0;
        while ((j + 1) * (j + 2) / 2 <= at) ++j;
        d = ghost_part(k, s, l, list, length, at - j * (j + 1) / 2, j);
      } else {
        d = gradient_part(k, s, l, list, length, at / dj, at % dj);
      }
      part[static_cast<size_t>(task)] = d;
    }
  });
  for (int64_t i = 0; i < runs; ++i) {
    double sum = 0;
    for (int64_t at = first[static_cast<size_t>(i)]; at < first[static_cast<size_t>(i) + 1]; ++at) {
      sum += part[static_cast<size_t>(at)];
    }
    sums[i] = sum < 0 ? 0 : sum;  // a Gram sum is a square: below 0 only by rounding
  }
  return result(done, failed);
}

Status linear_norm_sums(const RowLayer& l, NormMethod method, const Exec& exec, double* sums) {
  RowList list;
  if (!list.build(l, nullptr)) return kNoMemory;
  return run_norm_sums(l, list.rows.data(), list.begin.data(), l.samples, method, exec, sums);
}

Status embedding_norm_sums(const RowLayer& l, const Exec& exec, double* sums) {
  const PrivacyKernels& k = privacy_kernels(exec.isa);
  RowList list;
  if (!list.build(l, nullptr)) return kNoMemory;
  std::atomic<bool> failed{false};
  const bool done = parallel_for(exec, l.samples, 1, [&](int64_t begin, int64_t end) {
    try {
      for (int64_t i = begin; i < end; ++i) {
        std::vector<int64_t> rows(list.sample(i), list.sample(i) + list.length(i));
        sort_by_id(l, rows);
        sums[i] = 0;
        for (size_t at = 0; at < rows.size();) {
          const size_t next = run_end(l, rows, at);
          sums[i] += k.sum_rows(l.grad_outputs, rows.data() + at, nullptr, static_cast<int64_t>(next - at),
                                l.output_count, nullptr);
          at = next;
        }
      }
    } catch (const std::bad_alloc&) {
      failed.store(true);
    }
  });
  return result(done, failed);
}

Status linear_squared_norms(const NormsArgs& args, const Exec& exec) {
  return rounded(args, [&](double* sums) { return linear_norm_sums(args.layer, args.method, exec, sums); });
}

Status embedding_squared_norms(const NormsArgs& args, const Exec& exec) {
  return rounded(args, [&](double* sums) { return embedding_norm_sums(args.layer, exec, sums); });
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
  std::atomic<bool> failed{false};
  const bool done = parallel_for(exec, l.samples, 1, [&](int64_t begin, int64_t end) {
    UnpaddedRows x, g;
    for (int64_t i = begin; i < end; ++i) {
      if (!x.begin(l.mask, i, l.output_count) || !g.begin(l.mask, i, l.output_count)) return failed.store(true);
      double total = 0;
      for (int64_t c = 0; c < l.positions; ++c) {
        double product = 0, sum = 0;
        const RowSource xs = x.row(l.inputs, i * l.positions + c), gs = g.row(l.grad_outputs, i * l.positions + c);
        k.channel_sums(xs, gs, 0, x.count(), &product, &sum);
        total += product * product + (l.bias ? sum * sum : 0.0);
      }
      args.out[i] = static_cast<float>(total);
    }
  });
  return result(done, failed);
}

}  // namespace heddle
