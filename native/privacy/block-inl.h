// Blocks of products on the vector vocabulary; see kernels.h.

constexpr int kVectors = kBlock / W;        // vectors of a panel row
constexpr int kWide = W == 4 ? 4 : 2;       // vectors of a tile; half of them where few columns are left
constexpr int kNarrow = kWide / 2;
// Accumulators + panel vectors + one broadcast fit the registers (avx512 folds the broadcast into the FMA).
constexpr int kWideRows = W == 16 ? 14 : W == 1 ? 4 : 6;
constexpr int kNarrowRows = W == 16 ? 16 : W == 1 ? 4 : 12;

template <int MR, int NV>
void block_tile(const float* HEDDLE_RESTRICT p, const float* HEDDLE_RESTRICT q, int64_t depth, float* c, bool first,
                Ahead* ahead) {
  vf acc[MR][NV];
  HEDDLE_UNROLL(16)
  for (int m = 0; m < MR; ++m) {
    HEDDLE_UNROLL(4)
    for (int v = 0; v < NV; ++v) acc[m][v] = set1(0.0f);
  }
  for (int64_t y = 0; y < depth; ++y) {
    // Spread out: a burst of misses would stop the loads of the products themselves.
    if (y % 4 == 0 && ahead->next < ahead->end) HEDDLE_PREFETCH_L2(*ahead->next++);
    vf b[NV];
    HEDDLE_UNROLL(4)
    for (int v = 0; v < NV; ++v) b[v] = load(q + y * kBlock + v * W);
    HEDDLE_UNROLL(16)
    for (int m = 0; m < MR; ++m) {
      const vf a = set1(p[y * kBlock + m]);
      HEDDLE_UNROLL(4)
      for (int v = 0; v < NV; ++v) acc[m][v] = fma(a, b[v], acc[m][v]);
    }
  }
  HEDDLE_UNROLL(16)
  for (int m = 0; m < MR; ++m) {
    HEDDLE_UNROLL(4)
    for (int v = 0; v < NV; ++v) {
      float* at = c + m * kBlock + v * W;
      store(at, first ? acc[m][v] : add(load(at), acc[m][v]));
    }
  }
}

using BlockTile = void (*)(const float*, const float*, int64_t, float*, bool, Ahead*);
struct BlockTiles {
  BlockTile wide[kWideRows + 1] = {}, narrow[kNarrowRows + 1] = {};
};
template <int MR>
HEDDLE_INLINE void fill_tiles(BlockTiles& t) {
  if constexpr (MR > 0) {
    if constexpr (MR <= kWideRows) t.wide[MR] = block_tile<MR, kWide>;
    if constexpr (MR <= kNarrowRows) t.narrow[MR] = block_tile<MR, kNarrow>;
    fill_tiles<MR - 1>(t);
  }
}
HEDDLE_INLINE BlockTiles make_tiles() {
  BlockTiles t;
  fill_tiles<16>(t);
  return t;
}
static const BlockTiles& block_tiles() {
  static const BlockTiles t = make_tiles();
  return t;
}

// Tiles of nearly equal height down one strip of columns.
HEDDLE_INLINE void strip(const BlockTile* tiles, int max_rows, const float* p, int rows, const float* q, int64_t depth,
                         float* c, bool first, Ahead* ahead) {
  const int count = (rows + max_rows - 1) / max_rows;
  for (int i = 0; i < count; ++i) {
    const int from = rows * i / count, to = rows * (i + 1) / count;
    tiles[to - from](p + from, q, depth, c + from * kBlock, first, ahead);
  }
}

static void block(const float* p, int rows, const float* q, int columns, int64_t depth, float* c, bool first, bool upper,
                  Ahead* ahead) {
  const BlockTiles& t = block_tiles();
  if (upper) {  // narrow strips follow the diagonal more closely: 3/4 of the block instead of all on avx512
    for (int x = 0; x < columns; x += kNarrow * W) {
      const int needed = x + kNarrow * W < rows ? x + kNarrow * W : rows;
      strip(t.narrow, kNarrowRows, p, needed, q + x, depth, c + x, first, ahead);
    }
    return;
  }
  int x = 0;
  for (; columns - x > kNarrow * W; x += kWide * W) strip(t.wide, kWideRows, p, rows, q + x, depth, c + x, first, ahead);
  for (; x < columns; x += kNarrow * W) strip(t.narrow, kNarrowRows, p, rows, q + x, depth, c + x, first, ahead);
}

static double block_dot(const float* x, const float* y, float shift, int rows, int columns, bool diagonal) {
  const vf s = set1(shift);
  vf sums[4] = {set1(0.0f), set1(0.0f), set1(0.0f), set1(0.0f)};
  for (int v = 0; v * W < columns; ++v) {
    const int c = v * W;
    const vi column = addi(iota(), set1i(c));
    const int needed = diagonal && c + W < rows ? c + W : rows;
    for (int r = 0; r < needed; ++r) {
      const vf a = add(load(x + r * kBlock + c), s), b = load(y + r * kBlock + c);
      if (!diagonal || r < c) {
        sums[r % 4] = fma(a, b, sums[r % 4]);
      } else {  // weights 0, 1/2, 1; selected, since what lies below the diagonal may never have been computed
        const vf product = mul(a, b);
        const vf on = select(eqi(column, set1i(r)), mul(set1(0.5f), product), set1(0.0f));
        sums[r % 4] = add(sums[r % 4], select(gti(column, set1i(r)), product, on));
      }
    }
  }
  const double total = static_cast<double>(reduce_add(add(sums[0], sums[1]))) + reduce_add(add(sums[2], sums[3]));
  return diagonal ? 2 * total : total;
}

static void column_sums(const float* panel, int64_t depth, float* sums, bool first) {
  vf s[kVectors];
  for (int v = 0; v < kVectors; ++v) s[v] = set1(0.0f);
  for (int64_t y = 0; y < depth; ++y) {
    HEDDLE_UNROLL(8)
    for (int v = 0; v < kVectors; ++v) s[v] = add(s[v], load(panel + y * kBlock + v * W));
  }
  for (int v = 0; v < kVectors; ++v) store(sums + v * W, first ? s[v] : add(load(sums + v * W), s[v]));
}

template <DType type>
void pack_rows_of(const RowSource& s, const int64_t* rows, const float* scale, int64_t column, int64_t count,
                  int64_t depth, float* out) {
  for (int64_t y = 0; y < depth; ++y) {
    const int64_t at = rows[y] * s.stride + column;
    const vf factor = set1(scale ? scale[y] : 1.0f);
    for (int64_t first = 0; first < count; first += kBlock) {
      float* o = out + first * depth + y * kBlock;
      for (int c = 0; c < kBlock; c += W) {
        const int64_t left = count - first - c;
        vf v = set1(0.0f);
        if (left >= W) v = load_as<type>(s.data, at + first + c, W);
        else if (left > 0) v = load_as<type>(s.data, at + first + c, static_cast<int>(left));
        store(o + c, scale ? mul(factor, v) : v);
      }
    }
  }
}

template <DType type>
void pack_columns_of(const RowSource& s, const int64_t* rows, int64_t count, int64_t column, int64_t depth, float factor,
                     float* out) {
  const vf scale = set1(factor);
  for (int64_t first = 0; first < count; first += kBlock) {
    for (int c = 0; c < kBlock; c += W) {
      float* o = out + first * depth + c;
      for (int64_t y = 0; y < depth; y += W) {
        const int n = depth - y < W ? static_cast<int>(depth - y) : W;
        vf v[W];
        HEDDLE_UNROLL(16)
        for (int i = 0; i < W; ++i) {
          const int64_t x = first + c + i;
          v[i] = set1(0.0f);
          if (x < count) {
            const int64_t at = rows[x] * s.stride + column + y;
            v[i] = load_as<type>(s.data, at, n);
          }
        }
        transpose(v);
        for (int i = 0; i < n; ++i) store(o + (y + i) * kBlock, mul(scale, v[i]));
      }
    }
  }
}

static void pack_rows(const RowSource& s, const int64_t* rows, const float* scale, int64_t column, int64_t count,
                      int64_t depth, float* out) {
  with_type(s.type, [&](auto t) { pack_rows_of<decltype(t)::value>(s, rows, scale, column, count, depth, out); });
}

static void pack_columns(const RowSource& s, const int64_t* rows, int64_t count, int64_t column, int64_t depth,
                         float factor, float* out) {
  with_type(s.type, [&](auto t) { pack_columns_of<decltype(t)::value>(s, rows, count, column, depth, factor, out); });
}
