#include "attention/patch_embed.h"

#include <algorithm>
#include <atomic>

#include "gemm/panel.h"

namespace heddle {

namespace {

constexpr int64_t kTilesPerBlock = 16;  // as linear() takes them: one pass over the weights per block

inline float widen(uint8_t v) { return static_cast<float>(v); }
inline float widen(float v) { return v; }
inline float widen(uint16_t v) { return bf16_to_float(v); }

// Rows of `count` tokens that are neighbours along the width, `stride` floats apart in out: what they read of a line of
// pixels lies together, and a token's own lines lie too far apart to be fetched ahead by hardware.
template <class T>
void gather_rows_of(const PatchProblem& p, const float* scale_run, const float* shift_run, int64_t b, int64_t token,
                    int64_t count, int64_t stride, float* out) {
  const int64_t st = p.pixel_stride[0], sy = p.pixel_stride[1], sx = p.pixel_stride[2], sc = p.channel_stride;
  const T* first = static_cast<const T*>(p.video) + p.first_pixel(b, token);
  const int64_t width = p.size[2], next = p.step[2] * sx;
  if (p.channels_last) {
    const int64_t run = width * p.channels;
    for (int64_t dt = 0; dt < p.size[0]; ++dt) {
      for (int64_t dy = 0; dy < p.size[1]; ++dy, out += run) {
        for (int64_t i = 0; i < count; ++i) {
          const T* from = first + dt * st + dy * sy + i * next;
          float* to = out + i * stride;
          if (sc == 1 && sx == p.channels) {
            for (int64_t e = 0; e < run; ++e) to[e] = widen(from[e]) * scale_run[e] + shift_run[e];
          } else {
            for (int64_t c = 0; c < p.channels; ++c) {
              for (int64_t dx = 0; dx < width; ++dx) {
                to[dx * p.channels + c] = widen(from[dx * sx + c * sc]) * p.scale[c] + p.shift[c];
              }
            }
          }
        }
      }
    }
    return;
  }
  for (int64_t c = 0; c < p.channels; ++c) {
    const float scale = p.scale[c], shift = p.shift[c];
    for (int64_t dt = 0; dt < p.size[0]; ++dt) {
      for (int64_t dy = 0; dy < p.size[1]; ++dy, out += width) {
        for (int64_t i = 0; i < count; ++i) {
          const T* from = first + c * sc + dt * st + dy * sy + i * next;
          float* to = out + i * stride;
          if (sx == 1) {
            for (int64_t dx = 0; dx < width; ++dx) to[dx] = widen(from[dx]) * scale + shift;
          } else {
            for (int64_t dx = 0; dx < width; ++dx) to[dx] = widen(from[dx * sx]) * scale + shift;
          }
        }
      }
    }
  }
}

}  // namespace

Status patch_embed(const PatchEmbedArgs& a, const Exec& exec) {
  const PatchProblem& p = a.problem;
  const PackedMatrix& w = *a.weight;
  const int64_t tokens = p.tokens();
  const int64_t rows = p.indices ? p.batch_offsets[p.batch] : p.batch * tokens;
  if (rows == 0 || w.columns == 0) return kOk;
  const int64_t run = p.size[2] * p.channels;
  AlignedBuffer<float> runs(static_cast<size_t>(2 * run));
  if (!runs) return kNoMemory;
  for (int64_t i = 0; i < run; ++i) {
    runs[i] = p.scale[i % p.channels];
    runs[run + i] = p.shift[i % p.channels];
  }
  const int64_t tile = tile_kernels(exec.isa, w.type).max_rows;
  int64_t tiles = a.to ? kGroupRows / tile : kTilesPerBlock;  // a group of fused_linear()
  while (exec.threads > 1 && tiles > 1 && rows < 4 * exec.threads * tiles * tile) tiles /= 2;
  const int64_t block = tiles * tile, blocks = (rows + block - 1) / block;
  const int64_t out_size = dtype_size(p.out_type) * w.columns;
  std::atomic<Status> failure{kOk};

  const bool done = parallel_for(exec, blocks, 1, [&](int64_t begin, int64_t end) {
    // linear() has the thread's Workspace; this stays with the thread as that does.
    static thread_local AlignedBuffer<float> gathered;
    const size_t need = static_cast<size_t>(block * w.k);
    if (gathered.size() < need && !gathered.reset(need)) return failure.store(kNoMemory);
    for (int64_t i = begin; i < end && failure.load() == kOk; ++i) {
      const int64_t last = std::min(rows, (i + 1) * block);
      for (int64_t r = i * block; r < last;) {
        // Rows of one batch entry: they are contiguous in the result.
        int64_t b = r / std::max<int64_t>(tokens, 1), stop, at;
        if (p.indices) {
          b = std::upper_bound(p.batch_offsets, p.batch_offsets + p.batch + 1, r) - p.batch_offsets - 1;
          stop = std::min<int64_t>(last, p.batch_offsets[b + 1]);
          at = r;
        } else {
          stop = std::min(last, (b + 1) * tokens);
          at = b * p.out_rows + p.out_first + r - b * tokens;
        }
        const auto token_of = [&](int64_t j) { return p.indices ? p.indices[j] : j - b * tokens; };
        for (int64_t j = r; j < stop;) {
          const int64_t token = token_of(j), most = std::min(stop - j, p.grid[2] - token % p.grid[2]);
          int64_t count = 1;
          while (count < most && token_of(j + count) == token + count) ++count;
          float* to = gathered.data() + (j - r) * w.k;
          const float *scale = runs.data(), *shift = runs.data() + run;
          if (p.type == DType::kUint8) gather_rows_of<uint8_t>(p, scale, shift, b, token, count, w.k, to);
          else if (p.type == DType::kBFloat16) gather_rows_of<uint16_t>(p, scale, shift, b, token, count, w.k, to);
          else gather_rows_of<float>(p, scale, shift, b, token, count, w.k, to);
          j += count;
        }
        Exec alone = exec;
        alone.threads = 1;
        if (a.to) {
          FusedLinearArgs product;
          product.weight = a.weight;
          product.x = gathered.data();
          product.rows = stop - r;
          product.bias = p.bias;
          for (int t = 0; t < 2; ++t) {
            product.add[t] = a.add[t];
            product.add_index[t] = a.add_index[t] ? a.add_index[t] + r : nullptr;
          }
          product.out = static_cast<float*>(p.out);
          product.to = a.to + r;
          const Status status = fused_linear(product, alone);
          if (status != kOk) return failure.store(status);
          r = stop;
          continue;
        }
        LinearArgs product;
        product.weight = a.weight;
        product.x = gathered.data();
        product.rows = stop - r;
        product.bias = p.bias;
        product.out = static_cast<char*>(p.out) + at * out_size;
        product.out_type = p.out_type;
        const Status status = linear(product, alone);
        if (status != kOk) return failure.store(status);
        r = stop;
      }
    }
  });
  if (failure.load() != kOk) return failure.load();
  return done ? kOk : kCancelled;
}

}  // namespace heddle
