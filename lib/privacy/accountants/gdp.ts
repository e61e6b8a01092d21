/**
 * Gaussian differential privacy: the central limit approximation of DP-SGD. A diagnostic, not a guarantee.
 *
 * Sources: Dong, Roth & Su, "Gaussian Differential Privacy" (2019), corollary 2.13 for δ(ε); Bu, Dong, Long &
 * Su, "Deep Learning with Gaussian Differential Privacy" (2020), for μ = q·√(T(e^{1/σ²} − 1)) under Poisson
 * sampling. The limit usually reports too small an ε (Gopi et al. 2021, section 1).
 */
import type { PrivacyPhase } from './options.ts';
import { erfc, erfcx, normalCdf } from './special.ts';

/** μ of the composition; μ² adds up. Exact where q = 1 (the mechanism is 1/σ-GDP), else the limit's. */
export function gdpMu(phases: readonly PrivacyPhase[]): number {
  let sum = 0;
  for (const { noiseMultiplier, sampleRate, steps } of phases) {
    const inverse = 1 / (noiseMultiplier * noiseMultiplier);
    sum += steps * (sampleRate === 1 ? inverse : sampleRate * sampleRate * Math.expm1(inverse));
  }
  return Math.sqrt(sum);
}

/**
 * δ(ε) of μ-GDP: Φ(−ε/μ + μ/2) − e^ε Φ(−ε/μ − μ/2). With a = (ε/μ − μ/2)/√2 and b = (ε/μ + μ/2)/√2 it is
 * ½e^{−a²}(erfcx(a) − erfcx(b)), since b² − a² = ε: no overflow, and no cancellation in the tail.
 */
export function gaussianDelta(epsilon: number, mu: number): number {
  if (mu === 0) return epsilon >= 0 ? 0 : -Math.expm1(epsilon);
  if (mu === Infinity) return 1;
  const a = (epsilon / mu - mu / 2) * Math.SQRT1_2;
  const b = (epsilon / mu + mu / 2) * Math.SQRT1_2;
  if (b < 0) return normalCdf(-a * Math.SQRT2) - Math.exp(epsilon) * normalCdf(-b * Math.SQRT2);
  if (a < 0) return 0.5 * (erfc(a) - Math.exp(-a * a) * erfcx(b));
  return 0.5 * Math.exp(-a * a) * (erfcx(a) - erfcx(b));
}

/** ε(δ) of μ-GDP, rounded up (the bisection returns its upper end); 0 where δ(0) ≤ δ. */
export function gaussianEpsilon(mu: number, delta: number): number {
  if (mu === Infinity) return Infinity;
  if (gaussianDelta(0, mu) <= delta) return 0;
  let low = 0;
  let high = 1;
  while (gaussianDelta(high, mu) > delta) {
    low = high;
    high *= 2;
    if (high === Infinity) return Infinity;
  }
  for (let i = 0; i < 100 && high - low > 1e-15 * high; i++) {
    const middle = 0.5 * (low + high);
    if (gaussianDelta(middle, mu) > delta) low = middle;
    else high = middle;
  }
  return high;
}
