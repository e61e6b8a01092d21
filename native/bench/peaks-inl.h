// Peak loops on the vector vocabulary; included once per instruction set.

// 12 chains cover latency x ports of every x86 core and fit 16 registers with the two constants. One-lane code
// may be packed by the compiler (in kernels as here), so it gets enough chains for that.
constexpr int kPeakChains = W == 1 ? 32 : 12;

static float peak_fma(int64_t iterations) {
  vf acc[kPeakChains];
  for (int j = 0; j < kPeakChains; ++j) acc[j] = set1(1.0f + 0.01f * static_cast<float>(j));
  const vf m = set1(0.999f);
  const vf a = set1(0.001f);
  for (int64_t i = 0; i < iterations; ++i) {
    HEDDLE_UNROLL(32)
    for (int j = 0; j < kPeakChains; ++j) acc[j] = fma(acc[j], m, a);
  }
  vf sum = acc[0];
  for (int j = 1; j < kPeakChains; ++j) sum = add(sum, acc[j]);
  return reduce_add(sum);
}

// count: a multiple of 8 * W.
static int32_t peak_read(const int32_t* p, int64_t count) {
  vi acc[8];
  for (int j = 0; j < 8; ++j) acc[j] = set1i(0);
  for (int64_t i = 0; i < count; i += 8 * W) {
    HEDDLE_UNROLL(8)
    for (int j = 0; j < 8; ++j) acc[j] = xori(acc[j], loadi(p + i + j * W));
  }
  for (int j = 1; j < 8; ++j) acc[0] = xori(acc[0], acc[j]);
  return reduce_maxi(acc[0]);
}

static PeakKernels peak_kernels() { return {{peak_fma, 2.0 * W * kPeakChains}, peak_read}; }
