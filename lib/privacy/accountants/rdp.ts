/**
 * Rényi differential privacy of the Poisson-subsampled Gaussian mechanism, and its conversion to (ε, δ).
 *
 * Sources: Mironov, Talwar & Zhang, "Rényi Differential Privacy of the Sampled Gaussian Mechanism" (2019),
 * section 3.3; Canonne, Kamath & Steinke, "The Discrete Gaussian for Differential Privacy" (2020),
 * proposition 12 (also Balle et al. 2020, theorem 21) for the conversion.
 */
import { badOption, type PrivacyPhase } from './options.ts';
import { log1pExp, logAddExp, logExpm1 } from './special.ts';

/** The orders α that Opacus uses by default: 1.1, 1.2, …, 10.9, then 12, 13, …, 63. */
export const DEFAULT_ORDERS: readonly number[] = [
  ...Array.from({ length: 99 }, (_, i) => 1 + (i + 1) / 10),
  ...Array.from({ length: 52 }, (_, i) => 12 + i),
];

/** Orders at or below this are left out of conversions: 1/(α − 1) blows rounding errors up. */
const SMALLEST_ORDER = 1.01;

/** Below this σ fractional orders take the bound without sampling, α/2σ², which is then within 2 %. */
const SMALLEST_SIGMA = 0.01;

/**
 * RDP at one order α > 1 of one step: D_α(mixture ‖ N(0, σ²)) of the sampled Gaussian mechanism, which is
 * the larger of the two directions (Mironov et al., theorem 5).
 *
 * RDP(α) = ln A / (α − 1), A = E_{x∼N(0,σ²)} [ (1 − q + q·e^{(2x−1)/2σ²})^α ].
 * What is computed is ln(A − 1), because A − 1 is as small as q² and ln A must keep its digits.
 */
export function rdpOfStep(noiseMultiplier: number, sampleRate: number, order: number): number {
  if (sampleRate === 0) return 0;
  const integer = Number.isInteger(order);
  if (sampleRate === 1 || (!integer && noiseMultiplier < SMALLEST_SIGMA)) {
    return order / (2 * noiseMultiplier * noiseMultiplier);
  }
  const logAMinus1 = integer
    ? logAMinus1Integer(noiseMultiplier, sampleRate, order)
    : logAMinus1Fractional(noiseMultiplier, sampleRate, order);
  return log1pExp(logAMinus1) / (order - 1);
}

/**
 * Integer α. A = Σ_k C(α,k) (1−q)^{α−k} q^k e^{(k²−k)/2σ²}. The weights add up to 1 and the terms k = 0, 1
 * have exponent 0, so A − 1 is the same sum with e^x − 1 for e^x: positive terms only, k from 2.
 */
function logAMinus1Integer(sigma: number, q: number, order: number): number {
  const logQ = Math.log(q);
  const log1mQ = Math.log1p(-q);
  let logBinomial = Math.log(order);
  let sum = -Infinity;
  for (let k = 2; k <= order; k++) {
    logBinomial += Math.log((order - k + 1) / k);
    const weight = logBinomial + k * logQ + (order - k) * log1mQ;
    sum = logAddExp(sum, weight + logExpm1((k * (k - 1)) / (2 * sigma * sigma)));
  }
  return sum;
}

/**
 * Fractional α. With y = q(e^u − 1), u = (2x−1)/2σ², E[y] = 0, hence
 * A − 1 = E_{x∼N(0,σ²)} [ (1+y)^α − 1 − αy ], whose integrand is never negative (Bernoulli).
 *
 * It is integrated by the trapezoidal rule on the whole line, which converges exponentially for it: the
 * integrand is analytic up to the branch points at Im x = ±πσ². Its mass lies around x = 0 and x = α;
 * elsewhere it is below 2^α e^{−w²/2σ²} of its peak, so two windows of half-width w hold it to 1e-19.
 */
function logAMinus1Fractional(sigma: number, q: number, order: number): number {
  const step = 0.4 * Math.min(sigma, sigma * sigma);
  const width = sigma * Math.sqrt(2 * (44 + order * Math.LN2));
  let sum = -Infinity;
  const addWindow = (from: number, to: number): void => {
    for (let i = Math.ceil(from / step); i * step <= to; i++) {
      const x = i * step;
      const term = logBernoulliExcess((2 * x - 1) / (2 * sigma * sigma), q, order);
      sum = logAddExp(sum, term - 0.5 * (x / sigma) ** 2);
    }
  };
  if (width >= order - width) {
    addWindow(-width, order + width);
  } else {
    addWindow(-width, width);
    addWindow(order - width, order + width);
  }
  return sum + Math.log(step / (sigma * Math.sqrt(2 * Math.PI)));
}

/** ln[ (1+y)^α − 1 − αy ] for y = q(e^u − 1). */
function logBernoulliExcess(u: number, q: number, order: number): number {
  const y = u < 700 ? q * Math.expm1(u) : Infinity;
  if (Math.abs(order * y) < 0.1) {
    // Σ_{n≥2} C(α,n) yⁿ: the closed form would cancel here.
    let term = 0.5 * order * (order - 1) * y * y;
    let sum = term;
    for (let n = 3; Math.abs(term) > 1e-17 * Math.abs(sum); n++) {
      term *= ((order - n + 1) / n) * y;
      sum += term;
    }
    return Math.log(sum);
  }
  if (y < 1) return Math.log(Math.expm1(order * Math.log1p(y)) - order * y);
  const logY = Math.log(q) + u + Math.log1p(-Math.exp(-u));
  const logPower = order * log1pExp(logY);
  return logPower + Math.log1p(-Math.exp(-logPower) - Math.exp(Math.log(order) + logY - logPower));
}

/** RDP of a whole composition at every order (RDP adds up). */
export function composedRdp(phases: readonly PrivacyPhase[], orders: readonly number[]): number[] {
  return orders.map((order) => {
    let sum = 0;
    for (const { noiseMultiplier, sampleRate, steps } of phases) {
      sum += steps * rdpOfStep(noiseMultiplier, sampleRate, order);
    }
    return sum;
  });
}

/**
 * ε(δ) = min_α r + ln(1 − 1/α) − ln(δα)/(α − 1) with r = RDP(α); an α with δ² ≥ 1 − e^{−r} proves ε = 0.
 */
export function rdpToEpsilon(
  orders: readonly number[],
  rdp: readonly number[],
  delta: number,
): { epsilon: number; order: number } {
  let best = { epsilon: Infinity, order: Number.NaN };
  for (let i = 0; i < orders.length; i++) {
    const order = orders[i];
    const r = rdp[i];
    if (order <= SMALLEST_ORDER || Number.isNaN(r)) continue;
    let epsilon = r + Math.log1p(-1 / order) - Math.log(delta * order) / (order - 1);
    if (delta * delta + Math.expm1(-r) >= 0 || epsilon < 0) epsilon = 0;
    if (epsilon < best.epsilon) best = { epsilon, order };
  }
  return best;
}

/** δ(ε): the same bound solved for δ, and δ² ≤ 1 − e^{−r}, whichever is smaller. */
export function rdpToDelta(
  orders: readonly number[],
  rdp: readonly number[],
  epsilon: number,
): { delta: number; order: number } {
  let best = { delta: 1, order: Number.NaN };
  for (let i = 0; i < orders.length; i++) {
    const order = orders[i];
    const r = rdp[i];
    if (order <= SMALLEST_ORDER || Number.isNaN(r)) continue;
    const converted = Math.exp((order - 1) * (r - epsilon + Math.log1p(-1 / order)) - Math.log(order));
    const delta = Math.min(converted, Math.sqrt(-Math.expm1(-r)));
    if (delta < best.delta) best = { delta, order };
  }
  return best;
}

/** Checks the `orders` option. */
export function checkOrders(orders: unknown): readonly number[] {
  if (orders === undefined) return DEFAULT_ORDERS;
  if (!Array.isArray(orders) || orders.length === 0) {
    throw badOption('orders', orders, 'a non-empty array of numbers greater than 1.01');
  }
  orders.forEach((order, i) => {
    if (typeof order !== 'number' || !(order > SMALLEST_ORDER && order < Infinity)) {
      throw badOption(`orders[${i}]`, order, 'a finite number greater than 1.01');
    }
  });
  return orders;
}
