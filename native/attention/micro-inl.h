// Packing and micro-kernels of attention: K and q are packed as [d][key or row], V as [column panel][key][column].

HEDDLE_INLINE int whole_columns(int value_dim) { return (value_dim + kColumns - 1) / kColumns * kColumns; }

alignas(64) static const float kZeros[512] = {};  // the vector at kNoVector, in every type

HEDDLE_INLINE const void* row_address(const Vectors& x, int64_t at) {
  return at == kNoVector ? static_cast<const void*>(kZeros) : static_cast<const char*>(x.data) + at * dtype_bytes(x.type);
}

template <DType T>
static void pack_transposed_as(const Vectors& x, const int64_t* at, int count, float* out, int stride) {
  for (int r = 0; r < count; r += W) {
    const void* rows[W];
    for (int i = 0; i < W; ++i) rows[i] = row_address(x, at[r + i]);
    int d = 0;
    if constexpr (T == DType::kBFloat16 && W > 1) {  // in pairs: half of the transposes
      for (; d + 2 * W <= x.dim; d += 2 * W) {
        vf t[W];
        HEDDLE_UNROLL(16)
        for (int i = 0; i < W; ++i) t[i] = load(reinterpret_cast<const float*>(static_cast<const uint16_t*>(rows[i]) + d));
        transpose_lanes(t);
        HEDDLE_UNROLL(16)
        for (int i = 0; i < W; ++i) {
          float* to = out + int64_t{d + 2 * i} * stride + r;
          store(to, as_float(shl<16>(as_int(t[i]))));
          store(to + stride, as_float(andi(as_int(t[i]), set1i(static_cast<int32_t>(0xffff0000)))));
        }
      }
    }
    for (; d + W <= x.dim; d += W) {
      vf t[W];
      HEDDLE_UNROLL(16)
      for (int i = 0; i < W; ++i) t[i] = load_float(rows[i], T, d, W);
      transpose_lanes(t);
      HEDDLE_UNROLL(16)
      for (int i = 0; i < W; ++i) store(out + int64_t{d + i} * stride + r, t[i]);
    }
    if (d == x.dim) continue;
    vf t[W];
    for (int i = 0; i < W; ++i) t[i] = load_float(rows[i], T, d, x.dim - d);
    transpose_lanes(t);
    for (int i = 0; d + i < x.dim; ++i) store(out + int64_t{d + i} * stride + r, t[i]);
  }
}

// `count` vectors (a multiple of W) beside each other: out[d][vector]. The type is a template argument of the loop:
// a switch per vector, and registers spilled around it, made packing three times slower.
HEDDLE_INLINE void pack_transposed(const Vectors& x, const int64_t* at, int count, float* out, int stride) {
  if (x.element_stride != 1) {
    for (int r = 0; r < count; ++r) {
      for (int d = 0; d < x.dim; ++d) {
        out[int64_t{d} * stride + r] = at[r] == kNoVector ? 0.0f : read_float(x.data, x.type, at[r] + d * x.element_stride);
      }
    }
  } else if (x.type == DType::kFloat32) {
    pack_transposed_as<DType::kFloat32>(x, at, count, out, stride);
  } else if (x.type == DType::kBFloat16) {
    pack_transposed_as<DType::kBFloat16>(x, at, count, out, stride);
  } else if (x.type == DType::kInt8) {
    pack_transposed_as<DType::kInt8>(x, at, count, out, stride);
  } else {
    pack_transposed_as<DType::kFloat16>(x, at, count, out, stride);
  }
}

template <DType T>
static vf pack_values_as(const Vectors& x, const int64_t* at, int keys, int64_t step, float* out) {
  const vf zero = set1(0.0f);
  vf check[4] = {zero, zero, zero, zero};  // four chains: one would take longer than the copy
  for (int i = 0; i < keys; ++i) {  // a key's elements in one go: its cache lines are neighbours
    const void* row = row_address(x, at[i]);
    float* to = out + i * kColumns;
    int c = 0;
    for (; c + 2 * kColumns <= x.dim; c += 2 * kColumns, to += 2 * step) {
      vf t[4];  // loads first: a store that is not done yet holds up loads of like addresses
      HEDDLE_UNROLL(4)
      for (int n = 0; n < 4; ++n) t[n] = load_float(row, T, c + n * W, W);
      HEDDLE_UNROLL(4)
      for (int n = 0; n < 4; ++n) {
        check[n] = fma(t[n], zero, check[n]);
        store(to + n / 2 * step + n % 2 * W, t[n]);
      }
    }
    for (; c < x.dim; c += kColumns, to += step) {
      const int n = x.dim - c;
      const vf a = load_float(row, T, c, n), b = n > W ? load_float(row, T, c + W, n - W) : zero;
      check[0] = fma(a, zero, check[0]);
      check[1] = fma(b, zero, check[1]);
      store(to, a);
      store(to + W, b);
    }
  }
  return add(add(check[0], check[1]), add(check[2], check[3]));
}

// The first `keys` of sub-panel `sub` of a panel of `panel` keys: out[column panel][key][column]. False when a value is not
// finite.
HEDDLE_INLINE bool pack_values(const Vectors& x, const int64_t* at, int sub, int panel, float* out, int keys = kSub) {
  const vf zero = set1(0.0f);
  const int64_t step = int64_t{panel} * kColumns;
  vf check = zero;
  out += sub * kSub * kColumns;
  if (x.element_stride != 1) {
    for (int i = 0; i < keys; ++i) {
      for (int c = 0; c < whole_columns(x.dim); c += W) {
        const vf v = load_lanes(x, at[i], c);
        check = fma(v, zero, check);
        store(out + c / kColumns * step + i * kColumns + c % kColumns, v);
      }
    }
  } else if (x.type == DType::kFloat32) {
    check = pack_values_as<DType::kFloat32>(x, at, keys, step, out);
  } else if (x.type == DType::kBFloat16) {
    check = pack_values_as<DType::kBFloat16>(x, at, keys, step, out);
  } else if (x.type == DType::kInt8) {
    check = pack_values_as<DType::kInt8>(x, at, keys, step, out);
  } else {
    check = pack_values_as<DType::kFloat16>(x, at, keys, step, out);
  }
  return reduce_max(select(eq(check, zero), zero, set1(1.0f))) == 0.0f;
}

template <int R, int C>
HEDDLE_INLINE void clear_tile(vf (&a)[R][C]) {
  HEDDLE_UNROLL(16)
  for (int r = 0; r < R; ++r) {
    for (int c = 0; c < C; ++c) a[r][c] = set1(0.0f);
  }
}

// Products of R rows of packed q with C vectors of keys.
template <int R, int C>
static void score_tile(const float* q, const float* k, int dim, float* s) {
  vf a[R][C];
  clear_tile(a);
  for (int d = 0; d < dim; ++d) {
    vf b[C];
    for (int c = 0; c < C; ++c) b[c] = load(k + c * W);
    HEDDLE_UNROLL(16)
    for (int r = 0; r < R; ++r) {
      const vf x = set1(q[r]);
      for (int c = 0; c < C; ++c) a[r][c] = fma(x, b[c], a[r][c]);
    }
    k += kColumns;
    q += kRowStride;
  }
  HEDDLE_UNROLL(16)
  for (int r = 0; r < R; ++r) {
    for (int c = 0; c < C; ++c) store(s + r * kScoreStride + c * W, a[r][c]);
  }
}

// s = 2^(s * factor - shift) over the runs, in place as weights; returns their sum. Each lane adds the keys at
// its place in every sub-panel in order, so skipped sub-panels (weights 0) do not change the sum.
HEDDLE_INLINE float exp_row(float* s, const Run* runs, int run_count, float factor, float shift) {
  const vf f = set1(factor), m = set1(-shift);
  vf sum[2] = {set1(0.0f), set1(0.0f)};
  for (int n = 0; n < run_count; ++n) {
    for (int j = runs[n].begin * kSub; j < runs[n].end * kSub; j += 2 * W) {
      const vf a = exp2_lanes(fma(load(s + j), f, m)), b = exp2_lanes(fma(load(s + j + W), f, m));
      store(s + j, a);
      store(s + j + W, b);
      sum[0] = add(sum[0], a);
      sum[1] = add(sum[1], b);
    }
  }
  return reduce_add(add(sum[0], sum[1]));
}

// The same for one sub-panel of several rows; minus[r] is -shift, lanes[r] the 2 W sums of exp_row.
HEDDLE_INLINE void exp_sub(float* s, int rows, float factor, const float* minus, float* lanes) {
  const vf f = set1(factor);
  for (int r = 0; r < rows; ++r) {
    const vf m = set1(minus[r]);
    vf sum[2] = {load(lanes), load(lanes + W)};
    for (int j = 0; j < kSub; j += 2 * W) {
      const vf a = exp2_lanes(fma(load(s + j), f, m)), b = exp2_lanes(fma(load(s + j + W), f, m));
      store(s + j, a);
      store(s + j + W, b);
      sum[0] = add(sum[0], a);
      sum[1] = add(sum[1], b);
    }
    store(lanes, sum[0]);
    store(lanes + W, sum[1]);
    s += kScoreStride;
    lanes += kColumns;
  }
}

// One key has weight 1: 2^(s * factor - shift) is 1 but for a rounding, which would show in a row that is a value.
HEDDLE_INLINE void set_only_weight(float* s, float* sum) {
  if (*sum > 0.0f) s[0] = *sum = 1.0f;
}

// o = o * alpha + p v for C vectors of columns, over the keys of the runs below `limit`; without alpha o = p v.
template <int R, int C>
static void value_tile(const float* p, const float* v, const Run* runs, int run_count, int limit, const float* alpha,
                       float* o, int64_t o_stride) {
  vf a[R][C];
  clear_tile(a);
  for (int n = 0; n < run_count; ++n) {
    const int begin = runs[n].begin * kSub, end = runs[n].end * kSub < limit ? runs[n].end * kSub : limit;
    const float* row = v + int64_t{begin} * kColumns;
    for (int k = begin; k < end; ++k) {
      vf b[C];
      for (int c = 0; c < C; ++c) b[c] = load(row + c * W);
      HEDDLE_UNROLL(16)
      for (int r = 0; r < R; ++r) {
        const vf x = set1(p[r * kScoreStride + k]);
        for (int c = 0; c < C; ++c) a[r][c] = fma(x, b[c], a[r][c]);
      }
      row += kColumns;
    }
  }
  if (!alpha) {
    HEDDLE_UNROLL(16)
    for (int r = 0; r < R; ++r) {
      for (int c = 0; c < C; ++c) store(o + r * o_stride + c * W, a[r][c]);
    }
    return;
  }
  HEDDLE_UNROLL(16)
  for (int r = 0; r < R; ++r) {
    const vf scale = set1(alpha[r]);
    for (int c = 0; c < C; ++c) {
      float* to = o + r * o_stride + c * W;
      store(to, fma(load(to), scale, a[r][c]));
    }
  }
}

// The same sums for a panel with non-finite values: those of weight 0 are left out.
static void careful_value_tile(int rows, const float* p, const float* v, const Run* runs, int run_count,
                           const float* alpha, float* o, int64_t o_stride) {
  for (int r = 0; r < rows; ++r) {
    for (int c = 0; c < kColumns; c += W) {
      vf a = set1(0.0f);
      for (int n = 0; n < run_count; ++n) {
        for (int k = runs[n].begin * kSub; k < runs[n].end * kSub; ++k) {
          const float x = p[r * kScoreStride + k];
          if (x != 0.0f) a = fma(set1(x), load(v + int64_t{k} * kColumns + c), a);
        }
      }
      float* to = o + r * o_stride + c;
      store(to, fma(load(to), set1(alpha[r]), a));
    }
  }
}
