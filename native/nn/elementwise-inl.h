// See elementwise.h.

constexpr int64_t kElementGrain = 32768;

template <DType T>
static Status gelu_all(const GeluArgs& a, const Exec& exec) {
  const bool done = parallel_for(exec, a.count, kElementGrain, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; i += W) {
      const vf v = load_as<T>(a.x, i, end - i);
      store_as<T>(a.out, i, a.tanh ? gelu_tanh(v) : gelu_erf(v), end - i);
    }
  });
  return done ? kOk : kCancelled;
}

Status gelu(const GeluArgs& a, const Exec& exec) {
  if (a.type == DType::kFloat32) return gelu_all<DType::kFloat32>(a, exec);
  if (a.type == DType::kBFloat16) return gelu_all<DType::kBFloat16>(a, exec);
  return gelu_all<DType::kFloat16>(a, exec);
}

template <DType T>
static Status add_residual_rows(const AddResidualArgs& a, const Exec& exec) {
  // Without a gate per column the tensor is one long row.
  const bool columns = a.gates > 1;
  const int64_t width = columns ? a.width : a.rows * a.width, rows = columns ? a.rows : 1;
  const int64_t runs = (width + kElementGrain - 1) / kElementGrain;
  const vf gate = set1(a.gates == 1 ? a.gate[0] : 1.0f);
  const bool done = parallel_for(exec, rows * runs, 1 + kElementGrain / (width + 1), [&](int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; ++task) {
      const int64_t at = task / runs * width, from = task % runs * kElementGrain;
      const int64_t to = from + kElementGrain < width ? from + kElementGrain : width;
      for (int64_t i = from; i < to; i += W) {
        const int64_t left = to - i;
        const vf x = load_as<T>(a.x, at + i, left), y = load_as<T>(a.y, at + i, left);
        const vf z = columns ? fma(load_as<DType::kFloat32>(a.gate, i, left), y, x) : a.gates ? fma(gate, y, x) : add(x, y);
        store_as<T>(a.out, at + i, z, left);
      }
    }
  });
  return done ? kOk : kCancelled;
}

Status add_residual(const AddResidualArgs& a, const Exec& exec) {
  if (a.type == DType::kFloat32) return add_residual_rows<DType::kFloat32>(a, exec);
  if (a.type == DType::kBFloat16) return add_residual_rows<DType::kBFloat16>(a, exec);
  return add_residual_rows<DType::kFloat16>(a, exec);
}

template <DType T>
static Status mean_tokens_of(const MeanTokensArgs& a, const Exec& exec) {
  constexpr int kVectors = 8;
  constexpr int64_t block = kVectors * W;
  const int64_t blocks = (a.width + block - 1) / block;
  const vf each = set1(static_cast<float>(1.0 / static_cast<double>(a.tokens)));
  const int64_t grain = 1 + kElementGrain / (block * a.tokens);
  const bool done = parallel_for(exec, a.batch * blocks, grain, [&](int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; ++task) {
      const int64_t b = task / blocks, column = task % blocks * block;
      const int64_t left = a.width - column;
      vf total[kVectors], sum[kVectors];
      for (int u = 0; u < kVectors; ++u) total[u] = set1(0.0f);
      for (int64_t t0 = 0; t0 < a.tokens; t0 += kMeanRun) {
        const int64_t t1 = t0 + kMeanRun < a.tokens ? t0 + kMeanRun : a.tokens;
        for (int u = 0; u < kVectors; ++u) sum[u] = set1(0.0f);
        for (int64_t t = t0; t < t1; ++t) {
          const int64_t at = (b * a.tokens + t) * a.width + column;
          for (int u = 0; u < kVectors && u * W < left; ++u) sum[u] = add(sum[u], load_as<T>(a.x, at + u * W, left - u * W));
        }
        for (int u = 0; u < kVectors; ++u) total[u] = add(total[u], sum[u]);
      }
      for (int u = 0; u < kVectors && u * W < left; ++u) {
        store_as<T>(a.out, b * a.width + column + u * W, mul(total[u], each), left - u * W);
      }
    }
  });
  return done ? kOk : kCancelled;
}

Status mean_tokens(const MeanTokensArgs& a, const Exec& exec) {
  if (a.type == DType::kFloat32) return mean_tokens_of<DType::kFloat32>(a, exec);
  if (a.type == DType::kBFloat16) return mean_tokens_of<DType::kBFloat16>(a, exec);
  return mean_tokens_of<DType::kFloat16>(a, exec);
}
