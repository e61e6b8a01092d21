// The lane operations of attention that the common vocabulary lacks, for avx512.

// 2^x for x <= 0 (and a little above); relative error 1.6e-7; exactly 0 for -Inf, NaN stays NaN. vreduceps and
// vscalefps replace the clamp, two additions, shift and product of the generic form.
HEDDLE_INLINE vf exp2_lanes(vf x) {
  const vf f = _mm512_reduce_ps(x, 1);  // x - floor(x), in [0, 1]; vscalefps takes the floor itself
  vf p = set1(1.86713019e-3f);
  p = fma(p, f, set1(9.01703006e-3f));
  p = fma(p, f, set1(5.57999133e-2f));
  p = fma(p, f, set1(2.4016445e-1f));
  p = fma(p, f, set1(6.93151312e-1f));
  p = fma(p, f, set1(1.0f));
  return _mm512_scalef_ps(p, x);
}

// The first n (at most W) bytes as integers, 0 beyond.
HEDDLE_INLINE vi load_bytes(const uint8_t* p, int n) {
  const vm m = n >= W ? static_cast<vm>(0xffff) : first_n(n);
  return _mm512_cvtepu8_epi32(_mm_maskz_loadu_epi8(m, p));
}

// r[i][j] <-> r[j][i] of 16 vectors.
HEDDLE_INLINE void transpose_lanes(vf* r) {
  vf t[16];
  for (int i = 0; i < 16; i += 2) {
    t[i] = _mm512_unpacklo_ps(r[i], r[i + 1]);
    t[i + 1] = _mm512_unpackhi_ps(r[i], r[i + 1]);
  }
  for (int i = 0; i < 16; i += 4) {
    for (int h = 0; h < 2; ++h) {
      const __m512d a = _mm512_castps_pd(t[i + h]), b = _mm512_castps_pd(t[i + 2 + h]);
      r[i + 2 * h] = _mm512_castpd_ps(_mm512_unpacklo_pd(a, b));
      r[i + 2 * h + 1] = _mm512_castpd_ps(_mm512_unpackhi_pd(a, b));
    }
  }
  // r[4g + c] holds column c (mod 4) of rows 4g .. 4g+3, one 128-bit lane per column block.
  for (int c = 0; c < 4; ++c) {
    const vf a = _mm512_shuffle_f32x4(r[c], r[4 + c], 0x88), b = _mm512_shuffle_f32x4(r[8 + c], r[12 + c], 0x88);
    const vf d = _mm512_shuffle_f32x4(r[c], r[4 + c], 0xdd), e = _mm512_shuffle_f32x4(r[8 + c], r[12 + c], 0xdd);
    t[c] = _mm512_shuffle_f32x4(a, b, 0x88);
    t[8 + c] = _mm512_shuffle_f32x4(a, b, 0xdd);
    t[4 + c] = _mm512_shuffle_f32x4(d, e, 0x88);
    t[12 + c] = _mm512_shuffle_f32x4(d, e, 0xdd);
  }
  for (int i = 0; i < 16; ++i) r[i] = t[i];
}
