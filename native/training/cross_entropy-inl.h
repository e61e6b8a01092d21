// See cross_entropy.h.

HEDDLE_INLINE void cross_entropy_row(const CrossEntropyArgs& a, int64_t row) {
  const float* x = a.logits + row * a.classes;
  float* g = a.gradient + row * a.classes;
  vf tops = set1(-HUGE_VALF);
  for (int64_t i = 0; i < a.classes; i += W) {
    const int n = a.classes - i < W ? static_cast<int>(a.classes - i) : W;
    tops = max(n == W ? load(x + i) : load_n(x + i, n, -HUGE_VALF), tops);  // NaN is passed over
  }
  const float top = reduce_max(tops);
  int32_t best = 0;
  for (int64_t i = 0; i < a.classes; ++i) {
    if (x[i] == top) {
      best = static_cast<int32_t>(i);
      break;
    }
  }
  a.prediction[row] = best;
  const int32_t label = a.labels[row];
  if (label < 0) {
    a.losses[row] = 0.0f;
    for (int64_t i = 0; i < a.classes; ++i) g[i] = 0.0f;
    return;
  }
  vf sums = set1(0.0f);
  for (int64_t i = 0; i < a.classes; i += W) {
    const int n = a.classes - i < W ? static_cast<int>(a.classes - i) : W;
    const vf e = exp(sub(n == W ? load(x + i) : load_n(x + i, n, -HUGE_VALF), set1(top)));
    part_store(g + i, e, n);
    sums = add(sums, e);
  }
  const float sum = reduce_add(sums);
  a.losses[row] = static_cast<float>(::log(static_cast<double>(sum)) + (static_cast<double>(top) - x[label]));
  const float scale = a.scale[row];
  const vf factor = set1(scale / sum);
  const float at = g[label];
  for (int64_t i = 0; i < a.classes; i += W) {
    const int n = a.classes - i < W ? static_cast<int>(a.classes - i) : W;
    part_store(g + i, mul(part_load(g + i, n), factor), n);
  }
  // p - 1 from the other classes' share, so that a confident row keeps its digits.
  float others = 0.0f;
  if (at / sum > 0.5f) {
    for (int64_t i = 0; i < a.classes; ++i) others += i == label ? 0.0f : g[i];
    g[label] = -others;
  } else {
    g[label] = scale * (at / sum - 1.0f);
  }
}

Status cross_entropy(const CrossEntropyArgs& a, const Exec& exec) {
  for (int64_t i = 0; i < a.rows; ++i) {
    if (a.labels[i] < -1 || a.labels[i] >= a.classes) return bad_value(i);
  }
  const bool done = parallel_for(exec, a.rows, 1 + 4096 / (1 + a.classes), [&](int64_t from, int64_t to) {
    for (int64_t row = from; row < to; ++row) cross_entropy_row(a, row);
  });
  return done ? kOk : kCancelled;
}
