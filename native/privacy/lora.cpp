#include "privacy/lora.h"

#include <atomic>
#include <numeric>

#include "privacy/clipped_gradients.h"
#include "privacy/product.h"
#include "privacy/row_list.h"

namespace heddle {
namespace {

// u and v of the rows of a list, each at its own row's place.
struct Adapted {
  HugeBuffer buffer;
  RowLayer up, down;  // dB, dA as linear layers
};

// out[rows[x]][rank] = x Mᵀ or x M, scaled.
void adapt(const PrivacyKernels& k, const ChunkScratch& s, const RowSource& x, const int64_t* rows, int64_t first,
           int64_t count, const Side& matrix, int64_t depth, int64_t rank, float* out) {
  for (int64_t x1 = 0; x1 < rank; x1 += kChunk) {
    ChunkProduct c;
    c.p.source = x, c.p.rows = rows, c.p.by_rows = false;
    c.q = matrix;
    c.x0 = first, c.n0 = count, c.x1 = x1, c.n1 = std::min<int64_t>(kChunk, rank - x1), c.depth = depth;
    c.run(k, s, true, s.first, nullptr, nullptr);
    for (int64_t r = 0; r < count; ++r) {
      float* to = out + rows[first + r] * rank + x1;
      for (int64_t i = 0; i < c.n1; ++i) {
        to[i] = s.first[((r / kBlock) * kChunkPanels + i / kBlock) * kBlockSize + r % kBlock * kBlock + i % kBlock];
      }
    }
  }
}

Status adapt_rows(const LoraLayer& l, const RowList& list, const Exec& exec, Adapted& out) {
  const PrivacyKernels& k = privacy_kernels(exec.isa);
  const int64_t all = l.rows.samples * l.rows.positions;
  std::vector<int64_t> identity;
  std::vector<float> scales;
  try {
    identity.resize(static_cast<size_t>(std::max(l.rank, l.rows.output_count)));
    scales.assign(static_cast<size_t>(l.rows.output_count), l.scale);
  } catch (const std::bad_alloc&) {
    return kNoMemory;
  }
  if (!out.buffer.reset(static_cast<size_t>(2 * all * l.rank) * sizeof(float))) return kNoMemory;
  std::iota(identity.begin(), identity.end(), int64_t{0});
  float *u = out.buffer.as<float>(), *v = u + all * l.rank;
  Side a, b;
  a.source = l.a, a.rows = identity.data(), a.by_rows = false, a.factor = l.scale;
  b.source = l.b, b.rows = identity.data(), b.scale = scales.data();
  std::atomic<bool> failed{false};
  const int64_t chunks = (list.count() + kChunk - 1) / kChunk;
  const bool done = parallel_for(exec, 2 * chunks, 1, [&](int64_t begin, int64_t end) {
    ChunkScratch s;
    if (!s.get()) return failed.store(true);
    for (int64_t task = begin; task < end; ++task) {
      const int64_t first = task / 2 * kChunk, count = std::min<int64_t>(kChunk, list.count() - first);
      if (task % 2 == 0) adapt(k, s, l.rows.inputs, list.rows.data(), first, count, a, l.rows.input_count, l.rank, u);
      else adapt(k, s, l.rows.grad_outputs, list.rows.data(), first, count, b, l.rows.output_count, l.rank, v);
    }
  });
  out.up = out.down = l.rows;
  out.up.inputs = {u, DType::kFloat32, l.rank}, out.up.input_count = l.rank;
  out.down.grad_outputs = {v, DType::kFloat32, l.rank}, out.down.output_count = l.rank;
  return failed.load() ? kNoMemory : done ? kOk : kCancelled;
}

}  // namespace

Status lora_squared_norms(const LoraNormsArgs& args, const Exec& exec) {
  const int64_t samples = args.layer.rows.samples;
  RowList list;
  Adapted adapted;
  AlignedBuffer<double> sums(static_cast<size_t>(2 * samples));
  if (!list.build(args.layer.rows, nullptr) || !sums) return kNoMemory;
  Status status = adapt_rows(args.layer, list, exec, adapted);
  for (int i = 0; status == kOk && i < 2; ++i) {
    status = run_norm_sums(i ? adapted.down : adapted.up, list.rows.data(), list.begin.data(), samples, args.method, exec,
                           sums.data() + i * samples);
  }
  if (status != kOk) return status;
  for (int64_t i = 0; i < samples; ++i) args.out[i] = static_cast<float>(sums.data()[i] + sums.data()[samples + i]);
  return kOk;
}

Status lora_clipped_gradients(const LoraClippedArgs& args, const Exec& exec) {
  RowList list;
  Adapted adapted;
  if (!list.build(args.layer.rows, args.factors)) return kNoMemory;
  const int64_t begin[2] = {0, list.count()};
  Status status = adapt_rows(args.layer, list, exec, adapted);
  for (int i = 0; status == kOk && i < 2; ++i) {
    status = add_products(i ? adapted.down : adapted.up, list.rows.data(), list.scale.data(), begin, 1,
                          i ? args.a : args.b, nullptr, exec);
  }
  return status;
}

}  // namespace heddle
