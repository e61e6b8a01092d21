// See combine.h.

// N vectors of one token's sum, from column i; n columns are left in the last vector.
template <DType Y, DType O, int N>
HEDDLE_INLINE void combine_block(const CombineArgs& a, int64_t token, int64_t i, int n) {
  const int32_t* at = a.inverse + token * a.k;
  const float* w = a.weights ? a.weights + token * a.k : nullptr;
  vf sum[N];
  for (int b = 0; b < N; ++b) sum[b] = set1(0.0f);
  for (int32_t j = 0; j < a.k; ++j) {
    if (at[j] < 0) continue;
    const int64_t row = at[j] * a.width + i;
    const vf weight = set1(w ? w[j] : 1.0f);
    for (int b = 0; b < N; ++b) sum[b] = fma(load_as<Y>(a.y, row + b * W, n), weight, sum[b]);
  }
  for (int b = 0; b < N; ++b) store_as<O>(a.out, token * a.width + i + b * W, sum[b], n);
}

template <DType Y, DType O>
HEDDLE_INLINE void combine_row(const CombineArgs& a, int64_t token) {
  int64_t i = 0;
  for (; i + 4 * W <= a.width; i += 4 * W) combine_block<Y, O, 4>(a, token, i, W);
  for (; i + W <= a.width; i += W) combine_block<Y, O, 1>(a, token, i, W);
  if (i < a.width) combine_block<Y, O, 1>(a, token, i, static_cast<int>(a.width - i));
}

Status combine(const CombineArgs& a, const Exec& exec) {
  const int64_t limit = a.tokens * a.k;
  for (int64_t i = 0; i < limit; ++i) {
    if (a.inverse[i] < -1 || a.inverse[i] >= a.routes) return bad_value(i);
  }
  const int64_t grain = 1 + 65536 / (1 + a.width * a.k);
  const bool wide = a.out_type == DType::kFloat32;
  const bool done = parallel_for(exec, a.tokens, grain, [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; ++t) {
      if (a.type == DType::kFloat32) {
        combine_row<DType::kFloat32, DType::kFloat32>(a, t);
      } else if (a.type == DType::kBFloat16) {
        if (wide) combine_row<DType::kBFloat16, DType::kFloat32>(a, t);
        else combine_row<DType::kBFloat16, DType::kBFloat16>(a, t);
      } else {
        if (wide) combine_row<DType::kFloat16, DType::kFloat32>(a, t);
        else combine_row<DType::kFloat16, DType::kFloat16>(a, t);
      }
    }
  });
  return done ? kOk : kCancelled;
}
