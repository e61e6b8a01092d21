// ChaCha20 and Gaussian noise on the vector vocabulary: one lane is one block of the key stream. See gaussian_noise.h.

HEDDLE_INLINE vi word(uint32_t x) { return set1i(static_cast<int32_t>(x)); }

HEDDLE_INLINE void quarter_round(vi& a, vi& b, vi& c, vi& d) {
  a = addi(a, b), d = rotl<16>(xori(d, a));
  c = addi(c, d), b = rotl<12>(xori(b, c));
  a = addi(a, b), d = rotl<8>(xori(d, a));
  c = addi(c, d), b = rotl<7>(xori(b, c));
}

// Blocks counter .. counter + W - 1: word i of each in s[i].
HEDDLE_INLINE void chacha_vectors(const uint32_t* key, uint32_t counter, const uint32_t* nonce, vi* s) {
  vi start[16];
  start[0] = word(0x61707865), start[1] = word(0x3320646e), start[2] = word(0x79622d32), start[3] = word(0x6b206574);
  for (int i = 0; i < 8; ++i) start[4 + i] = word(key[i]);
  start[12] = addi(word(counter), iota());
  for (int i = 0; i < 3; ++i) start[13 + i] = word(nonce[i]);
  HEDDLE_UNROLL(16)
  for (int i = 0; i < 16; ++i) s[i] = start[i];
  for (int round = 0; round < 10; ++round) {
    quarter_round(s[0], s[4], s[8], s[12]);
    quarter_round(s[1], s[5], s[9], s[13]);
    quarter_round(s[2], s[6], s[10], s[14]);
    quarter_round(s[3], s[7], s[11], s[15]);
    quarter_round(s[0], s[5], s[10], s[15]);
    quarter_round(s[1], s[6], s[11], s[12]);
    quarter_round(s[2], s[7], s[8], s[13]);
    quarter_round(s[3], s[4], s[9], s[14]);
  }
  HEDDLE_UNROLL(16)
  for (int i = 0; i < 16; ++i) s[i] = addi(s[i], start[i]);
}

static void chacha_blocks(const uint32_t* key, uint32_t counter, const uint32_t* nonce, int64_t count, uint32_t* out) {
  for (int64_t b = 0; b < count; b += W) {
    vi s[16];
    chacha_vectors(key, counter + static_cast<uint32_t>(b), nonce, s);
    const int64_t left = count - b < W ? count - b : W;
    int32_t lanes[W];
    for (int i = 0; i < 16; ++i) {
      storei(lanes, s[i]);
      for (int64_t l = 0; l < left; ++l) out[(b + l) * 16 + i] = static_cast<uint32_t>(lanes[l]);
    }
  }
}

// -ln u for u = (high 2^32 + low + 1/2) / 2^64, relative error 2e-7 at both ends: above 1/2 the distance to 1 is what
// is converted to floating point, so that nothing is lost where u rounds to 1.
HEDDLE_INLINE vf minus_log_uniform(vi low, vi high) {
  const vi flip = sra<31>(high);
  const vf f = fma(to_float(srl<1>(xori(low, flip))), set1(0x1p-63f),
                   fma(to_float(xori(high, flip)), set1(0x1p-32f), set1(0x1p-64f)));
  const vf u = select(eqi(flip, set1i(0)), f, sub(set1(1.0f), f));
  const vi bits = as_int(u);
  const vi e = sra<23>(subi(bits, set1i(0x3f3504f3)));  // u = m 2^e, m in [sqrt(1/2), sqrt(2))
  const vf m = as_float(subi(bits, shl<23>(e)));
  const vf t = select(eqi(e, set1i(0)), neg(f), sub(m, set1(1.0f)));  // e = 0 only above 1/2
  const vf z = mul(t, t);
  // Cephes logf.
  vf p = set1(7.0376836292e-2f);
  p = fma(p, t, set1(-1.1514610310e-1f));
  p = fma(p, t, set1(1.1676998740e-1f));
  p = fma(p, t, set1(-1.2420140846e-1f));
  p = fma(p, t, set1(1.4249322787e-1f));
  p = fma(p, t, set1(-1.6668057665e-1f));
  p = fma(p, t, set1(2.0000714765e-1f));
  p = fma(p, t, set1(-2.4999993993e-1f));
  p = fma(p, t, set1(3.3333331174e-1f));
  const vf ef = to_float(e);
  vf y = fma(ef, set1(-2.12194440e-4f), mul(mul(t, z), p));
  y = fma(set1(-0.5f), z, y);
  return neg(fma(ef, set1(0.693359375f), add(t, y)));
}

// cos and sin of 2 pi (high 2^32 + low) / 2^64.
HEDDLE_INLINE void unit_circle(vi low, vi high, vf* cosine, vf* sine) {
  const vi k = srl<30>(addi(high, set1i(1 << 29)));  // nearest quarter turn
  const vi rest = subi(high, shl<30>(k));
  const vf x = fma(to_float(rest), set1(1.4629180792671596e-9f), mul(to_float(srl<1>(low)), set1(6.812243160173109e-19f)));
  const vf z = mul(x, x);
  // Cephes sinf, cosf.
  vf s = set1(-1.9515295891e-4f);
  s = fma(s, z, set1(8.3321608736e-3f));
  s = fma(s, z, set1(-1.6666654611e-1f));
  s = fma(mul(s, z), x, x);
  vf c = set1(2.443315711809948e-5f);
  c = fma(c, z, set1(-1.388731625493765e-3f));
  c = fma(c, z, set1(4.166664568298827e-2f));
  c = add(fma(mul(c, z), z, mul(set1(-0.5f), z)), set1(1.0f));
  const vm even = eqi(andi(k, set1i(1)), set1i(0));
  const vi cos_sign = shl<30>(andi(addi(k, set1i(1)), set1i(2))), sin_sign = shl<30>(andi(k, set1i(2)));
  *cosine = as_float(xori(as_int(select(even, c, s)), cos_sign));
  *sine = as_float(xori(as_int(select(even, s, c)), sin_sign));
}

static void noise_group(const uint32_t* key, int64_t group, int64_t step, float stddev, float* out) {
  const uint64_t block = static_cast<uint64_t>(group) * kNoiseLanes;
  const uint32_t nonce[3] = {static_cast<uint32_t>(block >> 32), static_cast<uint32_t>(step),
                             static_cast<uint32_t>(static_cast<uint64_t>(step) >> 32)};
  for (int lane = 0; lane < kNoiseLanes; lane += W) {
    vi s[16];
    chacha_vectors(key, static_cast<uint32_t>(block) + static_cast<uint32_t>(lane), nonce, s);
    for (int m = 0; m < 4; ++m) {
      const vf minus_log = minus_log_uniform(s[4 * m], s[4 * m + 1]);
      const vf radius = mul(set1(stddev), sqrt(add(minus_log, minus_log)));
      vf cosine, sine;
      unit_circle(s[4 * m + 2], s[4 * m + 3], &cosine, &sine);
      store(out + 2 * m * kNoiseLanes + lane, mul(radius, cosine));
      store(out + (2 * m + 1) * kNoiseLanes + lane, mul(radius, sine));
    }
  }
}

const NoiseKernels& noise_kernels() {
  static const NoiseKernels k = {chacha_blocks, noise_group};
  return k;
}
