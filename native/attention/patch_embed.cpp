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
void gather_rows_of(const PatchEmbedArgs& a, const float* scale_run, const float* shift_run, int64_t b, int64_t token,
                    int64_t count, int64_t stride, float* out) {
  const int64_t x = token % a.grid[2], y = token / a.grid[2] % a.grid[1], t = token / (a.grid[2] * a.grid[1]);
  const int64_t st = a.pixel_stride[0], sy = a.pixel_stride[1], sx = a.pixel_stride[2], sc = a.channel_stride;
  const T* first = static_cast<const T*>(a.video) + a.start + b * a.batch_stride + t * a.step[0] * st +
                   y * a.step[1] * sy + x * a.step[2] * sx;
  const int64_t width = a.size[2], next = a.step[2] * sx;
  if (a.channels_last) {
    const int64_t run = width * a.channels;
    for (int64_t dt = 0; dt < a.size[0]; ++dt) {
      for (int64_t dy = 0; dy < a.size[1]; ++dy, out += run) {
        for (int64_t i = 0; i < count; ++i) {
          const T* from = first + dt * st + dy * sy + i * next;
          float* to = out + i * stride;
          if (sc == 1 && sx == a.channels) {
            for (int64_t e = 0; e < run; ++e) to[e] = widen(from[e]) * scale_run[e] + shift_run[e];
          } else {
            for (int64_t c = 0; c < a.channels; ++c) {
              for (int64_t dx = 0; dx < width; ++dx) {
                to[dx * a.channels + c] = widen(from[dx * sx + c * sc]) * a.scale[c] + a.shift[c];
              }
            }
          }
        }
      }
    }
    return;
  }
  for (int64_t c = 0; c < a.channels; ++c) {
    const float scale = a.scale[c], shift = a.shift[c];
    for (int64_t dt = 0; dt < a.size[0]; ++dt) {
      for (int64_t dy = 0; dy < a.size[1]; ++dy, out += width) {
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
  const PackedMatrix& w = *a.weight;
  const int64_t tokens = a.grid[0] * a.grid[1] * a.grid[2];
  const int64_t rows = a.indices ? a.batch_offsets[a.batch] : a.batch * tokens;
  if (rows == 0 || w.columns == 0) return kOk;
  const int64_t run = a.size[2] * a.channels;
  AlignedBuffer<float> runs(static_cast<size_t>(2 * run));
  if (!runs) return kNoMemory;
  for (int64_t i = 0; i < run; ++i) {
    runs[i] = a.scale[i % a.channels];
    runs[run + i] = a.shift[i % a.channels];
  }
  const int64_t tile = tile_kernels(exec.isa, w.type).max_rows;
  int64_t tiles = a.to ? kGroupRows / tile : kTilesPerBlock;  // a group of fused_linear()
  while (exec.threads > 1 && tiles > 1 && rows < 4 * exec.threads * tiles * tile) tiles /= 2;
  // As many blocks for each thread where there are few, of nearly equal height.
  const int64_t most = tiles * tile, turns = 1 + (rows - 1) / (most * exec.threads);
  const int64_t blocks = std::min(turns * exec.threads, (rows + tile - 1) / tile), block = 1 + (rows - 1) / blocks;
  const int64_t out_size = dtype_size(a.out_type) * w.columns;
  std::atomic<Status> failure{kOk};

  const bool done = parallel_for(exec, blocks, 1, [&](int64_t begin, int64_t end) {
    // linear() has the thread's Workspace; this stays with the thread as that does.
    static thread_local AlignedBuffer<float> gathered;
    const size_t need = static_cast<size_t>(block * w.k);
    if (gathered.size() < need && !gathered.reset(need)) return failure.store(kNoMemory);
    for (int64_t i = begin; i < end && failure.load() == kOk; ++i) {
      const int64_t last = rows * (i + 1) / blocks;
      for (int64_t r = rows * i / blocks; r < last;) {
        // Rows of one batch entry: they are contiguous in the result.
        int64_t b = r / std::max<int64_t>(tokens, 1), stop, at;
        if (a.indices) {
          b = std::upper_bound(a.batch_offsets, a.batch_offsets + a.batch + 1, r) - a.batch_offsets - 1;
          stop = std::min<int64_t>(last, a.batch_offsets[b + 1]);
          at = r;
        } else {
          stop = std::min(last, (b + 1) * tokens);
          at = b * a.out_rows + a.out_first + r - b * tokens;
        }
        const auto token_of = [&](int64_t j) { return a.indices ? a.indices[j] : j - b * tokens; };
        for (int64_t j = r; j < stop;) {
          const int64_t token = token_of(j), most = std::min(stop - j, a.grid[2] - token % a.grid[2]);
          int64_t count = 1;
          while (count < most && token_of(j + count) == token + count) ++count;
          float* to = gathered.data() + (j - r) * w.k;
          const float *scale = runs.data(), *shift = runs.data() + run;
          if (a.type == DType::kUint8) gather_rows_of<uint8_t>(a, scale, shift, b, token, count, w.k, to);
          else if (a.type == DType::kBFloat16) gather_rows_of<uint16_t>(a, scale, shift, b, token, count, w.k, to);
          else gather_rows_of<float>(a, scale, shift, b, token, count, w.k, to);
          j += count;
        }
        Exec alone = exec;
        alone.threads = 1;
        if (a.to) {
          FusedLinearArgs product;
          product.weight = a.weight;
          product.x = gathered.data();
          product.rows = stop - r;
          product.bias = a.bias;
          for (int t = 0; t < 2; ++t) {
            product.add[t] = a.add[t];
            product.add_index[t] = a.add_index[t] ? a.add_index[t] + r : nullptr;
          }
          product.out = static_cast<float*>(a.out);
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
        product.bias = a.bias;
        product.out = static_cast<char*>(a.out) + at * out_size;
        product.out_type = a.out_type;
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
