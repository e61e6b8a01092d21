import { describe, expect, it } from 'vitest';
import {
  calibrateNoiseMultiplier,
  computeDelta,
  computeEpsilon,
  PrivacyLedger,
  TruncatedPoissonSampler,
} from '../../lib/privacy/index.ts';
import { expectThrow } from '../helpers/errors.ts';

/** Φ by Simpson's rule: nothing of the accountants is used here. */
function normalCdf(x: number): number {
  if (x < -12) return 0;
  const [n, a] = [4000, -12];
  const h = (x - a) / n;
  let sum = 0;
  for (let i = 0; i <= n; i++) {
    const weight = i === 0 || i === n ? 1 : i % 2 ? 4 : 2;
    sum += weight * Math.exp(-0.5 * (a + i * h) ** 2);
  }
  return (sum * h) / 3 / Math.sqrt(2 * Math.PI);
}

/** δ(ε) of one Gaussian query of sensitivity 1 (Balle & Wang 2018, theorem 8). */
const gaussian = (sigma: number, epsilon: number) =>
  normalCdf(1 / (2 * sigma) - epsilon * sigma) -
  Math.exp(epsilon) * normalCdf(-1 / (2 * sigma) - epsilon * sigma);

describe('truncated batches', () => {
  it('one query with every example: δ of the Gaussian plus (1 + e^ε)·τ, and back', () => {
    const phase = { noiseMultiplier: 2, sampleRate: 1, steps: 1, overflowProbability: 1e-4 };
    for (const epsilon of [0.5, 1, 2]) {
      const expected = gaussian(2, epsilon) + (1 + Math.exp(epsilon)) * 1e-4;
      expect(computeDelta({ accountant: 'gdp', epsilon, ...phase }).delta).toBeCloseTo(expected, 10);
    }
    const { epsilon } = computeEpsilon({ accountant: 'gdp', delta: 0.01, ...phase });
    const spent = gaussian(2, epsilon) + (1 + Math.exp(epsilon)) * 1e-4;
    expect(spent).toBeLessThanOrEqual(0.01 * (1 + 1e-9));
    expect(spent).toBeGreaterThan(0.0099); // and no more is given away than it takes
  });

  it.each(['rdp', 'prv', 'gdp'] as const)('%s: ε is that of what truncation leaves of δ', (accountant) => {
    const poisson = { noiseMultiplier: 1.1, sampleRate: 0.01, steps: 500 };
    const overflowProbability = 1e-10;
    const delta = 1e-5;
    const { epsilon, ...rest } = computeEpsilon({ accountant, delta, ...poisson, overflowProbability });
    const left = delta - (1 + Math.exp(epsilon)) * 500 * overflowProbability;
    const exact = computeEpsilon({ accountant, delta: left, ...poisson }).epsilon;
    expect(epsilon).toBeGreaterThanOrEqual(exact);
    expect(epsilon).toBeLessThan(exact * 1.0001);
    expect(epsilon).toBeGreaterThan(computeEpsilon({ accountant, delta, ...poisson }).epsilon);
    if (accountant === 'prv') expect(rest).toEqual({ upper: epsilon }); // no bound from below is known
    const back = computeDelta({ accountant, epsilon, ...poisson, overflowProbability }).delta;
    expect(back).toBeLessThanOrEqual(delta * 1.01); // PRV: a mesh of its own
  });

  it('where truncation takes all of δ, nothing is guaranteed', () => {
    const run = { noiseMultiplier: 1, sampleRate: 0.01, steps: 100, overflowProbability: 1e-6 };
    for (const accountant of ['rdp', 'prv', 'gdp'] as const) {
      expect(computeEpsilon({ accountant, delta: 1e-5, ...run }).epsilon).toBe(Infinity);
    }
    expect(computeDelta({ accountant: 'rdp', epsilon: 20, ...run }).delta).toBe(1);
    expectThrow(
      () => calibrateNoiseMultiplier({ accountant: 'rdp', epsilon: 1, delta: 1e-5, ...run }),
      'ERR_OPTION',
      /truncated batches take a part of delta/,
    );
  });

  it('a mechanism small enough to integrate: Poisson δ does not cover it, with the addition it does', () => {
    // Four examples of −1 and, on one side, a fifth of +1; batches of at most two; the sum is released with noise σ.
    const [others, rate, most, sigma] = [4, 0.3, 2, 1];
    const choose = (n: number, k: number): number => (k === 0 ? 1 : (choose(n - 1, k - 1) * n) / k);
    /** Probability of every sum. */
    const sums = (fifth: boolean, limit: number) => {
      const out = new Map<number, number>();
      const add = (sum: number, p: number) => out.set(sum, (out.get(sum) ?? 0) + p);
      for (let k = 0; k <= others; k++) {
        const p = choose(others, k) * rate ** k * (1 - rate) ** (others - k);
        add(-Math.min(k, limit), fifth ? p * (1 - rate) : p);
        if (!fifth) continue;
        const size = Math.min(k + 1, limit);
        const kept = size / (k + 1); // the fifth survives the cut
        add(1 - (size - 1), p * rate * kept);
        add(-size, p * rate * (1 - kept));
      }
      return out;
    };
    const density = (weights: Map<number, number>, x: number) =>
      [...weights].reduce((s, [m, p]) => s + p * Math.exp(-0.5 * ((x - m) / sigma) ** 2), 0) /
      (sigma * Math.sqrt(2 * Math.PI));
    const delta = (limit: number, epsilon: number) => {
      const [a, b] = [sums(false, limit), sums(true, limit)];
      const h = 0.002;
      let [add, remove] = [0, 0];
      for (let x = -15; x < 15; x += h) {
        const [p, q] = [density(a, x), density(b, x)];
        add += h * Math.max(0, q - Math.exp(epsilon) * p);
        remove += h * Math.max(0, p - Math.exp(epsilon) * q);
      }
      return Math.max(add, remove);
    };
    const tau = [3, 4, 5].reduce((s, k) => s + choose(5, k) * rate ** k * (1 - rate) ** (5 - k), 0);
    const sampler = { key: new Uint8Array(32), size: others, sampleRate: rate, maxBatch: most };
    const bound = new TruncatedPoissonSampler(sampler).overflowProbability;
    expect(bound).toBeGreaterThan(tau); // of five, though the dataset is the one of four
    expect(bound).toBeLessThan(0.5);
    let uncovered = 0;
    for (const epsilon of [0.1, 0.3, 0.6, 1, 1.5]) {
      const poisson = {
        accountant: 'prv',
        epsilon,
        noiseMultiplier: sigma,
        sampleRate: rate,
        steps: 1,
      } as const;
      const plain = computeDelta({ ...poisson, epsilonError: 0.002, deltaError: 1e-6 }).delta;
      expect(delta(others + 1, epsilon)).toBeLessThanOrEqual(plain);
      const truncated = delta(most, epsilon);
      if (truncated > delta(others + 1, epsilon)) uncovered++;
      const whole = computeDelta({
        ...poisson,
        overflowProbability: tau,
        epsilonError: 0.002,
        deltaError: 1e-6,
      }).delta;
      expect(truncated).toBeLessThanOrEqual(whole);
    }
    expect(uncovered).toBeGreaterThan(0);
  });

  it('the ledger keeps τ: phases apart, saved, checked', () => {
    const phase = { noiseMultiplier: 1.1, sampleRate: 0.01, steps: 10 };
    const ledger = new PrivacyLedger()
      .record(phase)
      .record({ ...phase, overflowProbability: 0 })
      .record({ ...phase, overflowProbability: 1e-12 })
      .record({ ...phase, overflowProbability: 1e-12 });
    expect(ledger.phases).toEqual([
      { ...phase, steps: 20 },
      { ...phase, steps: 20, overflowProbability: 1e-12 },
    ]);
    const saved = ledger.toJSON();
    expect(PrivacyLedger.fromJSON(JSON.stringify(saved)).phases).toEqual(ledger.phases);
    expect(PrivacyLedger.fromJSON(saved).continues(ledger)).toBe(true);
    const forgotten = saved.phases.map(({ overflowProbability: _, ...rest }) => rest);
    expectThrow(
      () => PrivacyLedger.fromJSON({ ...saved, phases: forgotten }),
      'ERR_CHECKPOINT',
      /checksum does not match/,
    );
    const delta = 1e-5;
    const all = { steps: 40, noiseMultiplier: 1.1, sampleRate: 0.01, overflowProbability: 0.5e-12 };
    expect(ledger.epsilon({ accountant: 'rdp', delta }).epsilon).toBeCloseTo(
      computeEpsilon({ accountant: 'rdp', delta, ...all }).epsilon,
      12,
    );
    expectThrow(
      () => ledger.record({ ...phase, overflowProbability: 2 }),
      'ERR_OPTION',
      /overflowProbability: must be a number from 0 to 1, got 2/,
    );
  });

  it('calibration spends the budget, truncation included', () => {
    const run = { sampleRate: 0.01, steps: 1000, overflowProbability: 1e-10 };
    const budget = { accountant: 'rdp', delta: 1e-5 } as const;
    const sigma = calibrateNoiseMultiplier({ ...budget, epsilon: 3, ...run });
    const { epsilon } = computeEpsilon({ ...budget, noiseMultiplier: sigma, ...run });
    expect(epsilon).toBeLessThanOrEqual(3);
    expect(epsilon).toBeGreaterThan(2.99);
    const poisson = calibrateNoiseMultiplier({ ...budget, epsilon: 3, sampleRate: 0.01, steps: 1000 });
    expect(sigma).toBeGreaterThan(poisson);
  });
});
