/**
 * Special functions of the accountants: the complementary error function and its relatives, and sums of
 * numbers kept as logarithms. Everything here is float64 and good to about 1e-15 relative error.
 */

/**
 * Chebyshev coefficients of (1 + 2x)·erfcx(x) in y = (x − 3)/(x + 3), 0 ≤ x < ∞.
 *
 * The expansion is that of Shepherd & Laframboise, "Chebyshev approximation of (1 + 2x)exp(x²)erfc x in
 * 0 ≤ x < ∞", Math. Comp. 36 (1981), with 3 in place of their 3.75 (as short, and better centred for
 * privacy losses). The numbers were computed for heddle at 50 digits from the cosine sums
 * c_j = (2/N) Σ_i f(y_i) cos(jθ_i), θ_i = π(i + ½)/N, N = 256; the first term dropped is 2e-17.
 */
const ERFCX_CHEBYSHEV = [
  2.35512514839312, 0.005353904539615676, -0.09377550342284209, 0.05436652555744322, -0.018976596707845208,
  0.004453426061462712, -0.0006335531710553147, 1.7661719523171593e-5, 1.2841532864056671e-5,
  -2.0072285659059913e-6, -1.807522790414837e-7, 7.549828343825093e-8, 1.885668523838603e-9,
  -2.699519049798364e-9, -1.4600791199391048e-11, 1.036160744598949e-10, 1.475715976623473e-12,
  -4.277340064396911e-12, -2.07922492859799e-13, 1.8134502003176963e-13, 1.973425574544739e-14,
  -7.287943737592673e-15, -1.5169878690228116e-15, 2.3514112258781403e-16, 1.0006111691821669e-16,
];

/** e^(x²)·erfc(x), for x ≥ 0: the part of erfc that neither underflows nor overflows. */
function erfcxPositive(x: number): number {
  if (x === Infinity) return 0;
  const y2 = (2 * (x - 3)) / (x + 3);
  let b0 = 0;
  let b1 = 0;
  let b2 = 0;
  for (let j = ERFCX_CHEBYSHEV.length - 1; j >= 0; j--) {
    b2 = b1;
    b1 = b0;
    b0 = ERFCX_CHEBYSHEV[j] + y2 * b1 - b2;
  }
  return (0.5 * (b0 - b2)) / (1 + 2 * x);
}

/** e^(−x²) without the rounding error of x²: the square of the leading 24 bits is exact. */
function expMinusSquare(x: number): number {
  const head = Math.fround(x);
  return Math.exp(-head * head) * Math.exp(-(x - head) * (x + head));
}

/** Complementary error function, erfc(x) = (2/√π) ∫ₓ^∞ e^(−t²) dt. */
export function erfc(x: number): number {
  if (x < 0) return 2 - erfc(-x);
  if (x > 27) return 0;
  return expMinusSquare(x) * erfcxPositive(x);
}

/** Scaled complementary error function e^(x²)·erfc(x); overflows to Infinity below about −26. */
export function erfcx(x: number): number {
  if (x >= 0) return erfcxPositive(x);
  return 2 * Math.exp(x * x) - erfcxPositive(-x);
}

/** ln erfc(x), finite for every finite x. */
export function logErfc(x: number): number {
  if (x >= 0) return Math.log(erfcxPositive(x)) - x * x;
  return Math.LN2 + Math.log1p(-0.5 * erfc(-x));
}

/** Standard normal cumulative distribution function Φ(x). */
export function normalCdf(x: number): number {
  return 0.5 * erfc(-x * Math.SQRT1_2);
}

/** ln(e^a + e^b). */
export function logAddExp(a: number, b: number): number {
  const high = Math.max(a, b);
  if (high === -Infinity || high === Infinity) return high;
  return high + Math.log1p(Math.exp(Math.min(a, b) - high));
}

/** ln(e^x − 1) for x > 0, without overflow and without cancellation. */
export function logExpm1(x: number): number {
  return x > 1 ? x + Math.log1p(-Math.exp(-x)) : Math.log(Math.expm1(x));
}

/** ln(1 + e^x): ln A from ln(A − 1), which keeps every digit when A is nearly 1. */
export function log1pExp(x: number): number {
  return x > 0 ? x + Math.log1p(Math.exp(-x)) : Math.log1p(Math.exp(x));
}
