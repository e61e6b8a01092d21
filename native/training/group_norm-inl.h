// See group_norm.h.

// Sum of x - shift, or of its squares, over n elements.
template <bool kSquares>
HEDDLE_INLINE double group_norm_sum(const float* x, int64_t n, float shift) {
  double total = 0;
  for (int64_t begin = 0; begin < n; begin += 4096) {
    const int64_t end = n - begin < 4096 ? n : begin + 4096;
    vf sum = set1(0.0f);
    for (int64_t i = begin; i < end; i += W) {
      const int count = end - i < W ? static_cast<int>(end - i) : W;
      const vf v = sub(count == W ? load(x + i) : load_n(x + i, count, shift), set1(shift));
      sum = kSquares ? fma(v, v, sum) : add(sum, v);
    }
    total += reduce_add(sum);
  }
  return total;
}

// One run of elements whose weight is one number (spatial > 1) or one per element (spatial = 1).
struct AffineRun {
  const float* weight;
  const float* bias;
  int64_t begin, end;
  bool each;
};
HEDDLE_INLINE vf run_weight(const AffineRun& r, int64_t i, int n) {
  return r.each ? part_load(r.weight + i, n) : set1(*r.weight);
}

HEDDLE_INLINE int64_t affine_runs(const GroupNormArgs& a) { return a.spatial == 1 ? 1 : a.channels / a.groups; }
HEDDLE_INLINE AffineRun affine_run(const GroupNormArgs& a, int64_t group, int64_t run) {
  const int64_t per_group = a.channels / a.groups, first = group * per_group;
  AffineRun r;
  r.each = a.spatial == 1;
  const int64_t channel = r.each ? first : first + run;
  r.weight = a.weight + channel;
  r.bias = a.bias ? a.bias + channel : nullptr;
  r.begin = r.each ? 0 : run * a.spatial;
  r.end = r.each ? per_group : r.begin + a.spatial;
  return r;
}

HEDDLE_INLINE void group_norm_row(const GroupNormArgs& a, int64_t row) {
  const int64_t n = a.channels / a.groups * a.spatial;
  const float* x = a.x + row * n;
  float* to = a.normalized + row * n;
  float* y = a.out + row * n;
  const double inverse = 1.0 / static_cast<double>(n);
  const float mean = static_cast<float>(group_norm_sum<false>(x, n, x[0]) * inverse + x[0]);
  const float rstd = static_cast<float>(1.0 / ::sqrt(group_norm_sum<true>(x, n, mean) * inverse + a.epsilon));
  a.rstd[row] = rstd;
  for (int64_t i = 0; i < n; i += W) {
    const int count = n - i < W ? static_cast<int>(n - i) : W;
    part_store(to + i, mul(sub(part_load(x + i, count), set1(mean)), set1(rstd)), count);
  }
  const int64_t runs = affine_runs(a);
  for (int64_t k = 0; k < runs; ++k) {
    const AffineRun r = affine_run(a, row % a.groups, k);
    for (int64_t i = r.begin; i < r.end; i += W) {
      const int count = r.end - i < W ? static_cast<int>(r.end - i) : W;
      const vf v = mul(run_weight(r, i, count), part_load(to + i, count));
      const vf b = !r.bias ? set1(0.0f) : r.each ? part_load(r.bias + i, count) : set1(*r.bias);
      part_store(y + i, add(v, b), count);
    }
  }
}

HEDDLE_INLINE void group_norm_row_backward(const GroupNormArgs& a, int64_t row) {
  const int64_t n = a.channels / a.groups * a.spatial;
  const float* g = a.x + row * n;
  const float* to = a.normalized + row * n;
  float* dx = a.out + row * n;
  const int64_t runs = affine_runs(a);
  double plain = 0, dot = 0;
  for (int64_t k = 0; k < runs; ++k) {
    const AffineRun r = affine_run(a, row % a.groups, k);
    for (int64_t begin = r.begin; begin < r.end; begin += 4096) {
      const int64_t end = r.end - begin < 4096 ? r.end : begin + 4096;
      vf s = set1(0.0f), d = set1(0.0f);
      for (int64_t i = begin; i < end; i += W) {
        const int count = end - i < W ? static_cast<int>(end - i) : W;
        const vf h = mul(run_weight(r, i, count), part_load(g + i, count));
        part_store(dx + i, h, count);
        s = add(s, h);
        d = fma(h, part_load(to + i, count), d);
      }
      plain += reduce_add(s);
      dot += reduce_add(d);
    }
  }
  const double inverse = 1.0 / static_cast<double>(n);
  const vf shift = set1(static_cast<float>(plain * inverse));
  const vf slope = set1(static_cast<float>(dot * inverse)), rstd = set1(a.rstd[row]);
  for (int64_t i = 0; i < n; i += W) {
    const int count = n - i < W ? static_cast<int>(n - i) : W;
    const vf h = sub(part_load(dx + i, count), shift);
    part_store(dx + i, mul(rstd, fnma(part_load(to + i, count), slope, h)), count);
  }
}

HEDDLE_INLINE int64_t group_norm_grain(const GroupNormArgs& a) {
  return 1 + 16384 / (1 + a.channels / a.groups * a.spatial);
}

Status group_norm(const GroupNormArgs& a, const Exec& exec) {
  if (a.channels == 0 || a.spatial == 0) return kOk;
  const bool done = parallel_for(exec, a.samples * a.groups, group_norm_grain(a), [&](int64_t from, int64_t to) {
    for (int64_t row = from; row < to; ++row) group_norm_row(a, row);
  });
  return done ? kOk : kCancelled;
}

Status group_norm_backward(const GroupNormArgs& a, const Exec& exec) {
  if (a.channels == 0 || a.spatial == 0) return kOk;
  const bool done = parallel_for(exec, a.samples * a.groups, group_norm_grain(a), [&](int64_t from, int64_t to) {
    for (int64_t row = from; row < to; ++row) group_norm_row_backward(a, row);
  });
  return done ? kOk : kCancelled;
}
