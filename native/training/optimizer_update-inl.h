// See optimizer_update.h.

HEDDLE_INLINE vf part_load(const float* p, int n) { return n == W ? load(p) : load_n(p, n, 0.0f); }
HEDDLE_INLINE void part_store(float* p, vf v, int n) {
  if (n == W) store(p, v);
  else store_n(p, v, n);
}

HEDDLE_INLINE void sgd_part(const OptimizerUpdateArgs& a, int64_t i, int n) {
  const vf p = part_load(a.parameter + i, n);
  vf g = fma(set1(a.weight_decay), p, mul(set1(a.scale), part_load(a.gradient + i, n)));
  if (a.first) {
    const vf b = fma(set1(a.momentum), part_load(a.first + i, n), g);
    part_store(a.first + i, b, n);
    g = a.nesterov ? fma(set1(a.momentum), b, g) : b;
  }
  part_store(a.parameter + i, fnma(set1(a.learning_rate), g, p), n);
  part_store(a.gradient + i, set1(0.0f), n);
}

// The normalised step m c1 / (sqrt(v c2) + epsilon) after the moments have been renewed.
HEDDLE_INLINE vf adam_part(const OptimizerUpdateArgs& a, int64_t i, int n) {
  const vf g = mul(set1(a.scale), part_load(a.gradient + i, n));
  const vf m = fma(set1(a.momentum), part_load(a.first + i, n), mul(set1(1.0f - a.momentum), g));
  const vf v = fma(set1(a.beta2), part_load(a.second + i, n), mul(set1(1.0f - a.beta2), mul(g, g)));
  part_store(a.first + i, m, n);
  part_store(a.second + i, v, n);
  return div(mul(m, set1(a.correction1)), add(sqrt(mul(v, set1(a.correction2))), set1(a.epsilon)));
}

HEDDLE_INLINE void adamw_part(const OptimizerUpdateArgs& a, int64_t i, int n) {
  const vf r = adam_part(a, i, n);
  const vf p = mul(part_load(a.parameter + i, n), set1(1.0f - a.learning_rate * a.weight_decay));
  part_store(a.parameter + i, fnma(set1(a.learning_rate), r, p), n);
  part_store(a.gradient + i, set1(0.0f), n);
}

HEDDLE_INLINE void lamb_block(const OptimizerUpdateArgs& a, int64_t begin, int64_t end, double* norms) {
  vf pp = set1(0.0f), rr = set1(0.0f);
  for (int64_t i = begin; i < end; i += W) {
    const int n = end - i < W ? static_cast<int>(end - i) : W;
    const vf p = part_load(a.parameter + i, n);
    const vf r = fma(set1(a.weight_decay), p, adam_part(a, i, n));
    pp = fma(p, p, pp);
    // Beyond the end every load is 0, and so is r.
    rr = fma(r, r, rr);
    part_store(a.gradient + i, r, n);
  }
  norms[0] = reduce_add(pp);
  norms[1] = reduce_add(rr);
}

Status optimizer_pass(const OptimizerUpdateArgs& a, const Exec& exec) {
  const int64_t blocks = (a.count + kUpdateBlock - 1) / kUpdateBlock;
  const bool done = parallel_for(exec, blocks, 1, [&](int64_t from, int64_t to) {
    for (int64_t b = from; b < to; ++b) {
      const int64_t begin = b * kUpdateBlock, left = a.count - begin, end = left < kUpdateBlock ? a.count : begin + kUpdateBlock;
      if (a.rule == UpdateRule::kLamb) {
        lamb_block(a, begin, end, a.norms + 2 * b);
        continue;
      }
      for (int64_t i = begin; i < end; i += W) {
        const int n = end - i < W ? static_cast<int>(end - i) : W;
        if (a.rule == UpdateRule::kSgd) sgd_part(a, i, n);
        else adamw_part(a, i, n);
      }
    }
  });
  return done ? kOk : kCancelled;
}

Status lamb_finish(const OptimizerUpdateArgs& a, const Exec& exec) {
  const vf step = set1(a.learning_rate * a.ratio);
  const bool done = parallel_for(exec, a.count, kUpdateBlock, [&](int64_t from, int64_t to) {
    for (int64_t i = from; i < to; i += W) {
      const int n = to - i < W ? static_cast<int>(to - i) : W;
      part_store(a.parameter + i, fnma(step, part_load(a.gradient + i, n), part_load(a.parameter + i, n)), n);
      part_store(a.gradient + i, set1(0.0f), n);
    }
  });
  return done ? kOk : kCancelled;
}
