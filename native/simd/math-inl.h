// Elementary functions on vectors, written once for every instruction set. Error bounds (measured against
// double over the whole range by test/native/simd_test.cpp) are stated per function.

// e^(x - n ln2) for n = x / ln2 rounded to an integer: Cody-Waite reduction r = x - n ln2, |r| <= ln2/2, then a minimax
// polynomial of degree 7.
HEDDLE_INLINE vf exp_fraction(vf x, vf n) {
  vf r = fnma(n, set1(0.693145751953125f), x);
  r = fnma(n, set1(1.428606765330187e-6f), r);
  vf p = set1(0.000197904476f);
  p = fma(p, r, set1(0.00139469463f));
  p = fma(p, r, set1(0.0083335064f));
  p = fma(p, r, set1(0.0416662637f));
  p = fma(p, r, set1(0.166666658f));
  p = fma(p, r, set1(0.500000008f));
  p = fma(mul(r, r), p, r);
  return add(p, set1(1.0f));
}

// e^x; 1 ULP for x in [-87.3365, 88.7228]; below: 0 (no subnormals), above: +Inf. NaN gives NaN.
HEDDLE_INLINE vf exp(vf x) {
  const vf hi = set1(88.72283935546875f), lo = set1(-87.33654022216797f);
  const vf clamped = min(max(x, lo), hi);
  const vf nf = to_float(to_int(mul(clamped, set1(1.44269504088896341f))));
  vf p = exp_fraction(clamped, nf);
  // Scale by 2^n in two factors: n reaches 128, one factor would overflow.
  const vi n = to_int(nf);
  const vi half = sra<1>(n);
  const vi rest = subi(n, half);
  p = mul(p, as_float(shl<23>(addi(half, set1i(127)))));
  p = mul(p, as_float(shl<23>(addi(rest, set1i(127)))));
  p = select(lt(x, lo), set1(0.0f), p);
  p = select(gt(x, hi), set1(HUGE_VALF), p);
  return select(not_nan(x), p, x);
}

// Natural logarithm of positive normal x; 1 ULP. Zero and subnormals give -Inf-like large negatives; callers
// keep away from them. Range reduction to m in [sqrt(1/2), sqrt(2)), then atanh series in s = (m-1)/(m+1).
HEDDLE_INLINE vf log_normal(vf x) {
  const vi bits = as_int(x);
  // Subtracting the bits of sqrt(1/2) leaves the exponent that centres the mantissa around 1.
  const vi e = sra<23>(subi(bits, set1i(0x3f3504f3)));
  const vf m = as_float(subi(bits, shl<23>(e)));
  const vf f = sub(m, set1(1.0f));
  const vf s = div(f, add(f, set1(2.0f)));
  const vf z = mul(s, s);
  vf p = set1(0.2223f);
  p = fma(p, z, set1(0.28571429f));
  p = fma(p, z, set1(0.4f));
  p = fma(p, z, set1(0.66666667f));
  const vf ef = to_float(e);
  // log m = f - s (f - z p): the large term f stays exact, the correction is small.
  const vf tail = fnma(s, sub(f, mul(z, p)), mul(ef, set1(-2.12194440e-4f)));
  return fma(ef, set1(0.693359375f), add(f, tail));
}

// log(1 + y) for 0 <= y <= 1; 2.5 ULP. The quotient repairs the rounding of 1 + y.
HEDDLE_INLINE vf log1p_unit(vf y) {
  const vf u = add(set1(1.0f), y);
  const vf d = sub(u, set1(1.0f));
  const vm tiny = eq(d, set1(0.0f));
  const vf safe = select(tiny, set1(1.0f), d);
  return select(tiny, y, mul(log_normal(u), div(y, safe)));
}

// The same bits as exp for x up to 88, and e^-87 for less than that, with half of its instructions: 2^n is within reach of
// an addition to the exponent, and NaN needs no care.
HEDDLE_INLINE vf exp_moderate(vf x) {
  const vf clamped = max(set1(-87.0f), x);  // a NaN stays
  const vi n = to_int(mul(clamped, set1(1.44269504088896341f)));
  const vf nf = to_float(n);
  const vf p = exp_fraction(clamped, nf);
  return as_float(addi(as_int(p), shl<23>(n)));
}

// 1 / (1 + e^-x); 2.5 ULP for x >= -87; below: 0. NaN gives NaN.
HEDDLE_INLINE vf sigmoid(vf x) {
  const vm vanishes = lt(x, set1(-87.0f));
  const vf e = exp_moderate(neg(select(vanishes, set1(0.0f), x)));  // at most e^87: the reciprocal stays finite
  return select(vanishes, set1(0.0f), reciprocal(add(set1(1.0f), e)));
}

// sqrt(log(1 + e^x)), the score of Megatron's sqrtsoftplus router; 2 ULP for x >= -87.3365;
// below: 0, where the true value is under 1.1e-19.
HEDDLE_INLINE vf sqrt_softplus(vf x) {
  const vf positive = max(x, set1(0.0f));
  return sqrt(add(positive, log1p_unit(exp(neg(abs(x))))));
}

// tanh(x); 1.5 ULP. NaN gives NaN. An odd minimax polynomial up to 0.625, 1 - 2 / (1 + e^2x) beyond.
HEDDLE_INLINE vf tanh(vf x) {
  const vf a = abs(x), z = mul(x, x);
  vf p = set1(-0.005704942f);
  p = fma(p, z, set1(0.020639045f));
  p = fma(p, z, set1(-0.0537397f));
  p = fma(p, z, set1(0.13331442f));
  p = fma(p, z, set1(-0.3333328f));
  const vf near = fma(mul(p, z), x, x);
  const vf e = exp(min(add(a, a), set1(20.0f)));  // from 10 on the result is 1, and the reciprocal needs a finite value
  const vf far = fnma(set1(2.0f), reciprocal(add(set1(1.0f), e)), set1(1.0f));
  const vf r = select(le(a, set1(0.625f)), near, select(lt(x, set1(0.0f)), neg(far), far));
  return select(not_nan(x), r, x);
}

// erf(x); 5e-7 relative. Odd rational approximation on [-4, 4] (coefficients as published in Eigen's
// MathFunctionsImpl.h), 1 beyond.
HEDDLE_INLINE vf erf(vf x) {
  x = max(min(x, set1(4.0f)), set1(-4.0f));
  const vf z = mul(x, x);
  vf p = set1(-2.72614225801306e-10f);
  p = fma(p, z, set1(2.77068142495902e-08f));
  p = fma(p, z, set1(-2.10102402082508e-06f));
  p = fma(p, z, set1(-5.69250639462346e-05f));
  p = fma(p, z, set1(-7.34990630326855e-04f));
  p = fma(p, z, set1(-2.95459980854025e-03f));
  p = fma(p, z, set1(-1.60960333262415e-02f));
  vf q = set1(-1.45660718464996e-05f);
  q = fma(q, z, set1(-2.13374055278905e-04f));
  q = fma(q, z, set1(-1.68282697438203e-03f));
  q = fma(q, z, set1(-7.37332916720468e-03f));
  q = fma(q, z, set1(-1.42647390514189e-02f));
  return div(mul(x, p), q);
}

// x times the standard normal distribution function.
HEDDLE_INLINE vf gelu_erf(vf x) {
  return mul(mul(set1(0.5f), x), add(set1(1.0f), erf(mul(x, set1(0.70710678118654752f)))));
}

// GELU with the tanh approximation: 0.5 x (1 + tanh(z)) = x sigmoid(2 z).
HEDDLE_INLINE vf gelu_tanh(vf x) {
  const vf z = mul(x, fma(mul(x, x), set1(0.07135481282f), set1(1.5957691216057308f)));
  return mul(x, sigmoid(z));
}
