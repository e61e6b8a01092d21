import { describe, expect, it } from 'vitest';
import { compose, deltaAt, sumRange } from '../../lib/privacy/accountants/composedLoss.ts';
import { gaussianEpsilon } from '../../lib/privacy/accountants/gdp.ts';
import { discretise, lossRange, lossVariable } from '../../lib/privacy/accountants/lossVariable.ts';
import { computeDelta, computeEpsilon } from '../../lib/privacy/index.ts';
import {
  golden,
  phase,
  quadratureDelta,
  quadratureEpsilon,
  type Row,
  relative,
  toPhases,
} from '../helpers/accountants.ts';
import { thrown } from '../helpers/errors.ts';

describe('PRV accountant', () => {
  it('Opacus: lower, estimate and upper; the bounds contain the published values', () => {
    for (const { phases, delta, prv } of golden.opacus_run.rows) {
      const result = computeEpsilon({ accountant: 'prv', phases: toPhases(phases), delta });
      expect(relative(result.estimate!, prv[1])).toBeLessThan(1e-6);
      expect(relative(result.lower!, prv[0])).toBeLessThan(1e-6);
      expect(relative(result.upper!, prv[2])).toBeLessThan(1e-6);
      expect(result.epsilon).toBe(result.upper);
      expect(result.lower).toBeLessThan(prv[1]);
      expect(result.upper).toBeGreaterThan(prv[1]);
      expect(result.upper! - result.lower!).toBeLessThan(0.022);
    }
    const listed = golden.opacus_tests.epsilon[1];
    const { epsilon } = computeEpsilon({
      accountant: 'prv',
      phases: toPhases(listed.phases),
      delta: listed.delta,
    });
    expect(relative(epsilon, listed.epsilon)).toBeLessThan(1e-6);
  });

  it('the values of the project page', () => {
    const result = computeEpsilon({
      accountant: 'prv',
      ...phase(1.1, 256 / 60000, 14063),
      delta: 1e-5,
    });
    expect(result.lower).toBeCloseTo(2.3715, 4);
    expect(result.estimate).toBeCloseTo(2.3817, 4);
    expect(result.upper).toBeCloseTo(2.3918, 4);
    const long = computeEpsilon({ accountant: 'prv', ...phase(1.5, 0.05, 1000), delta: 1e-6 });
    expect(long.epsilon).toBeCloseTo(6.20996925, 6);
  });

  it.each([
    [1, 0.5, 1, 1e-5],
    [1.1, 0.01, 1, 1e-6],
    [0.5, 0.1, 2, 1e-5],
    [2, 0.9, 2, 1e-7],
    [0.8, 0.3, 3, 1e-5],
    [1.5, 0.99, 3, 1e-3],
  ])(
    'sigma %d, q %d, %d steps: exact quadrature lies within the bounds, never above epsilon',
    (sigma, q, steps, delta) => {
      const exact = quadratureEpsilon(sigma, q, steps, delta);
      expect(exact).toBeGreaterThan(0.01);
      for (const epsilonError of [0.1, 0.01, 0.001]) {
        const result = computeEpsilon({ accountant: 'prv', ...phase(sigma, q, steps), delta, epsilonError });
        expect(result.lower).toBeLessThanOrEqual(exact);
        expect(result.epsilon).toBeGreaterThanOrEqual(exact);
        expect(result.upper! - result.lower!).toBeLessThan(2 * epsilonError + 0.002);
        expect(Math.abs(result.estimate! - exact)).toBeLessThan(0.04 * epsilonError + 1e-6);
      }
      const rdp = computeEpsilon({ accountant: 'rdp', ...phase(sigma, q, steps), delta });
      expect(rdp.epsilon).toBeGreaterThanOrEqual(exact);
    },
  );

  it.each(golden.dense_convolution.rows as number[][])(
    'sigma %d, q %d, %d steps: agrees with a dense convolution rounded down and up',
    (sigma, q, steps, delta, low, high) => {
      const result = computeEpsilon({ accountant: 'prv', ...phase(sigma, q, steps), delta });
      expect(result.estimate).toBeGreaterThan(low);
      expect(result.estimate).toBeLessThan(high);
      expect(result.lower).toBeLessThan(low);
      expect(result.epsilon).toBeGreaterThan(high);
      const rdp = computeEpsilon({ accountant: 'rdp', ...phase(sigma, q, steps), delta });
      expect(rdp.epsilon).toBeGreaterThan(high);
    },
  );

  // `computeEpsilon` returns the worse direction, which hides the other: each is checked by itself here.
  it.each(['remove', 'add'] as const)(
    'the composed loss of direction %s has the exact delta',
    (direction) => {
      for (const [sigma, q, steps] of [
        [1, 0.5, 1],
        [0.8, 0.3, 2],
        [0.6, 0.05, 2],
      ]) {
        const exact = quadratureDelta(sigma, q, steps, direction);
        const mesh = 1e-4;
        const loss = lossVariable(sigma, q, direction);
        const { low, high } = lossRange(loss, 1e-15);
        const repeated = [{ loss: discretise(loss, low, high, mesh), steps }];
        const range = sumRange(repeated, mesh, 1e-12);
        const sum = compose(repeated, mesh, range, 2 ** 19);
        let outside = 0;
        sum.probabilities.forEach((p, i) => {
          const t = sum.low + i * mesh;
          if (t < range.low || t > range.high) outside += p;
        });
        expect(Math.abs(outside)).toBeLessThan(2e-12);
        expect(range.high - range.low).toBeLessThan(1.3 * steps * (high - low));
        for (const epsilon of [0, 0.1, 0.5, 1, 2]) {
          expect(Math.abs(deltaAt(sum, epsilon) - exact(epsilon))).toBeLessThan(1e-8);
        }
      }
    },
  );

  it('without sampling: the exact Gaussian, for any number of steps and mixed phases', () => {
    for (const rows of [
      [[100, 1, 9999]],
      [[1, 1, 1]],
      [[0.1, 1, 20]],
      [
        [10, 1, 50],
        [5, 1, 50],
      ],
    ] as Row[][]) {
      const phases = toPhases(rows);
      const mu = Math.sqrt(rows.reduce((sum, [sigma, , steps]) => sum + steps / sigma ** 2, 0));
      const exact = gaussianEpsilon(mu, 1e-6);
      const result = computeEpsilon({ accountant: 'prv', phases, delta: 1e-6 });
      expect(result.lower).toBeLessThanOrEqual(exact);
      expect(result.upper).toBeGreaterThanOrEqual(exact);
      expect(Math.abs(result.estimate! - exact)).toBeLessThan(1e-3 * (result.upper! - result.lower!));
      expect(computeEpsilon({ accountant: 'rdp', phases, delta: 1e-6 }).epsilon).toBeGreaterThanOrEqual(
        exact,
      );
      expect(
        relative(computeEpsilon({ accountant: 'gdp', phases, delta: 1e-6 }).epsilon, exact),
      ).toBeLessThan(1e-12);
    }
  });

  it('dp_accounting: noise of its tight accountant', () => {
    for (const [noiseMultiplier, sampleRate, steps, epsilon, delta] of golden.dp_accounting_pld.rows) {
      const result = computeEpsilon({
        accountant: 'prv',
        ...phase(noiseMultiplier, sampleRate, steps),
        delta,
        epsilonError: 1e-4,
      });
      expect(result.lower).toBeLessThan(epsilon);
      expect(result.upper).toBeGreaterThan(epsilon);
      expect(relative(result.estimate!, epsilon)).toBeLessThan(1e-5);
    }
  });

  it('phases: order and splitting do not matter, and equal phases are one', () => {
    const a = phase(1.2, 0.02, 300);
    const b = phase(0.9, 0.005, 500);
    const at = (phases: ReturnType<typeof phase>[]) =>
      computeEpsilon({ accountant: 'prv', phases, delta: 1e-5 });
    const whole = at([a, b]);
    const split = at([b, { ...a, steps: 100 }, { ...a, steps: 200 }, phase(3, 0, 10), phase(3, 0.1, 0)]);
    expect(relative(split.estimate!, whole.estimate!)).toBeLessThan(1e-9);
    expect(whole.lower!).toBeGreaterThan(at([a]).upper!);
    expect(
      at([
        { ...a, steps: 100 },
        { ...a, steps: 200 },
      ]),
    ).toEqual(at([a]));
  });

  it('spends nothing without steps or samples', () => {
    const nothing = { epsilon: 0, lower: 0, estimate: 0, upper: 0 };
    expect(computeEpsilon({ accountant: 'prv', ...phase(1, 0.1, 0), delta: 1e-5 })).toEqual(nothing);
    expect(computeEpsilon({ accountant: 'prv', ...phase(1, 0, 9), delta: 1e-5 })).toEqual(nothing);
    expect(computeEpsilon({ accountant: 'prv', phases: [], delta: 1e-5 })).toEqual(nothing);
  });

  it('a spent-out run: coarser bounds instead of a giant transform, still around the truth', () => {
    const exact = gaussianEpsilon(Math.sqrt(300) / 0.1, 1e-5);
    const result = computeEpsilon({ accountant: 'prv', ...phase(0.1, 1, 300), delta: 1e-5 });
    expect(exact).toBeGreaterThan(15_000);
    expect(result.lower).toBeLessThanOrEqual(exact);
    expect(result.upper).toBeGreaterThanOrEqual(exact);
    expect(result.upper! - result.lower!).toBeLessThan(1);
    const error = thrown(() =>
      computeEpsilon({ accountant: 'prv', ...phase(0.1, 1, 300), delta: 1e-5, epsilonError: 1e-3 }),
    );
    expect(error.code).toBe('ERR_OPTION');
    expect(error.message).toMatch(/^epsilonError: must be at least [\d.]+ here, got 0.001$/);
  });

  it('refuses a delta that float64 cannot resolve', () => {
    const error = thrown(() => computeEpsilon({ accountant: 'prv', ...phase(1, 0.01, 1000), delta: 1e-18 }));
    expect(error.code).toBe('ERR_OPTION');
    expect(error.message).toMatch(/^delta: must be greater than .* got 1e-18$/);
  });

  it('delta at epsilon: bounds contain the exact value', () => {
    const exact = quadratureDelta(0.8, 0.3, 2, 'remove')(2);
    const result = computeDelta({ accountant: 'prv', ...phase(0.8, 0.3, 2), epsilon: 2 });
    expect(result.lower).toBeLessThanOrEqual(exact);
    expect(result.upper).toBeGreaterThanOrEqual(exact);
    expect(relative(result.estimate!, exact)).toBeLessThan(1e-4);
    expect(result.delta).toBe(result.upper);
    expect(computeDelta({ accountant: 'rdp', ...phase(0.8, 0.3, 2), epsilon: 2 }).delta).toBeGreaterThan(
      exact,
    );
  });
});
