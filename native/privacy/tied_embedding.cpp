#include "privacy/tied_embedding.h"

#include <atomic>

#include "privacy/clipped_gradients.h"
#include "privacy/product.h"
#include "privacy/row_list.h"

namespace heddle {
namespace {

float element(const RowSource& s, int64_t row, int64_t column) {
  const int64_t at = row * s.stride + column;
  if (s.type == DType::kFloat32) return static_cast<const float*>(s.data)[at];
  const uint16_t half = static_cast<const uint16_t*>(s.data)[at];
  return s.type == DType::kBFloat16 ? bf16_to_float(half) : f16_to_float(half);
}

// sum over t in chunk i, s in chunk j of L_s[a_t] <E_t, h_s>
double cross_part(const PrivacyKernels& k, const ChunkScratch& s, const TiedLayer& l, const int64_t* rows, int64_t length,
                  int64_t i, int64_t j) {
  ChunkProduct c;
  c.p.source = l.grad_embeddings, c.q.source = l.hidden;
  c.p.rows = c.q.rows = rows;
  c.p.by_rows = c.q.by_rows = false;
  c.x0 = i * kChunk, c.n0 = std::min<int64_t>(kChunk, length - c.x0);
  c.x1 = j * kChunk, c.n1 = std::min<int64_t>(kChunk, length - c.x1), c.depth = l.width;
  c.run(k, s, true, s.first, nullptr, nullptr);
  double total = 0;
  for (int64_t y = 0; y < c.n1; ++y) {  // one row of logits after the other
    const int64_t row = rows[c.x1 + y];
    for (int64_t x = 0; x < c.n0; ++x) {
      const int32_t id = l.indices[rows[c.x0 + x]];
      if (id == l.padding_index) continue;
      const int64_t block = x / kBlock * kChunkPanels + y / kBlock;
      total += static_cast<double>(s.first[block * kBlockSize + x % kBlock * kBlock + y % kBlock]) *
               element(l.grad_logits, row, id);
    }
  }
  return total;
}

}  // namespace

Status tied_squared_norms(const TiedNormsArgs& args, const Exec& exec) {
  const TiedLayer& l = args.layer;
  const PrivacyKernels& k = privacy_kernels(exec.isa);
  const int64_t t = (l.positions + kChunk - 1) / kChunk, parts = t * t;
  RowList list;
  AlignedBuffer<double> head(static_cast<size_t>(l.samples)), embedding(static_cast<size_t>(l.samples));
  AlignedBuffer<double> cross(static_cast<size_t>(l.samples * parts));
  if (!list.build(l.head(), nullptr) || !head || !embedding || !cross) return kNoMemory;
  Status status =
      run_norm_sums(l.head(), list.rows.data(), list.begin.data(), l.samples, args.method, exec, head.data());
  if (status == kOk) status = embedding_norm_sums(l.embedding(), exec, embedding.data());
  if (status != kOk) return status;
  std::atomic<bool> failed{false};
  const bool done = parallel_for(exec, l.samples * parts, 1, [&](int64_t begin, int64_t end) {
    ChunkScratch s;
    if (!s.get()) return failed.store(true);
    for (int64_t task = begin; task < end; ++task) {
      const int64_t sample = task / parts, i = task % parts / t, j = task % t;
      const int64_t length = list.length(sample);
      const bool some = i * kChunk < length && j * kChunk < length;
      cross.data()[task] = some ? cross_part(k, s, l, list.sample(sample), length, i, j) : 0.0;
    }
  });
  for (int64_t i = 0; i < l.samples; ++i) {
    double sum = 0;
    for (int64_t at = 0; at < parts; ++at) sum += cross.data()[i * parts + at];
    sum = head.data()[i] + embedding.data()[i] + 2 * sum;
    args.out[i] = static_cast<float>(sum < 0 ? 0 : sum);
  }
  return failed.load() ? kNoMemory : done ? kOk : kCancelled;
}

Status tied_clipped_gradients(const TiedClippedArgs& args, const Exec& exec) {
  ClippedArgs part;
  part.layer = args.layer.head(), part.factors = args.factors, part.weight = args.weight;
  const Status status = linear_clipped_gradients(part, exec);
  if (status != kOk) return status;
  part.layer = args.layer.embedding();
  return embedding_clipped_gradients(part, exec);
}

}  // namespace heddle
