// See norm.h.

struct RowStatistics {
  float mean, rest;  // the mean is mean + rest
  float rstd;
};

template <DType T, bool R>
HEDDLE_INLINE vf norm_load(const void* x, const void* residual, int64_t at, int64_t n) {
  const vf v = load_as<T>(x, at, n);
  if constexpr (R) return add(v, load_as<T>(residual, at, n));
  else return v;
}

// Asks for a row two rows ahead while one is written: the passes over a row in L1 would leave memory idle (measured on
// 16384 x 768 in float32: 40 GB/s instead of 31 on two cores, 16 instead of 12 on one).
template <DType T>
HEDDLE_INLINE void prefetch_rows(const void* p, int64_t i) {
  constexpr int64_t size = T == DType::kFloat32 ? 4 : 2;
  HEDDLE_PREFETCH(static_cast<const char*>(p) + i * size);
}

template <DType T, bool R>
HEDDLE_INLINE RowStatistics row_statistics(const void* x, const void* residual, int64_t at, int64_t width, bool centred,
                                           double epsilon) {
  const vf zero = set1(0.0f);
  RowStatistics s = {0.0f, 0.0f, 0.0f};
  const float each = static_cast<float>(1.0 / static_cast<double>(width));
  constexpr int64_t run = 64 * W;  // sums of runs are added up: long rows lose no digits
  if (centred) {
    vf total = zero;
    for (int64_t i = 0; i < width;) {
      const int64_t end = i + run < width ? i + run : width;
      vf sum[4] = {zero, zero, zero, zero};
      for (; i + 4 * W <= end; i += 4 * W) {
        HEDDLE_UNROLL(4)
        for (int u = 0; u < 4; ++u) sum[u] = add(sum[u], norm_load<T, R>(x, residual, at + i + u * W, W));
      }
      for (; i < end; i += W) sum[0] = add(sum[0], norm_load<T, R>(x, residual, at + i, end - i));
      total = add(total, add(add(sum[0], sum[1]), add(sum[2], sum[3])));
    }
    s.mean = reduce_add(total) * each;
  }
  // Deviations from the rounded mean; their own mean repairs the rounding.
  const vf m = set1(s.mean);
  vf firsts = zero, seconds = zero;
  for (int64_t i = 0; i < width;) {
    const int64_t end = i + run < width ? i + run : width;
    vf first[2] = {zero, zero}, second[4] = {zero, zero, zero, zero};
    for (; i + 4 * W <= end; i += 4 * W) {
      HEDDLE_UNROLL(4)
      for (int u = 0; u < 4; ++u) {
        const vf d = sub(norm_load<T, R>(x, residual, at + i + u * W, W), m);
        first[u & 1] = add(first[u & 1], d);
        second[u] = fma(d, d, second[u]);
      }
    }
    for (; i < end; i += W) {
      const int64_t left = end - i;
      vf d = sub(norm_load<T, R>(x, residual, at + i, left), m);
      if (left < W) d = select(first_n(static_cast<int>(left)), d, zero);
      first[0] = add(first[0], d);
      second[0] = fma(d, d, second[0]);
    }
    firsts = add(firsts, add(first[0], first[1]));
    seconds = add(seconds, add(add(second[0], second[1]), add(second[2], second[3])));
  }
  const float square = reduce_add(seconds) * each;
  if (centred) s.rest = reduce_add(firsts) * each;
  double variance = static_cast<double>(square) - static_cast<double>(s.rest) * s.rest;
  if (variance < 0) variance = 0;
  s.rstd = static_cast<float>(1.0 / ::sqrt(variance + epsilon));
  return s;
}

HEDDLE_INLINE vf norm_weight(const float* weight, bool unit_offset, int64_t i, int64_t n) {
  if (!weight) return set1(1.0f);
  const vf w = load_as<DType::kFloat32>(weight, i, n);
  return unit_offset ? add(w, set1(1.0f)) : w;
}

template <DType T, bool R>
static void norm_row(const NormArgs& a, int64_t row) {
  const int64_t at = row * a.width;
  const RowStatistics s = row_statistics<T, R>(a.x, a.residual, at, a.width, a.centred, a.epsilon);
  const vf m = set1(s.mean), rest = set1(s.rest), r = set1(s.rstd);
  const int64_t ahead = 2 * a.width;
  for (int64_t i = 0; i < a.width; i += W) {
    const int64_t left = a.width - i;
    prefetch_rows<T>(a.x, at + i + ahead);
    if constexpr (R) prefetch_rows<T>(a.residual, at + i + ahead);
    const vf v = norm_load<T, R>(a.x, a.residual, at + i, left);
    if (a.sum) store_as<T>(a.sum, at + i, v, left);
    vf y = mul(mul(sub(sub(v, m), rest), r), norm_weight(a.weight, a.unit_offset, i, left));
    if (a.bias) y = add(y, load_as<DType::kFloat32>(a.bias, i, left));
    store_to(a.out, a.out_type, at + i, y, left);
  }
  if (a.mean) a.mean[row] = s.mean + s.rest;
  if (a.rstd) a.rstd[row] = s.rstd;
}

template <DType T>
static Status norm_rows(const NormArgs& a, const Exec& exec) {
  const bool done = parallel_for(exec, a.rows, 1 + 32768 / a.width, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      if (a.residual) norm_row<T, true>(a, row);
      else norm_row<T, false>(a, row);
    }
  });
  return done ? kOk : kCancelled;
}

Status norm(const NormArgs& a, const Exec& exec) {
  if (a.type == DType::kFloat32) return norm_rows<DType::kFloat32>(a, exec);
  if (a.type == DType::kBFloat16) return norm_rows<DType::kBFloat16>(a, exec);
  return norm_rows<DType::kFloat16>(a, exec);
}

template <DType T>
static void norm_backward_row(const NormBackwardArgs& a, int64_t row, float* weight_sum, float* bias_sum) {
  const int64_t at = row * a.width;
  RowStatistics s;
  if (a.rstd) s = {a.mean ? a.mean[row] : 0.0f, 0.0f, a.rstd[row]};
  else s = row_statistics<T, false>(a.x, nullptr, at, a.width, a.centred, a.epsilon);
  const vf m = set1(s.mean), rest = set1(s.rest), r = set1(s.rstd), zero = set1(0.0f);
  vf plain = zero, scaled = zero;
  for (int64_t i = 0; i < a.width; i += W) {
    const int64_t left = a.width - i;
    vf xh = mul(sub(sub(load_as<T>(a.x, at + i, left), m), rest), r);
    if (left < W) xh = select(first_n(static_cast<int>(left)), xh, zero);
    const vf g = load_as<T>(a.grad_out, at + i, left);
    const vf gw = mul(g, norm_weight(a.weight, a.unit_offset, i, left));
    plain = add(plain, gw);
    scaled = fma(gw, xh, scaled);
    if (weight_sum) {
      store_as<DType::kFloat32>(weight_sum, i, fma(g, xh, load_as<DType::kFloat32>(weight_sum, i, left)), left);
    }
    if (bias_sum) store_as<DType::kFloat32>(bias_sum, i, add(g, load_as<DType::kFloat32>(bias_sum, i, left)), left);
  }
  if (!a.grad_x) return;
  const float each = static_cast<float>(1.0 / static_cast<double>(a.width));
  const vf c1 = set1(a.centred ? reduce_add(plain) * each : 0.0f), c2 = set1(reduce_add(scaled) * each);
  const int64_t ahead = 2 * a.width;
  for (int64_t i = 0; i < a.width; i += W) {
    const int64_t left = a.width - i;
    prefetch_rows<T>(a.x, at + i + ahead);
    prefetch_rows<T>(a.grad_out, at + i + ahead);
    const vf xh = mul(sub(sub(load_as<T>(a.x, at + i, left), m), rest), r);
    const vf gw = mul(load_as<T>(a.grad_out, at + i, left), norm_weight(a.weight, a.unit_offset, i, left));
    vf dx = mul(r, fnma(xh, c2, sub(gw, c1)));
    if (a.grad_sum) dx = add(dx, load_as<T>(a.grad_sum, at + i, left));
    store_as<T>(a.grad_x, at + i, dx, left);
  }
}

template <DType T>
static Status norm_backward_runs(const NormBackwardArgs& a, const Exec& exec) {
  const int64_t runs = (a.rows + kNormRun - 1) / kNormRun;
  const bool done = parallel_for(exec, runs, 1 + 1024 / a.width, [&](int64_t begin, int64_t end) {
    for (int64_t run = begin; run < end; ++run) {
      float* weight_sum = a.grad_weight ? a.partial + run * 2 * a.width : nullptr;
      float* bias_sum = a.grad_bias ? a.partial + (run * 2 + 1) * a.width : nullptr;
      for (int64_t i = 0; i < a.width; ++i) {
        if (weight_sum) weight_sum[i] = 0.0f;
        if (bias_sum) bias_sum[i] = 0.0f;
      }
      const int64_t last = (run + 1) * kNormRun < a.rows ? (run + 1) * kNormRun : a.rows;
      for (int64_t row = run * kNormRun; row < last; ++row) norm_backward_row<T>(a, row, weight_sum, bias_sum);
    }
  });
  return done ? kOk : kCancelled;
}

Status norm_backward_rows(const NormBackwardArgs& a, const Exec& exec) {
  if (a.type == DType::kFloat32) return norm_backward_runs<DType::kFloat32>(a, exec);
  if (a.type == DType::kBFloat16) return norm_backward_runs<DType::kBFloat16>(a, exec);
  return norm_backward_runs<DType::kFloat16>(a, exec);
}
