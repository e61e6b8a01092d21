/**
 * The privacy loss of one step of the Poisson-subsampled Gaussian mechanism, as a random variable.
 *
 * With M = (1−q)·N(0,σ²) + q·N(1,σ²) and r(x) = dM/dN(0,σ²) = 1 − q + q·e^{(2x−1)/2σ²}:
 * removing an example gives Y = ln r(x), x ∼ M; adding one gives Y = −ln r(x), x ∼ N(0,σ²).
 * Sources: Gopi, Lee & Wutschitz, "Numerical Composition of Differential Privacy" (2021), section 5 and
 * appendix B; Zhu, Dong & Wang, "Optimal Accounting of Differential Privacy via Characteristic Function"
 * (2022) for the two directions being a dominating pair.
 */
import { erfc } from './special.ts';

/** Which neighbouring data set the loss compares with. */
export type Direction = 'remove' | 'add';

/** Distribution of the privacy loss Y of one step. */
export interface LossVariable {
  /** P(Y ≤ t) */
  below(t: number): number;
  /** P(Y > t), to full relative precision where it is small */
  above(t: number): number;
  /** E[Y] */
  readonly mean: number;
}

/**
 * z(t) = ln((e^t − 1 + q)/q), the u = (2x−1)/2σ² at which ln r(x) = t; −∞ where ln r is never that small.
 */
export function inverseLoss(t: number, q: number): number {
  if (q === 1) return t;
  if (t > 1) return t - Math.log(q) + Math.log1p(-(1 - q) * Math.exp(-t));
  if (q > 0.5 && t < -1) {
    const y = Math.exp(t) - (1 - q);
    return y > 0 ? Math.log(y / q) : -Infinity;
  }
  const y = Math.expm1(t) / q;
  return y > -1 ? Math.log1p(y) : -Infinity;
}

/** ln r at u = (2x−1)/2σ². */
function lossAt(u: number, q: number): number {
  if (q === 1) return u;
  if (u > 700) return u + Math.log(q);
  if (q > 0.5 && u < -1) return Math.log(1 - q + q * Math.exp(u));
  return Math.log1p(q * Math.expm1(u));
}

/**
 * E[Y] by the trapezoidal rule over x, which converges exponentially (the integrand is analytic up to the
 * branch points of ln r at Im x = ±πσ²).
 */
function meanLoss(sigma: number, q: number, direction: Direction): number {
  const half = 1 / (2 * sigma * sigma);
  if (q === 1) return half;
  const step = 0.4 * Math.min(sigma, sigma * sigma);
  const width = 9 * sigma;
  const around = (centre: number): number => {
    let sum = 0;
    for (let i = Math.ceil((centre - width) / step); i * step <= centre + width; i++) {
      const x = i * step;
      sum += Math.exp(-0.5 * ((x - centre) / sigma) ** 2) * lossAt((2 * x - 1) * half, q);
    }
    return (sum * step) / (sigma * Math.sqrt(2 * Math.PI));
  };
  return direction === 'add' ? -around(0) : (1 - q) * around(0) + q * around(1);
}

/** The loss variable of one step at noise multiplier σ and sampling rate q, 0 < q ≤ 1. */
export function lossVariable(sigma: number, q: number, direction: Direction): LossVariable {
  const scale = sigma * Math.SQRT1_2;
  const shift = Math.SQRT1_2 / (2 * sigma);
  const mean = meanLoss(sigma, q, direction);
  if (direction === 'remove') {
    const mix = (z: number, sign: number): number =>
      0.5 * (q * erfc(sign * (z * scale - shift)) + (1 - q) * erfc(sign * (z * scale + shift)));
    return {
      mean,
      below: (t) => mix(inverseLoss(t, q), -1),
      above: (t) => mix(inverseLoss(t, q), 1),
    };
  }
  return {
    mean,
    below: (t) => 0.5 * erfc(inverseLoss(-t, q) * scale + shift),
    above: (t) => 0.5 * erfc(-(inverseLoss(-t, q) * scale + shift)),
  };
}

/** Smallest interval, up to bisection, outside of which Y has at most `tail` probability on either side. */
export function lossRange(loss: LossVariable, tail: number): { low: number; high: number } {
  const solve = (sign: number, probability: (t: number) => number): number => {
    let out = 1;
    while (probability(sign * out) > tail) out *= 2;
    let inside = -out;
    while (probability(sign * inside) <= tail) inside *= 2;
    for (let i = 0; i < 60 && out - inside > 1e-12 * Math.abs(out); i++) {
      const middle = 0.5 * (inside + out);
      if (probability(sign * middle) > tail) inside = middle;
      else out = middle;
    }
    return sign * out;
  };
  return { low: solve(-1, loss.below), high: solve(1, loss.above) };
}

/** A loss variable rounded to multiples of a mesh, then shifted so that its mean is exact. */
export interface DiscreteLoss {
  /** probability of (first + i)·mesh + shift */
  readonly probabilities: Float64Array;
  readonly first: number;
  readonly shift: number;
}

/** Rounds `loss` to the nearest multiple of `mesh` on [low, high]. */
export function discretise(loss: LossVariable, low: number, high: number, mesh: number): DiscreteLoss {
  const first = Math.floor(low / mesh + 0.5);
  const last = Math.max(first, Math.ceil(high / mesh - 0.5));
  const probabilities = new Float64Array(last - first + 1);
  const edge = (i: number): number => (first + i - 0.5) * mesh;
  // Differences of P(Y ≤ t) in the lower half and of P(Y > t) in the upper: neither tail cancels.
  let i = 0;
  let previous = loss.below(edge(0));
  while (i < probabilities.length && previous < 0.5) {
    const next = loss.below(edge(i + 1));
    probabilities[i++] = Math.max(0, next - previous);
    previous = next;
  }
  previous = loss.above(edge(i));
  while (i < probabilities.length) {
    const next = loss.above(edge(i + 1));
    probabilities[i++] = Math.max(0, previous - next);
    previous = next;
  }
  let total = 0;
  for (const p of probabilities) total += p;
  let mean = 0;
  for (let j = 0; j < probabilities.length; j++) {
    probabilities[j] /= total;
    mean += probabilities[j] * (first + j);
  }
  return { probabilities, first, shift: loss.mean - mean * mesh };
}
