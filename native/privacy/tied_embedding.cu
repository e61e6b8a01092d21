// Norms and clipped sums of tied embeddings on the device; definitions in tied_embedding.h. The two norms are those of an
// embedding and a linear layer; a kernel of tiles of E h^T adds the cross term.
#include "privacy/tied_embedding.h"

#include "privacy/clipped_launch.h"
#include "privacy/norm_partials.cuh"

namespace heddle {
namespace {

// blockIdx.x: 64 positions t of the embedding and 64 positions s of the head; blockIdx.y: a sample. Leaves
// 2 sum L_s[a_t] <E_t, h_s>.
template <DType T>
__global__ void __launch_bounds__(kProductThreads) tied_cross_kernel(TiedLayer l, int32_t tiles, double* partial, int64_t pitch) {
  __shared__ float4 memory[kMatrixShared / 16];  // 16-byte aligned for ldmatrix
  __shared__ double sums[kProductThreads / kWarp];
  const int64_t sample = blockIdx.y, first = sample * l.positions;
  const int64_t t0 = int64_t{blockIdx.x} / tiles * kProductTile, s0 = int64_t{blockIdx.x} % tiles * kProductTile;
  auto kept = [&](int64_t position) { return position < l.positions && (!l.mask || l.mask[first + position]); };
  typename ProductOf<T, true>::type product;
  product.run(
      l.width, memory,
      [&](int64_t k, int t) { return kept(t0 + t) ? load_source(l.grad_embeddings, first + t0 + t, k) : 0.0f; },
      [&](int64_t k, int s) { return kept(s0 + s) ? load_source(l.hidden, first + s0 + s, k) : 0.0f; });
  double sum = 0.0;
#pragma unroll
  for (int e = 0; e < 16; ++e) {
    const int64_t t = t0 + product.row(e), s = s0 + product.column(e);
    if (!kept(t) || !kept(s)) continue;
    const int32_t id = l.indices[first + t];
    if (id != l.padding_index) sum += 2.0 * product.c[e] * load_source(l.grad_logits, first + s, id);
  }
  put_partial(sum, sums, partial + sample * pitch + blockIdx.x);
}

}  // namespace

HEDDLE_CUDA_OP(tied_squared_norms, TiedNormsArgs) {
  const TiedLayer& l = a.layer;
  if (l.samples == 0) return kOk;
  if (l.samples > 65535) return kUnsupported;
  const RowLayer head = l.head(), embedding = l.embedding();
  const NormBlocks blocks = linear_norm_blocks(head, a.method);
  const int64_t tiles = ceil_div(l.positions, kProductTile), cross = tiles * tiles;
  const int64_t count = blocks.count + l.positions + cross;
  if (cross > INT32_MAX) return kUnsupported;
  double* partial = job.scratch<double>(l.samples * count);
  if (!partial) return kNoMemory;
  int64_t status = launch_linear_norms(head, blocks, partial, count, job);
  if (status == kOk) status = launch_embedding_norms(embedding, partial + blocks.count, count, job);
  if (status != kOk) return status;
  if (cross > 0) {
    const dim3 grid(static_cast<unsigned>(cross), static_cast<unsigned>(l.samples));
    status = with_float_type(product_type(l.grad_embeddings, l.hidden), [&](auto type) {
      HEDDLE_LAUNCH((tied_cross_kernel<decltype(type)::value>), grid, dim3(kProductThreads), 0, job.stream, l,
                    static_cast<int32_t>(tiles), partial + blocks.count + l.positions, count);
      return job.launched();
    });
    if (status != kOk) return status;
  }
  return sum_partials(partial, l.samples, count, a.out, job);
}

HEDDLE_CUDA_OP(tied_clipped_gradients, TiedClippedArgs) {
  ClippedArgs part;
  part.factors = a.factors;
  part.weight = a.weight;
  part.layer = a.layer.head();
  const int64_t status = launch_linear_clipped(part, job);
  if (status != kOk) return status;
  part.layer = a.layer.embedding();
  return launch_embedding_clipped(part, job);
}

}  // namespace heddle
