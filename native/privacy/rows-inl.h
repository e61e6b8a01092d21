// Sums over rows: embeddings, normalisation layers, single positions. See kernels.h.

// fp32 lanes are emptied into a double every kRun elements, so that rounding does not grow with the row.
constexpr int64_t kRun = 4096;

template <DType T>
static double squared_row_of(const RowSource& s, int64_t row, int64_t n) {
  double total = 0;
  const int64_t at = row * s.stride;
  for (int64_t first = 0; first < n; first += kRun) {
    const int64_t end = first + kRun < n ? first + kRun : n;
    vf sums[4] = {set1(0.0f), set1(0.0f), set1(0.0f), set1(0.0f)};
    for (int64_t i = first; i < end; i += 4 * W) {
      HEDDLE_UNROLL(4)
      for (int u = 0; u < 4; ++u) {
        if (i + u * W >= end) break;
        const vf v = load_as<T>(s.data, at + i + u * W, end - i - u * W);
        sums[u] = fma(v, v, sums[u]);
      }
    }
    total += reduce_add(add(add(sums[0], sums[1]), add(sums[2], sums[3])));
  }
  return total;
}

static double squared_row(const RowSource& s, int64_t row, int64_t n) {
  return with_type(s.type, [&](auto t) { return squared_row_of<decltype(t)::value>(s, row, n); });
}

template <DType T>
static double sum_rows_of(const RowSource& s, const int64_t* rows, const float* scale, int64_t count, int64_t n,
                          float* out) {
  constexpr int U = 4;
  double total = 0;
  for (int64_t first = 0; first < n; first += kRun) {
    const int64_t end = first + kRun < n ? first + kRun : n;
    vf squares = set1(0.0f);
    for (int64_t i = first; i < end; i += U * W) {
      vf sums[U];
      HEDDLE_UNROLL(4)
      for (int u = 0; u < U; ++u) sums[u] = set1(0.0f);
      const int vectors = end - i >= U * W ? U : static_cast<int>((end - i + W - 1) / W);
      for (int64_t r = 0; r < count; ++r) {
        const vf factor = set1(scale ? scale[r] : 1.0f);
        const int64_t at = rows[r] * s.stride + i;
        if (vectors == U && end - i >= U * W) {
          HEDDLE_UNROLL(4)
          for (int u = 0; u < U; ++u) sums[u] = fma(factor, load_as<T>(s.data, at + u * W, W), sums[u]);
        } else {
          for (int u = 0; u < vectors; ++u) {
            sums[u] = fma(factor, load_as<T>(s.data, at + u * W, end - i - u * W), sums[u]);
          }
        }
      }
      for (int u = 0; u < vectors; ++u) {
        squares = fma(sums[u], sums[u], squares);
        if (!out) continue;
        const int64_t left = end - i - u * W;
        float* o = out + i + u * W;
        if (left >= W) store(o, add(load(o), sums[u]));
        else store_n(o, add(load_n(o, static_cast<int>(left), 0.0f), sums[u]), static_cast<int>(left));
      }
    }
    total += reduce_add(squares);
  }
  return total;
}

static double sum_rows(const RowSource& s, const int64_t* rows, const float* scale, int64_t count, int64_t n,
                       float* out) {
  return with_type(s.type, [&](auto t) { return sum_rows_of<decltype(t)::value>(s, rows, scale, count, n, out); });
}

template <DType X, DType G>
static void scale_rows_of(const RowSource& x, const RowSource& g, const int64_t* rows, const float* scale, int64_t count,
                          int64_t column, int64_t n, float* weight, float* bias) {
  constexpr int U = 4;
  for (int64_t i = 0; i < n; i += U * W) {
    const int vectors = n - i >= U * W ? U : static_cast<int>((n - i + W - 1) / W);
    vf w[U], b[U];
    HEDDLE_UNROLL(4)
    for (int u = 0; u < U; ++u) w[u] = b[u] = set1(0.0f);
    // Two levels of sums, as in the matrix products.
    for (int64_t r0 = 0; r0 < count; r0 += kDepth) {
      const int64_t r1 = r0 + kDepth < count ? r0 + kDepth : count;
      vf bw[U], bb[U];
      HEDDLE_UNROLL(4)
      for (int u = 0; u < U; ++u) bw[u] = bb[u] = set1(0.0f);
      for (int64_t r = r0; r < r1; ++r) {
        const vf factor = set1(scale ? scale[r] : 1.0f);
        for (int u = 0; u < vectors; ++u) {
          const int64_t at = column + i + u * W, left = n - i - u * W;
          const vf gv = mul(factor, load_as<G>(g.data, rows[r] * g.stride + at, left));
          bw[u] = fma(gv, load_as<X>(x.data, rows[r] * x.stride + at, left), bw[u]);
          bb[u] = add(bb[u], gv);
        }
      }
      HEDDLE_UNROLL(4)
      for (int u = 0; u < U; ++u) {
        w[u] = add(w[u], bw[u]);
        b[u] = add(b[u], bb[u]);
      }
    }
    for (int u = 0; u < vectors; ++u) {
      const int64_t left = n - i - u * W;
      const int m = left < W ? static_cast<int>(left) : W;
      store_n(weight + i + u * W, w[u], m);
      store_n(bias + i + u * W, b[u], m);
    }
  }
}

static void scale_rows(const RowSource& x, const RowSource& g, const int64_t* rows, const float* scale, int64_t count,
                       int64_t column, int64_t n, float* weight, float* bias) {
  with_type(x.type, [&](auto tx) {
    with_type(g.type, [&](auto tg) {
      scale_rows_of<decltype(tx)::value, decltype(tg)::value>(x, g, rows, scale, count, column, n, weight, bias);
    });
  });
}

template <DType X, DType G>
static void channel_sums_of(const RowSource& x, const RowSource& g, int64_t row, int64_t n, double* product,
                            double* sum) {
  *product = *sum = 0;
  for (int64_t first = 0; first < n; first += kRun) {
    const int64_t end = first + kRun < n ? first + kRun : n;
    vf p[2] = {set1(0.0f), set1(0.0f)}, s[2] = {set1(0.0f), set1(0.0f)};
    int turn = 0;
    for (int64_t i = first; i < end; i += W, turn ^= 1) {
      const vf gv = load_as<G>(g.data, row * g.stride + i, end - i);
      p[turn] = fma(gv, load_as<X>(x.data, row * x.stride + i, end - i), p[turn]);
      s[turn] = add(s[turn], gv);
    }
    *product += reduce_add(add(p[0], p[1]));
    *sum += reduce_add(add(s[0], s[1]));
  }
}

static void channel_sums(const RowSource& x, const RowSource& g, int64_t row, int64_t n, double* product, double* sum) {
  with_type(x.type, [&](auto tx) {
    with_type(g.type, [&](auto tg) {
      channel_sums_of<decltype(tx)::value, decltype(tg)::value>(x, g, row, n, product, sum);
    });
  });
}

const PrivacyKernels& privacy_kernels() {
  static const PrivacyKernels k = {pack_rows,   pack_columns, block,      block_dot,   column_sums,
                                   squared_row, sum_rows,     scale_rows, channel_sums};
  return k;
}
