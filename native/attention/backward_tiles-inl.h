// Micro-kernels of attention's backward; see attention_backward.h for what they rest on. Rows of q and of the upstream are
// packed by block as [vector of W columns][row][W]: the products with keys broadcast single elements of a row, the
// gradients of keys load its vectors, and no row is transposed. Weights and slopes lie in cells, [row][key] of the rows of
// one block and one sub-panel.

constexpr int kBlockRows = 112 / kRows * kRows;
constexpr int kCell = kBlockRows * kSub;

// c[r][k] = sum over d of rows[r][d] keys[d][k]: R rows, C vectors of keys.
template <int R, int C>
static void product_tile(const float* rows, const float* keys, int dim, float* c) {
  vf t[R][C];
  clear_tile(t);
  for (int d = 0; d < dim; d += W, rows += kBlockRows * W) {
    const int n = dim - d < W ? dim - d : W;
    for (int e = 0; e < n; ++e, keys += kColumns) {
      vf b[C];
      for (int i = 0; i < C; ++i) b[i] = load(keys + i * W);
      HEDDLE_UNROLL(16)
      for (int r = 0; r < R; ++r) {
        const vf x = set1(rows[r * W + e]);
        for (int i = 0; i < C; ++i) t[r][i] = fma(x, b[i], t[r][i]);
      }
    }
  }
  HEDDLE_UNROLL(16)
  for (int r = 0; r < R; ++r) {
    for (int i = 0; i < C; ++i) store(c + r * kSub + i * W, t[r][i]);
  }
}

template <int R, int C>
HEDDLE_INLINE void add_tile(vf (&t)[R][C], float* c, int64_t stride) {
  HEDDLE_UNROLL(16)
  for (int r = 0; r < R; ++r) {
    for (int i = 0; i < C; ++i) store(c + r * stride + i * W, add(load(c + r * stride + i * W), t[r][i]));
  }
}

// Sub-panels whose slopes are kept until q gets its sums: chains of 128 keys, whose columns of K stay in L1.
constexpr int kCells = 4;

// c[r] += sum over the keys of a chunk below `limit`, in the sub-panels that are seen, of slopes[r][key] keys[key]: R rows,
// C vectors of columns.
template <int R, int C>
static void query_tile(const float* slopes, const float* keys, uint32_t seen, int limit, float* c, int64_t stride) {
  vf t[R][C];
  clear_tile(t);
  for (int sub = 0; sub < kCells; ++sub) {
    if (!(seen >> sub & 1)) continue;
    const float *a = slopes + sub * kCell, *k = keys + sub * kSub * kColumns;
    const int count = limit - sub * kSub < kSub ? limit - sub * kSub : kSub;
    for (int j = 0; j < count; ++j, k += kColumns) {
      vf b[C];
      for (int i = 0; i < C; ++i) b[i] = load(k + i * W);
      HEDDLE_UNROLL(16)
      for (int r = 0; r < R; ++r) {
        const vf x = set1(a[r * kSub + j]);
        for (int i = 0; i < C; ++i) t[r][i] = fma(x, b[i], t[r][i]);
      }
    }
  }
  add_tile<R, C>(t, c, stride);
}

// c[k] += sum over n rows of cell[row][k] rows[row]: R keys, C vectors of columns.
template <int R, int C>
static void key_tile(const float* cell, const float* rows, int n, float* c, int64_t stride) {
  vf t[R][C];
  clear_tile(t);
  for (int j = 0; j < n; ++j, cell += kSub, rows += W) {
    vf b[C];
    for (int i = 0; i < C; ++i) b[i] = load(rows + i * kBlockRows * W);
    HEDDLE_UNROLL(16)
    for (int r = 0; r < R; ++r) {
      const vf x = set1(cell[r]);
      for (int i = 0; i < C; ++i) t[r][i] = fma(x, b[i], t[r][i]);
    }
  }
  add_tile<R, C>(t, c, stride);
}

struct ProductCall {
  const float *rows, *keys;
  int dim, limit;  // keys of the cell
  float* cell;
  template <int R>
  inline void run() const {
    for (int j = 0; j < limit; j += kColumns) {
      if (limit - j > W) {
        product_tile<R, 2>(rows, keys + int64_t{j} * dim, dim, cell + j);
      } else {
        product_tile<R, 1>(rows, keys + int64_t{j} * dim, dim, cell + j);
      }
    }
  }
};

struct QueryCall {
  const float *slopes, *keys;
  uint32_t seen;
  int limit;
  float* sums;
  int64_t stride;
  bool two;
  template <int R>
  inline void run() const {
    if (two) {
      query_tile<R, 2>(slopes, keys, seen, limit, sums, stride);
    } else {
      query_tile<R, 1>(slopes, keys, seen, limit, sums, stride);
    }
  }
  // Where a key of the panel is infinite or NaN: keys of slope 0 are left out.
  inline void run_carefully(int rows) const {
    for (int r = 0; r < rows; ++r) {
      for (int c = 0; c < (two ? kColumns : W); c += W) {
        vf t = set1(0.0f);
        for (int j = 0; j < kCells * kSub && j < limit; ++j) {
          const float x = seen >> j / kSub & 1 ? slopes[j / kSub * kCell + r * kSub + j % kSub] : 0.0f;
          if (x != 0.0f) t = fma(set1(x), load(keys + j * kColumns + c), t);
        }
        float* to = sums + r * stride + c;
        store(to, add(load(to), t));
      }
    }
  }
};

struct KeyCall {
  const float *cell, *rows;
  int count;
  float* sums;
  int64_t stride;
  bool two;
  template <int R>
  inline void run() const {
    if (two) {
      key_tile<R, 2>(cell, rows, count, sums, stride);
    } else {
      key_tile<R, 1>(cell, rows, count, sums, stride);
    }
  }
};

// sums[key] += sum over `count` rows of cell[row][key] rows[row], for the first `keys` keys of a cell.
HEDDLE_INLINE void add_keys(const float* cell, const float* rows, int count, int keys, int dim, float* sums) {
  const int tiles = (keys + kRows - 1) / kRows, stride = whole_columns(dim);
  for (int c = 0; c < dim; c += kColumns) {
    for (int i = 0; i < tiles; ++i) {
      const int begin = keys * i / tiles, end = keys * (i + 1) / tiles;
      with_rows<kRows>(end - begin, KeyCall{cell + begin, rows + int64_t{c} * kBlockRows, count,
                                            sums + int64_t{begin} * stride + c, stride, dim - c > W});
    }
  }
}

template <DType T>
static void pack_row_as(const Vectors& x, int64_t at, float* to) {
  for (int d = 0; d < x.dim; d += W, to += kBlockRows * W) store(to, load_float(x.data, T, at + d, x.dim - d));
}

// One row of a block; `to` is its first vector.
HEDDLE_INLINE void pack_row(const Vectors& x, int64_t at, float* to) {
  if (x.element_stride != 1) {
    for (int d = 0; d < x.dim; d += W, to += kBlockRows * W) store(to, load_lanes(x, at, d));
  } else if (x.type == DType::kFloat32) {
    pack_row_as<DType::kFloat32>(x, at, to);
  } else if (x.type == DType::kBFloat16) {
    pack_row_as<DType::kBFloat16>(x, at, to);
  } else {
    pack_row_as<DType::kFloat16>(x, at, to);
  }
}
