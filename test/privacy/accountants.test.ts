import fc from 'fast-check';
import { describe, expect, it } from 'vitest';
import { gaussianDelta, gaussianEpsilon, gdpMu } from '../../lib/privacy/accountants/gdp.ts';
import { rdpOfStep } from '../../lib/privacy/accountants/rdp.ts';
import { erfc, erfcx, logErfc, normalCdf } from '../../lib/privacy/accountants/special.ts';
import {
  type AccountantName,
  calibrateNoiseMultiplier,
  computeDelta,
  computeEpsilon,
  DEFAULT_ORDERS,
} from '../../lib/privacy/index.ts';
import { golden, phase, relative, toPhases } from '../helpers/accountants.ts';
import { thrown } from '../helpers/errors.ts';

describe('special functions', () => {
  it('erfc, erfcx and ln erfc to 1e-15 (values of mpmath)', () => {
    for (const [x, value] of [
      [0, 1],
      [0.5, 0.4795001221869535],
      [1, 0.15729920705028513],
      [2, 0.004677734981047266],
      [5, 1.5374597944280349e-12],
      [10, 2.088487583762545e-45],
      [-1, 1.8427007929497148],
    ]) {
      expect(relative(erfc(x), value)).toBeLessThan(1e-15);
    }
    expect(relative(erfcx(10), 0.05614099274382259)).toBeLessThan(1e-15);
    expect(relative(logErfc(100), -10005.177585122665)).toBeLessThan(1e-13);
    expect(erfc(Infinity)).toBe(0);
    expect(erfc(-Infinity)).toBe(2);
    expect(normalCdf(0)).toBe(0.5);
  });
});

describe('RDP accountant', () => {
  it('uses the orders of Opacus', () => {
    expect(DEFAULT_ORDERS.length).toBe(151);
    expect([DEFAULT_ORDERS[0], DEFAULT_ORDERS[98], DEFAULT_ORDERS[99], DEFAULT_ORDERS[150]]).toEqual([
      1.1, 10.9, 12, 63,
    ]);
  });

  it.each(golden.rdp_exact.rows as number[][])(
    'q = %d, sigma = %d, order = %d: 60-digit value within 1e-13',
    (q, sigma, order, rdp) => {
      expect(relative(rdpOfStep(sigma, q, order), rdp)).toBeLessThan(1e-13);
    },
  );

  it('dp_accounting: RDP of 50 subsampled steps', () => {
    const { noiseMultiplier, sampleRate, steps, orders, rdp } = golden.rdp_dp_accounting;
    orders.forEach((order: number, i: number) => {
      const own = steps * rdpOfStep(noiseMultiplier, sampleRate, order);
      // dp_accounting interpolates fractional orders between integers: an upper bound, 3 % above the value.
      if (Number.isInteger(order)) expect(relative(own, rdp[i])).toBeLessThan(1e-8);
      else expect(own).toBeLessThan(rdp[i]);
    });
  });

  it('Opacus: epsilon and order within 1e-6 (its tests, its printed values)', () => {
    const [listed] = golden.opacus_tests.epsilon;
    const own = computeEpsilon({ accountant: 'rdp', phases: toPhases(listed.phases), delta: listed.delta });
    expect(relative(own.epsilon, listed.epsilon)).toBeLessThan(1e-6);
    for (const { phases, delta, rdp, order } of golden.opacus_run.rows) {
      const result = computeEpsilon({ accountant: 'rdp', phases: toPhases(phases), delta });
      expect(relative(result.epsilon, rdp)).toBeLessThan(1e-9);
      expect(result.order).toBe(order);
    }
  });

  it('the values of the project page', () => {
    const at = (noiseMultiplier: number, steps: number) =>
      computeEpsilon({ accountant: 'rdp', noiseMultiplier, sampleRate: 256 / 60000, steps, delta: 1e-5 });
    expect(at(1.1, 14063).epsilon).toBeCloseTo(2.59666, 5);
    expect(at(1.3, 3516).epsilon).toBeCloseTo(0.95456, 5);
  });

  it('dp_accounting: sigma 4.530877117 is exactly (1, 1e-6) over fine orders', () => {
    const { noiseMultiplier, epsilon, delta } = golden.dp_accounting_gaussian;
    const orders = Array.from({ length: 98_900 }, (_, i) => (1011 + i) / 1000).filter((a) => a > 1.01);
    const options = { accountant: 'rdp', ...phase(noiseMultiplier, 1, 1), orders } as const;
    expect(computeEpsilon({ ...options, delta }).epsilon).toBeCloseTo(epsilon, 7);
    expect(computeDelta({ ...options, epsilon }).delta).toBeCloseTo(delta, 12);
  });

  it('integer and neighbouring fractional orders agree', () => {
    for (const [sigma, q] of [
      [0.1, 0.3],
      [0.5, 1e-6],
      [1, 0.01],
      [30, 0.5],
    ]) {
      for (const order of [2, 3, 8, 32, 200]) {
        const middle = rdpOfStep(sigma, q, order);
        const around = 0.5 * (rdpOfStep(sigma, q, order - 1e-4) + rdpOfStep(sigma, q, order + 1e-4));
        expect(relative(around, middle)).toBeLessThan(1e-6);
      }
    }
  });

  it('never exceeds the mechanism without sampling and grows with the order (property)', () => {
    fc.assert(
      fc.property(
        fc.double({ min: Math.log(0.02), max: Math.log(1e4), noNaN: true }),
        fc.double({ min: Math.log(1e-9), max: 0, noNaN: true }),
        fc.double({ min: 1.02, max: 1024, noNaN: true }),
        fc.boolean(),
        (logSigma, logQ, alpha, whole) => {
          const sigma = Math.exp(logSigma);
          const q = Math.exp(logQ);
          const order = whole ? Math.ceil(alpha) : alpha;
          const rdp = rdpOfStep(sigma, q, order);
          expect(rdp).toBeGreaterThanOrEqual(0);
          expect(rdp).toBeLessThanOrEqual((order / (2 * sigma * sigma)) * (1 + 1e-12));
          expect(rdpOfStep(sigma, q, order + 0.5)).toBeGreaterThanOrEqual(rdp * (1 - 1e-12));
        },
      ),
      { numRuns: 60, seed: 6 },
    );
  });

  it('extremes: tiny rates, no steps, huge and tiny sigma', () => {
    const at = (sigma: number, q: number, steps: number) =>
      computeEpsilon({ accountant: 'rdp', ...phase(sigma, q, steps), delta: 1e-5 }).epsilon;
    expect(at(1, 0, 1000)).toBe(0);
    expect(at(1, 0.5, 0)).toBe(0);
    expect(at(1e160, 0.5, 1000)).toBe(0);
    expect(at(1e160, 1, 1000)).toBe(0);
    expect(at(1, 1e-300, 1000)).toBe(0);
    for (const sigma of [1e-200, 1e-5, 1e-3]) {
      expect(at(sigma, 0.01, 1)).toBeGreaterThan(1e4);
    }
    expect(at(0.0099, 0.01, 1)).toBeGreaterThan(at(0.0101, 0.01, 1));
    // A million steps at rate 1e-6: (q²α(e − 1)/2)·steps survives although it is 1e-12 of 1 in each step.
    const rdp = 1e6 * rdpOfStep(1, 1e-6, 2);
    expect(relative(rdp, 1e6 * Math.log1p(1e-12 * Math.expm1(1)))).toBeLessThan(1e-12);
  });
});

describe('GDP diagnostic', () => {
  it('Opacus: its central limit epsilon', () => {
    for (const { phases, delta, gdp, prv } of golden.opacus_run.rows) {
      if (gdp === undefined) continue;
      const { epsilon } = computeEpsilon({ accountant: 'gdp', phases: toPhases(phases), delta });
      expect(relative(epsilon, gdp)).toBeLessThan(1e-9);
      expect(epsilon).toBeLessThan(prv[0]); // the underestimate that the documentation warns of
    }
    const listed = computeEpsilon({ accountant: 'gdp', ...phase(1.5, 0.04, 2250), delta: 1e-5 }).epsilon;
    expect(listed).toBeGreaterThan(6.59);
  });

  it('delta and epsilon are inverse; small tails and overflow', () => {
    for (const mu of [0.01, 0.5, 3, 30]) {
      for (const delta of [1e-3, 1e-9, 1e-30]) {
        expect(relative(gaussianDelta(gaussianEpsilon(mu, delta), mu), delta)).toBeLessThan(1e-9);
      }
    }
    expect(gaussianEpsilon(0, 1e-5)).toBe(0);
    expect(gdpMu([phase(0.03, 0.1, 1)])).toBe(Infinity);
    expect(computeEpsilon({ accountant: 'gdp', ...phase(0.03, 0.1, 1), delta: 1e-5 }).epsilon).toBe(Infinity);
    expect(computeDelta({ accountant: 'gdp', ...phase(0.03, 0.1, 1), epsilon: 1 }).delta).toBe(1);
  });
});

describe('calibrateNoiseMultiplier', () => {
  it('is within the budget, close to it, and no larger than the values Opacus publishes', () => {
    for (const { accountant, epsilon, delta, sampleRate, steps, sigma } of golden.opacus_tests.sigma) {
      const own = calibrateNoiseMultiplier({ accountant, epsilon, delta, sampleRate, steps });
      const spent = computeEpsilon({ accountant, ...phase(own, sampleRate, steps), delta }).epsilon;
      expect(spent).toBeLessThanOrEqual(epsilon);
      expect(spent).toBeGreaterThanOrEqual(epsilon * (1 - 1e-3));
      expect(relative(own, sigma)).toBeLessThan(1e-3);
    }
  });

  it('never overspends (property over targets, rates and steps)', () => {
    fc.assert(
      fc.property(
        fc.double({ min: 0.25, max: 50, noNaN: true }),
        fc.double({ min: Math.log(1e-5), max: 0, noNaN: true }),
        fc.integer({ min: 1, max: 100_000 }),
        fc.constantFrom<AccountantName>('rdp', 'gdp'),
        (epsilon, logRate, steps, accountant) => {
          const options = { delta: 1e-6, sampleRate: Math.exp(logRate), steps, accountant };
          const noiseMultiplier = calibrateNoiseMultiplier({ ...options, epsilon });
          expect(computeEpsilon({ ...options, noiseMultiplier }).epsilon).toBeLessThanOrEqual(epsilon);
          const less = computeEpsilon({ ...options, noiseMultiplier: noiseMultiplier * 0.9 }).epsilon;
          expect(less).toBeGreaterThan(epsilon);
        },
      ),
      { numRuns: 25, seed: 6 },
    );
  });

  it('honours the tolerance and the accuracy asked for', () => {
    const options = { accountant: 'prv', delta: 1e-5, sampleRate: 0.02, steps: 100 } as const;
    const noiseMultiplier = calibrateNoiseMultiplier({
      ...options,
      epsilon: 1.5,
      tolerance: 1e-5,
      epsilonError: 0.05,
    });
    const { epsilon } = computeEpsilon({ ...options, noiseMultiplier, epsilonError: 0.05 });
    expect(epsilon).toBeLessThanOrEqual(1.5);
    expect(epsilon).toBeGreaterThanOrEqual(1.5 - 1e-5);
  });

  it('says what cannot be reached', () => {
    const options = { delta: 1e-5, sampleRate: 0.01, steps: 10, epsilon: 1, accountant: 'rdp' } as const;
    const message = (change: object) =>
      thrown(() => calibrateNoiseMultiplier({ ...options, ...change })).message;
    expect(message({ accountant: 'prv', epsilon: 0.005 })).toMatch(/^epsilon: must be reachable/);
    expect(message({ epsilon: 0 })).toBe('epsilon: must be a finite number greater than 0, got 0');
    expect(message({ steps: 0 })).toBe('steps: must be greater than 0 to calibrate noise, got 0');
    expect(message({ sampleRate: 0 })).toBe('sampleRate: must be greater than 0 to calibrate noise, got 0');
    expect(message({ tolerance: -1 })).toBe('tolerance: must be a finite number greater than 0, got -1');
  });
});

describe('options', () => {
  const valid = { accountant: 'rdp', delta: 1e-5, ...phase(1, 0.1, 10) };
  it.each([
    [{ delta: 0 }, 'delta: must be a number greater than 0 and less than 1, got 0'],
    [{ delta: 1 }, 'delta: must be a number greater than 0 and less than 1, got 1'],
    [{ delta: Number.NaN }, 'delta: must be a number greater than 0 and less than 1, got NaN'],
    [{ delta: '1e-5' }, "delta: must be a number greater than 0 and less than 1, got '1e-5'"],
    [{ noiseMultiplier: 0 }, 'noiseMultiplier: must be a finite number greater than 0, got 0'],
    [{ noiseMultiplier: Infinity }, 'noiseMultiplier: must be a finite number greater than 0, got Infinity'],
    [{ sampleRate: 1.5 }, 'sampleRate: must be a number from 0 to 1, got 1.5'],
    [{ sampleRate: -0.1 }, 'sampleRate: must be a number from 0 to 1, got -0.1'],
    [{ sampleRate: undefined }, 'sampleRate: must be a number from 0 to 1, got undefined'],
    [{ steps: 1.5 }, 'steps: must be a non-negative integer, got 1.5'],
    [{ steps: -1 }, 'steps: must be a non-negative integer, got -1'],
    [{ accountant: 'pld' }, "accountant: must be one of 'rdp', 'prv', 'gdp', got 'pld'"],
    [{ orders: [] }, 'orders: must be a non-empty array of numbers greater than 1.01, got an array'],
    [{ orders: [2, 1] }, 'orders[1]: must be a finite number greater than 1.01, got 1'],
    [{ phases: [] }, 'noiseMultiplier: must be left out where phases is given, got 1'],
    [
      { noiseMultiplier: undefined, sampleRate: undefined, steps: undefined, phases: [phase(1, 2, 3)] },
      'phases[0].sampleRate: must be a number from 0 to 1, got 2',
    ],
    [
      { noiseMultiplier: undefined, sampleRate: undefined, steps: undefined, phases: 3 },
      'phases: must be an array of phases, got 3',
    ],
    [{ accountant: 'prv', epsilonError: 0 }, 'epsilonError: must be a finite number greater than 0, got 0'],
    [
      { accountant: 'prv', deltaError: 1 },
      'deltaError: must be a number greater than 0 and less than delta/2 = 0.000005, got 1',
    ],
    [
      { accountant: 'prv', noiseMultiplier: 1e-3 },
      "noiseMultiplier: must be at least 0.01 for accountant 'prv', got 0.001",
    ],
  ])('%o: ERR_OPTION', (change, message) => {
    const error = thrown(() => computeEpsilon({ ...valid, ...change } as never));
    expect(error.code).toBe('ERR_OPTION');
    expect(error.message).toBe(message);
  });

  it('missing options object: ERR_ARGUMENT', () => {
    expect(thrown(() => computeEpsilon(undefined as never)).code).toBe('ERR_ARGUMENT');
    expect(thrown(() => computeEpsilon({ ...valid, phases: [null] } as never)).code).toBe('ERR_OPTION');
    expect(thrown(() => computeDelta({ ...valid, epsilon: -1 } as never)).message).toBe(
      'epsilon: must be a finite number of at least 0, got -1',
    );
  });
});
