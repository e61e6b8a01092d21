// Short sequences: packing and micro-kernels.

// Keys as [group][kElements][key][element]: a step of a tile reads elements that lie a constant apart.
template <DType T>
static void pack_keys_as(const Vectors& x, const int64_t* at, int count, float* out) {
  for (int g = 0; g < groups_of(count); ++g, out += kRows * key_floats(x.dim)) {
    float* row = out;
    for (int j = group_begin(count, g); j < group_begin(count, g + 1); ++j, row += kElements) {
      int d = 0;
      for (; d + 4 * W <= x.dim; d += 4 * W) {  // loads first: a store not yet done holds up loads of like addresses
        vf t[4];
        HEDDLE_UNROLL(4)
        for (int i = 0; i < 4; ++i) t[i] = load_float(x.data, T, at[j] + d + i * W, W);
        float* to = row + d / kElements * (kRows * kElements) + d % kElements;
        HEDDLE_UNROLL(4)
        for (int i = 0; i < 4; ++i) store(to + i * W, t[i]);
      }
      for (; d < x.dim; d += W) {
        float* to = row + d / kElements * (kRows * kElements) + d % kElements;
        store(to, load_float(x.data, T, at[j] + d, x.dim - d));
      }
    }
  }
}

HEDDLE_INLINE void pack_keys(const Vectors& x, const int64_t* at, int count, float* out) {
  if (x.element_stride != 1) {
    for (int g = 0; g < groups_of(count); ++g, out += kRows * key_floats(x.dim)) {
      float* row = out;
      for (int j = group_begin(count, g); j < group_begin(count, g + 1); ++j, row += kElements) {
        for (int d = 0; d < x.dim; d += W) {
          store(row + d / kElements * (kRows * kElements) + d % kElements, load_lanes(x, at[j], d));
        }
      }
    }
  } else if (x.type == DType::kFloat32) {
    pack_keys_as<DType::kFloat32>(x, at, count, out);
  } else if (x.type == DType::kBFloat16) {
    pack_keys_as<DType::kBFloat16>(x, at, count, out);
  } else {
    pack_keys_as<DType::kFloat16>(x, at, count, out);
  }
}

// Packs all keys and values of a unit; returns whether the values are finite.
HEDDLE_INLINE bool pack_short(const AttentionProblem& p, const AttentionUnit& u, const ShortScratch& m) {
  const Sequence& s = u.sequence;
  const int keys = static_cast<int>(s.keys);
  int64_t at[kMaxPanel];
  const auto same = [](int64_t x) { return x; };
  list_positions(p, 0, keys, p.key_stride[1], at, [&](int64_t i) { return p.key_at(s, i, u.key_head); }, same);
  pack_keys(Vectors{p.key, p.type, p.key_stride[3], p.head_dim}, at, keys, m.keys);
  list_positions(p, 0, keys, p.value_stride[1], at, [&](int64_t i) { return p.value_at(s, i, u.key_head); }, same);
  const Vectors values{p.value, p.type, p.value_stride[3], p.value_dim};
  return pack_values(values, at, 0, keys, m.values, keys);
}

// Products of R keys with C vectors of query rows.
template <int R, int C>
static void key_tile(const float* k, const float* q, int dim, float* s, Fetch* fetch) {
  vf a[R][C];
  clear_tile(a);
  int lines = fetch->share(dim);
  Fetch f = *fetch;
  for (int d = 0; d < dim; d += kElements, k += (kRows - 1) * kElements) {
    const int n = dim - d < kElements ? dim - d : kElements;
    for (int i = 0; i < n; ++i) {
      vf b[C];
      for (int c = 0; c < C; ++c) b[c] = load(q + c * W);
      HEDDLE_UNROLL(16)
      for (int r = 0; r < R; ++r) {
        const vf x = set1(k[r * kElements]);
        for (int c = 0; c < C; ++c) a[r][c] = fma(x, b[c], a[r][c]);
      }
      if (lines > 0) {
        --lines;
        f.line();
      }
      q += kColumns;
      ++k;
    }
  }
  fetch->next = f.next;
  fetch->at = f.at;
  HEDDLE_UNROLL(16)
  for (int r = 0; r < R; ++r) {
    for (int c = 0; c < C; ++c) store(s + r * kChunkRows + c * W, a[r][c]);
  }
}

struct KeyTileCall {
  const float *keys, *query;
  int dim, rows;
  float* scores;
  Fetch* fetch;
  template <int R>
  inline void run() const {
    for (int r = 0; r < rows; r += kColumns) {
      const float* q = query + int64_t{r} * dim;
      if (rows - r > W) {
        key_tile<R, 2>(keys, q, dim, scores + r, fetch);
      } else {
        key_tile<R, 1>(keys, q, dim, scores + r, fetch);
      }
    }
  }
};

// out[r] = scale[r] * sum over the keys of weight[key][r] * value[key], C vectors of columns.
template <int R, int C>
static void weigh_tile(const float* w, const float* v, int keys, const float* scale, float* const* out, int column,
                       Fetch* fetch) {
  vf a[R][C];
  clear_tile(a);
  int lines = fetch->share(keys);
  Fetch f = *fetch;
  for (int k = 0; k < keys; ++k) {
    vf b[C];
    for (int c = 0; c < C; ++c) b[c] = load(v + c * W);
    HEDDLE_UNROLL(16)
    for (int r = 0; r < R; ++r) {
      const vf x = set1(w[r]);
      for (int c = 0; c < C; ++c) a[r][c] = fma(x, b[c], a[r][c]);
    }
    if (lines > 0) {
      --lines;
      f.line();
    }
    w += kChunkRows;
    v += kColumns;
  }
  fetch->next = f.next;
  fetch->at = f.at;
  HEDDLE_UNROLL(16)
  for (int r = 0; r < R; ++r) {
    const vf x = set1(scale[r]);
    for (int c = 0; c < C; ++c) store(out[r] + column + c * W, mul(a[r][c], x));
  }
}

struct WeighCall {
  const float *weights, *values;  // from the first key that counts
  int keys, panel, value_dim;
  const float* scale;
  float* const* out;
  Fetch* fetch;
  template <int R>
  inline void run() const {
    for (int c = 0; c < value_dim; c += kColumns) {
      const float* v = values + int64_t{c} * panel;
      if (value_dim - c > W) {
        weigh_tile<R, 2>(weights, v, keys, scale, out, c, fetch);
      } else {
        weigh_tile<R, 1>(weights, v, keys, scale, out, c, fetch);
      }
    }
  }
};

// The same where values are not finite: those of weight 0 are left out.
static void weigh_careful(const WeighCall& x, int rows) {
  for (int r = 0; r < rows; ++r) {
    for (int c = 0; c < x.value_dim; c += W) {
      const float* v = x.values + int64_t{c / kColumns * kColumns} * x.panel + c % kColumns;
      vf a = set1(0.0f);
      for (int k = 0; k < x.keys; ++k) {
        const float w = x.weights[k * kChunkRows + r];
        if (w != 0.0f) a = fma(set1(w), load(v + int64_t{k} * kColumns), a);
      }
      store(x.out[r] + c, mul(a, set1(x.scale[r])));
    }
  }
}
