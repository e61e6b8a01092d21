// The lane operations of attention that the common vocabulary lacks, for any instruction set.

// 2^x for x <= 0 (and a little above); relative error 1e-7; exactly 0 below -127, NaN stays NaN.
HEDDLE_INLINE vf exp2_lanes(vf x) {
  const vf magic = set1(12582912.0f);  // 1.5 * 2^23: the sum holds round(x) in its low bits
  x = max(set1(-127.0f), x);
  const vf t = add(x, magic);
  const vf f = sub(x, sub(t, magic));
  vf p = set1(1.32647e-3f);
  p = fma(p, f, set1(9.67151e-3f));
  p = fma(p, f, set1(5.550734e-2f));
  p = fma(p, f, set1(2.4022242e-1f));
  p = fma(p, f, set1(6.9314698e-1f));
  p = fma(p, f, set1(1.0f));
  return mul(p, as_float(shl<23>(addi(as_int(t), set1i(127)))));
}

// The first n (at most W) bytes as integers, 0 beyond.
HEDDLE_INLINE vi load_bytes(const uint8_t* p, int n) {
  int32_t t[W] = {};
  for (int i = 0; i < n && i < W; ++i) t[i] = p[i];
  return loadi(t);
}

// r[i][j] <-> r[j][i] of W vectors.
HEDDLE_INLINE void transpose_lanes(vf* r) {
  float in[W * W], out[W * W];
  for (int i = 0; i < W; ++i) store(in + i * W, r[i]);
  for (int i = 0; i < W; ++i) {
    for (int j = 0; j < W; ++j) out[i * W + j] = in[j * W + i];
  }
  for (int i = 0; i < W; ++i) r[i] = load(out + i * W);
}
