import { readFileSync } from 'node:fs';
import { normalCdf } from '../../lib/privacy/accountants/special.ts';

export const golden = JSON.parse(
  readFileSync(new URL('../golden/privacy/accountants.json', import.meta.url), 'utf8'),
);

export type Row = [noiseMultiplier: number, sampleRate: number, steps: number];
export const toPhases = (rows: Row[]) =>
  rows.map(([noiseMultiplier, sampleRate, steps]) => ({ noiseMultiplier, sampleRate, steps }));
export const phase = (noiseMultiplier: number, sampleRate: number, steps: number) => ({
  noiseMultiplier,
  sampleRate,
  steps,
});
export const relative = (actual: number, expected: number) =>
  Math.abs(actual - expected) / Math.abs(expected);

/**
 * δ(ε) of k ≤ 3 steps by exact quadrature, written independently of the accountants: with one step's closed
 * form at the core, δ_k(ε) = E_y[δ_{k−1}(ε − y)], the expectation by the trapezoidal rule.
 */
export function quadratureDelta(sigma: number, q: number, steps: number, direction: 'remove' | 'add') {
  const loss = (x: number) => Math.log1p(q * Math.expm1((2 * x - 1) / (2 * sigma * sigma)));
  const upper = (x: number, mean: number) => normalCdf((mean - x) / sigma);
  const one = (epsilon: number): number => {
    if (direction === 'remove') {
      const y = Math.expm1(epsilon) / q;
      if (y <= -1) return -Math.expm1(epsilon);
      const x = sigma * sigma * Math.log1p(y) + 0.5;
      return (1 - q) * upper(x, 0) + q * upper(x, 1) - Math.exp(epsilon) * upper(x, 0);
    }
    const y = Math.expm1(-epsilon) / q;
    if (y <= -1) return 0;
    const x = sigma * sigma * Math.log1p(y) + 0.5;
    const mixture = (1 - q) * (1 - upper(x, 0)) + q * (1 - upper(x, 1));
    return 1 - upper(x, 0) - Math.exp(epsilon) * mixture;
  };
  const h = (steps === 2 ? 0.01 : 0.08) * Math.min(sigma, sigma * sigma);
  const points: { weight: number; value: number }[] = [];
  for (let x = -9 * sigma; x <= 1 + 9 * sigma; x += h) {
    const n0 = Math.exp(-0.5 * (x / sigma) ** 2);
    const n1 = Math.exp(-0.5 * ((x - 1) / sigma) ** 2);
    const density = direction === 'remove' ? (1 - q) * n0 + q * n1 : n0;
    const value = direction === 'remove' ? loss(x) : -loss(x);
    points.push({ weight: (density * h) / (sigma * Math.sqrt(2 * Math.PI)), value });
  }
  const many = (epsilon: number, k: number): number => {
    if (k === 1) return one(epsilon);
    let sum = 0;
    for (const { weight, value } of points) {
      if (weight > 1e-17) sum += weight * many(epsilon - value, k - 1);
    }
    return sum;
  };
  return (epsilon: number) => many(epsilon, steps);
}

export function quadratureEpsilon(sigma: number, q: number, steps: number, delta: number): number {
  const remove = quadratureDelta(sigma, q, steps, 'remove');
  const add = quadratureDelta(sigma, q, steps, 'add');
  let low = 0;
  let high = 64;
  for (let i = 0; i < 26; i++) {
    const middle = 0.5 * (low + high);
    if (remove(middle) > delta || add(middle) > delta) low = middle;
    else high = middle;
  }
  return 0.5 * (low + high);
}
