// See rotary_embedding.h for the definition and what the design rests on.

struct SinCos {
  float sin, cos;
};

HEDDLE_INLINE SinCos sin_cos(double a) {
  const double magic = 6755399441055744.0;  // 1.5 * 2^52: the sum rounds to an integer
  const double t = a * 0.63661977236758134 + magic, n = t - magic;
  const float r = static_cast<float>((a - n * 1.5707963267948966) - n * 6.123233995736766e-17);
  const float z = r * r;
  const float s = r + r * z * (-1.6666654611e-1f + z * (8.3321608736e-3f - z * 1.9515295891e-4f));
  const float c =
      1.0f - 0.5f * z + z * z * (4.166664568298827e-2f + z * (-1.388731625493765e-3f + z * 2.443315711809948e-5f));
  switch (static_cast<int64_t>(n) & 3) {
    case 0: return {s, c};
    case 1: return {c, -s};
    case 2: return {-s, -c};
    default: return {-c, s};
  }
}

Status rotary_embedding(const RotaryEmbeddingArgs& a, const Exec& exec) {
  const int32_t dim = a.dim;
  // Halves of one block: the partners of a vector are another vector. Anything else goes element by element.
  int32_t half = 0;
  while (half < dim && a.partner[half] > half) ++half;
  bool halves = half > 0;
  for (int32_t e = 0; e < dim; ++e) {
    halves = halves && a.partner[e] == (e < half ? e + half : e < 2 * half ? e - half : -1);
  }
  const int64_t grain = 1 + 8192 / (a.heads * dim + 16 * a.count + 1);
  const bool done = parallel_for(exec, a.batch * a.length, grain, [&](int64_t begin, int64_t end) {
    // One vector of slack: the last one may be read and written whole.
    alignas(64) float cosine[kMaxRotaryDim + W], sine[kMaxRotaryDim + W], row[kMaxRotaryDim + W], other[kMaxRotaryDim + W];
    SinCos table[kMaxRotaryDim];
    for (int32_t e = 0; e < dim + W; ++e) row[e] = other[e] = cosine[e] = sine[e] = 0.0f;
    for (int64_t token = begin; token < end; ++token) {
      const int64_t b = token / a.length, s = token % a.length;
      for (int32_t i = 0; i < a.count; ++i) {
        const int64_t at = a.axis[i] * a.axis_stride + b * a.batch_stride + s;
        const double position = a.positions ? static_cast<double>(a.positions[at]) : static_cast<double>(a.offset + s);
        table[i] = sin_cos(position * a.frequency[i]);
      }
      for (int32_t e = 0; e < dim; ++e) {
        const int32_t p = a.partner[e];
        cosine[e] = p < 0 ? 1.0f : table[a.angle[e]].cos * a.factor;
        sine[e] = p < 0 ? 0.0f : table[a.angle[e]].sin * (p > e ? -a.factor : a.factor);
      }
      for (int64_t h = 0; h < a.heads; ++h) {
        const int64_t at = (token * a.heads + h) * dim;
        for (int32_t e = 0; e < dim; e += W) store(row + e, load_float(a.x, a.type, at + e, dim - e));
        if (halves) {
          for (int32_t e = 0; e < half; e += W) store(other + e, load(row + half + e));
          for (int32_t e = 0; e < half; ++e) other[half + e] = row[e];
          for (int32_t e = 2 * half; e < dim; ++e) other[e] = 0.0f;
        } else {
          for (int32_t e = 0; e < dim; ++e) other[e] = a.partner[e] < 0 ? 0.0f : row[a.partner[e]];
        }
        for (int32_t e = 0; e < dim; e += W) {
          const vf y = fma(load(other + e), load(sine + e), mul(load(row + e), load(cosine + e)));
          store_float(a.out, a.type, at + e, y, dim - e);
        }
      }
    }
  });
  return done ? kOk : kCancelled;
}
