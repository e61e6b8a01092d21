// One part of one sequence for one key head and up to 16 rows: see decode_attention.cu.
#pragma once
#include "attention/decode_rows.cuh"

namespace heddle {

struct DecodeShared {
  int64_t fragments, results, logits, bytes;
};
inline DecodeShared decode_shared(int pieces, int steps, int rows, int columns, bool formed) {
  DecodeShared s;
  s.fragments = 0;
  s.results = int64_t{16} * pieces * steps * kWarp;
  s.logits = s.results + int64_t{4} * kDecodeWarps * rows * (columns + 2);
  s.bytes = s.logits + (formed ? int64_t{4} * 16 * kDecodeThreads : 0);
  return s;
}

// What a row of the tile sees: keys [lo, hi) of the part, the key of its own token, both counted from the part's first.
struct alignas(16) PartRow {
  int32_t lo, hi, own, head;
};

// blockIdx.x: batch entry and part; blockIdx.y: key head, tile of rows and slice of Width value columns. Pages of a
// multiple of 16 slots, value dims a multiple of 4.
//
// 128 registers of a thread are sums where Width is 256: what is the same for a row or a page stands in shared memory,
// and keys are counted from the part's first in 32 bits.
// Where elements are split into pieces, ptxas would spill to fit three blocks on a multiprocessor.
template <CacheType T, int Pieces, int Width>
__global__ void __launch_bounds__(kDecodeThreads, WordSteps<T>::kPieces > 1 ? 2 : 1) decode_part_kernel(DecodeLaunch d, DecodeShared layout) {
  using Steps = WordSteps<T>;
  constexpr int kGroups = Width / 32;
  // Loads under way, as far as registers reach without spills.
  [[maybe_unused]] constexpr int kUnroll = Width > 128 && Steps::kPieces > 1 ? 1 : Width > 128 || Pieces > 1 ? 2 : 4;
  __shared__ int64_t pages[kPartBlocks];  // where each 16 keys of the part lie for this key head, in 16 slots; -1: nowhere
  __shared__ PartRow row_table[kDecodeRows];
  HEDDLE_DYNAMIC_SHARED(unsigned char, shared);
  auto* fragments = reinterpret_cast<uint4*>(shared);
  auto* results = reinterpret_cast<float*>(shared + layout.results);
  const AttentionProblem& p = d.a.problem;
  const KvPools& pools = d.pools;
  const int64_t batch = blockIdx.x / d.max_parts, part = blockIdx.x % d.max_parts;
  const DecodeSpan span = decode_span(d.a, batch);
  if (part >= span.count) return;
  const int32_t slice = static_cast<int32_t>(blockIdx.y) % d.slices;
  const int64_t first_row = int64_t{blockIdx.y} / d.slices % d.row_tiles * kDecodeRows;
  const int64_t key_head = blockIdx.y / (d.slices * d.row_tiles), group = p.group();
  const int64_t length = d.a.lengths[batch], start = d.a.starts[batch];
  const int64_t left = p.queries * group - first_row;
  const int rows = left < kDecodeRows ? static_cast<int>(left) : kDecodeRows;
  const int64_t part_begin = (span.first + part) * span.keys;
  auto in_part = [&](int64_t key) {
    key -= part_begin;
    return static_cast<int32_t>(key < 0 ? 0 : key > span.keys ? span.keys : key);
  };
  const int32_t begin = in_part(decode_row(p, length, key_head, first_row).lo);
  const int32_t end = in_part(decode_row(p, length, key_head, first_row + rows - 1).hi);
  if (begin >= end) {
    for (int r = static_cast<int>(threadIdx.x); r < rows; r += kDecodeThreads) {
      float* to = partial_of(d, batch, part, key_head, first_row + r);
      to[0] = kNegInf;
      to[1] = 0.0f;
    }
    return;
  }
  const int warp = static_cast<int>(threadIdx.x) / kWarp, lane = static_cast<int>(threadIdx.x) % kWarp;
  const int g = lane / 4, t = lane % 4;
  const int words = static_cast<int>(pools.key_words());
  const int steps = key_steps<T>(words);
  const bool formed = p.softcap > 0.0f || p.alibi || !(p.scale > 0.0f);
  const float unit = formed ? kLog2OfE : p.scale * kLog2OfE;

  // Which pages: looked up once for the whole part.
  for (int i = begin / kDecodeTile * kTileBlocks + static_cast<int>(threadIdx.x); i * kSlotBlock < end + kDecodeTile &&
       i < kPartBlocks; i += kDecodeThreads) {
    const int64_t key = part_begin + i * kSlotBlock;
    pages[i] = -1;
    if (key >= start && key < length) {
      const PageSlot x = page_slot(pools, d.a.table + batch * d.a.table_stride, start, key);
      pages[i] = (x.page * pools.key_heads + key_head) * (pools.slots() / kSlotBlock) + x.slot / kSlotBlock;
    }
  }
  if (threadIdx.x < kDecodeRows) {
    const DecodeRow row = decode_row(p, length, key_head, first_row + threadIdx.x);
    row_table[threadIdx.x] = {in_part(row.lo), in_part(row.hi), static_cast<int32_t>(row.own - part_begin), row.head};
  }
  // q as A fragments.
  for (int i = static_cast<int>(threadIdx.x); i < steps * kWarp; i += kDecodeThreads) {
    const int s = i / kWarp, l = i % kWarp;
    float x[4][2];
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      const int64_t row = first_row + l / 4 + k % 2 * 8;
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        const int dim = Steps::dim(s, l % 4, k / 2, e);
        const bool inside = row < first_row + rows && dim < p.head_dim;
        const int64_t head = key_head * group + row % group;
        x[k][e] = inside ? load_as_float(p.query, p.type, query_start(p, batch, row) + head * p.query_stride[2] + dim) : 0.0f;
      }
    }
#pragma unroll
    for (int j = 0; j < Pieces; ++j) {
      uint32_t a[4];
#pragma unroll
      for (int k = 0; k < 4; ++k) a[k] = take_piece(x[k][0], x[k][1]);
      fragments[(j * steps + s) * kWarp + l] = make_uint4(a[0], a[1], a[2], a[3]);
    }
  }
  __syncthreads();

  const int32_t key_bytes = kSlotBlock * words * cache_word_bytes(T);
  const int32_t value_bytes = kSlotBlock / cache_group(T) * pools.value_dim * cache_word_bytes(T);
  auto block_of = [&](const void* pool, int64_t index, int32_t bytes) {
    return index < 0 ? nullptr : static_cast<const char*>(pool) + index * bytes;
  };
  const int32_t column = slice * Width;
  const int32_t columns = pools.value_dim - column < Width ? pools.value_dim - column : Width;

  float out[kGroups * 4][4] = {};
  float m[2] = {kNegInf, kNegInf}, total[2] = {0.0f, 0.0f};
  bool odd[2] = {false, false};
#pragma unroll 1
  for (int32_t tile = warp * kDecodeTile; tile < end; tile += kDecodeWarps * kDecodeTile) {
    if (tile + kDecodeTile <= begin) continue;
    const int64_t* tile_pages = pages + tile / kSlotBlock;
    // What comes next is asked for while this tile is computed.
    if (tile + kDecodeWarps * kDecodeTile < end) {
      const int64_t next = tile_pages[kDecodeWarps * kTileBlocks + lane / 16];
      if (next >= 0) {
        const char* k = block_of(pools.keys, next, key_bytes);
        const char* v = block_of(pools.values, next, value_bytes);
        for (int32_t o = lane % 16 * 128; o < key_bytes; o += 16 * 128) prefetch_l2(k + o);
        for (int32_t o = lane % 16 * 128; o < value_bytes; o += 16 * 128) prefetch_l2(v + o);
      }
    }

    float z[4][4] = {};
    const char* keys = block_of(pools.keys, tile_pages[g / 4], key_bytes);
#pragma unroll kUnroll
    for (int s = 0; s < steps; s += Steps::kDepth) {
      Fragments<T> f;
      f.fill([&](int i) {
        // The word column of half i; of fp32 and fp16 the dim of half i / 2 and element i % 2.
        const int c = T == CacheType::kBFloat16                                       ? 8 * s + 4 * i + t
                          : T == CacheType::kFloat32 || T == CacheType::kFloat16 ? 16 * s + 2 * t + i / 2 * 8 + i % 2
                                                                                 : 4 * (s / Steps::kDepth) + t;
        return load_words<T>(keys, c * kSlotBlock + 4 * (g % 4), keys && c < words);
      });
#pragma unroll
      for (int depth = 0; depth < Steps::kDepth; ++depth) {
        uint32_t a[Pieces][4];
#pragma unroll
        for (int j = 0; j < Pieces; ++j) {
          const uint4 x = fragments[(j * steps + s + depth) * kWarp + lane];
          a[j][0] = x.x, a[j][1] = x.y, a[j][2] = x.z, a[j][3] = x.w;
        }
        multiply_pieces<Pieces, T>(z, a, f, depth);
      }
    }
    // z[r][e]: row g (e < 2) or g + 8, key tile + 8t + r + 4 (e % 2).
    if constexpr (cache_is_integer(T)) {
      const int64_t page = tile_pages[t / 2], slot = page * kSlotBlock + t % 2 * 8;
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        const float scale = page < 0 ? 0.0f : __ldg(pools.key_scales + slot + i);
        z[i % 4][i / 4] *= scale;
        z[i % 4][2 + i / 4] *= scale;
      }
    }
    if (formed) {
      // By way of shared memory, so that the code for one logit stands here once instead of once per register.
      float* own_logits = reinterpret_cast<float*>(shared + layout.logits) + threadIdx.x;
#pragma unroll
      for (int i = 0; i < 16; ++i) own_logits[i * kDecodeThreads] = z[i / 4][i % 4];
#pragma unroll 1
      for (int i = 0; i < 16; ++i) {
        const PartRow row = row_table[g + i % 4 / 2 * 8];
        float* logit = own_logits + i * kDecodeThreads;
        *logit = decode_logit(p, row.head, row.own - (tile + 8 * t + i / 4 + i % 2 * 4), *logit);
      }
#pragma unroll
      for (int i = 0; i < 16; ++i) z[i / 4][i % 4] = own_logits[i * kDecodeThreads];
    }
    float keep[2];
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int32_t lo = row_table[g + 8 * h].lo, hi = row_table[g + 8 * h].hi;
      float top = kNegInf;
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        float& x = z[i % 4][2 * h + i / 4];
        const int32_t key = tile + 8 * t + i;
        if (key < lo || key >= hi) x = kNegInf;
        else if (!(fabsf(x) < HUGE_VALF)) odd[h] = true;
        top = fmaxf(top, x);
      }
      top = fmaxf(top, __shfl_xor_sync(kFullMask, top, 1));
      top = fmaxf(top, __shfl_xor_sync(kFullMask, top, 2));
      top = fmaxf(m[h], top * unit);
      const float base = top == kNegInf ? 0.0f : top;
      keep[h] = m[h] == kNegInf ? 0.0f : exp2f(m[h] - base);
      m[h] = top;
      float sum = 0.0f;
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        float& x = z[i % 4][2 * h + i / 4];
        x = x == kNegInf ? 0.0f : exp2f(fmaf(x, unit, -base));
        sum += x;
      }
      sum += __shfl_xor_sync(kFullMask, sum, 1);
      sum += __shfl_xor_sync(kFullMask, sum, 2);
      total[h] = fmaf(total[h], keep[h], sum);
    }
    if constexpr (cache_is_integer(T)) {
      const int64_t page = tile_pages[t / 2], slot = page * kSlotBlock + t % 2 * 8;
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        const float scale = page < 0 ? 0.0f : __ldg(pools.value_scales + slot + i);
        float &first = z[i % 4][i / 4], &second = z[i % 4][2 + i / 4];
        if (first != 0.0f) first *= scale;
        if (second != 0.0f) second *= scale;
      }
    }
    if (__any_sync(kFullMask, keep[0] != 1.0f || keep[1] != 1.0f)) {
#pragma unroll
      for (int n = 0; n < kGroups * 4; ++n) {
#pragma unroll
        for (int e = 0; e < 4; ++e) out[n][e] *= keep[e / 2];
      }
    }
    // Weights as A fragments of the two steps of depth 16.
    uint32_t w[2][Pieces][4];
#pragma unroll
    for (int s = 0; s < 2; ++s) {
#pragma unroll
      for (int j = 0; j < Pieces; ++j) {
        w[s][j][0] = take_piece(z[0][s], z[1][s]);
        w[s][j][1] = take_piece(z[0][2 + s], z[1][2 + s]);
        w[s][j][2] = take_piece(z[2][s], z[3][s]);
        w[s][j][3] = take_piece(z[2][2 + s], z[3][2 + s]);
      }
    }
    const char* values = block_of(pools.values, tile_pages[t / 2], value_bytes);
    const int first = t % 2 * 8;  // slot of the lane's eight in its block
#pragma unroll
    for (int n = 0; n < kGroups; ++n) {
      if (n * 32 >= columns) continue;
      const int32_t dim = n * 32 + 4 * g;
      const bool present = values && dim < columns;
#pragma unroll
      for (int s = 0; s < 2; s += Steps::kDepth) {
        Fragments<T> f;
        f.fill([&](int i) {
          // The group of slots of half i; of fp32 and fp16 the slot of half i / 2 and element i % 2.
          const int row = T == CacheType::kBFloat16                                       ? (first + 4 * s) / 2 + i
                          : T == CacheType::kFloat32 || T == CacheType::kFloat16 ? first + 4 * s + i
                          : T == CacheType::kInt8                                ? first / 4 + s
                                                                                 : first / 8;
          return load_words<T>(values, row * pools.value_dim + column + dim, present);
        });
#pragma unroll
        for (int depth = 0; depth < Steps::kDepth; ++depth) multiply_pieces<Pieces, T>(out + n * 4, w[s + depth], f, depth);
      }
    }
  }

  // Sums that are not finite: an element was, under whatever weight, or the result is.
  const int stride = columns + 2;
  float* mine = results + warp * rows * stride;
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    float check = 0.0f;
#pragma unroll
    for (int n = 0; n < kGroups * 4; ++n) check = fmaf(out[n][2 * h], 0.0f, fmaf(out[n][2 * h + 1], 0.0f, check));
    odd[h] = odd[h] || check != 0.0f;
    odd[h] = __shfl_xor_sync(kFullMask, static_cast<int>(odd[h]), 1) || odd[h];
    odd[h] = __shfl_xor_sync(kFullMask, static_cast<int>(odd[h]), 2) || odd[h];
    const bool exists = g + 8 * h < rows;
    if (exists && !odd[h]) {
      float* to = mine + (g + 8 * h) * stride;
      if (t == 0) {
        to[0] = m[h];
        to[1] = total[h];
      }
#pragma unroll
      for (int n = 0; n < kGroups * 4; ++n) {
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          const int c = n / 4 * 32 + 4 * (2 * t + e) + n % 4;
          if (c < columns) to[2 + c] = out[n][2 * h + e];
        }
      }
    }
    uint32_t again = __ballot_sync(kFullMask, exists && odd[h] && t == 0);
#pragma unroll 1
    for (; again; again &= again - 1) {
      const int r = (__ffs(static_cast<int>(again)) - 1) / 4 + 8 * h;
      careful_row<T>(d, batch, key_head, first_row + r, part_begin + begin, part_begin + end, part_begin + warp * kDecodeTile,
                     column, columns, formed, unit, mine + r * stride);
    }
  }
  __syncthreads();
  // The warps' results in their order.
  for (int i = static_cast<int>(threadIdx.x); i < rows * columns; i += kDecodeThreads) {
    const int r = i / columns, c = i % columns;
    const float* x = results + r * stride;
    float top = kNegInf, sum = 0.0f, value = 0.0f;
#pragma unroll
    for (int k = 0; k < kDecodeWarps; ++k) top = fmaxf(top, x[k * rows * stride]);
    const float base = top == kNegInf ? 0.0f : top;
#pragma unroll
    for (int k = 0; k < kDecodeWarps; ++k) {
      const float* y = x + k * rows * stride;
      const float factor = y[0] == kNegInf ? (y[1] == 0.0f ? 0.0f : 1.0f) : exp2f(y[0] - base);
      if (factor == 0.0f) continue;  // what weighs nothing must not bring in an infinity
      sum = fmaf(y[1], factor, sum);
      value = fmaf(y[2 + c], factor, value);
    }
    float* to = partial_of(d, batch, part, key_head, first_row + r);
    to[kPartialHead + column + c] = value;
    if (c == 0 && slice == 0) {
      to[0] = top;
      to[1] = sum;
    }
  }
}

template <CacheType T, int Pieces, int Width>
int64_t launch_parts(DecodeLaunch& d, heddle_cuda_job& job) {
  const AttentionProblem& p = d.a.problem;
  const int64_t rows = p.queries * p.group();
  d.row_tiles = static_cast<int32_t>(ceil_div(rows, kDecodeRows));
  d.slices = static_cast<int32_t>(ceil_div(d.pools.value_dim, Width));
  const int columns = d.pools.value_dim < Width ? d.pools.value_dim : Width;
  const bool formed = p.softcap > 0.0f || p.alibi || !(p.scale > 0.0f);
  const DecodeShared shared = decode_shared(Pieces, key_steps<T>(d.pools.key_words()),
                                            static_cast<int>(rows < kDecodeRows ? rows : kDecodeRows), columns, formed);
  const dim3 grid(static_cast<unsigned>(p.batch * d.max_parts),
                  static_cast<unsigned>(p.key_heads * d.row_tiles * d.slices));
  if (p.batch * d.max_parts > INT32_MAX || int64_t{p.key_heads} * d.row_tiles * d.slices > 65535) return kUnsupported;
  HEDDLE_ALLOW_SHARED((decode_part_kernel<T, Pieces, Width>), shared.bytes);
  HEDDLE_LAUNCH((decode_part_kernel<T, Pieces, Width>), grid, dim3(kDecodeThreads), shared.bytes, job.stream, d, shared);
  return job.launched();
}

template <CacheType T>
int64_t launch_decode_parts(DecodeLaunch& d, heddle_cuda_job& job) {
  const bool wide = d.pools.value_dim > 128;
  // With q in bf16 its weights are rounded to bf16 as well, as in attention(); the float caches keep all bits.
  if constexpr (T == CacheType::kBFloat16 || cache_is_integer(T)) {
    if (d.a.problem.type == DType::kBFloat16) return wide ? launch_parts<T, 1, 256>(d, job) : launch_parts<T, 1, 128>(d, job);
  }
  return wide ? launch_parts<T, 3, 256>(d, job) : launch_parts<T, 3, 128>(d, job);
}

}  // namespace heddle
