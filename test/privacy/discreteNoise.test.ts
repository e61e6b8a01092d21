import { describe, expect, it } from 'vitest';
import { Tensor } from '../../lib/index.ts';
import {
  addNoiseSync,
  discreteNoisePlan,
  gaussianNoiseSync,
  noiseGranularity,
} from '../../lib/privacy/index.ts';
import { discreteGaussianReference } from '../../lib/reference/privacy/discreteGaussian.ts';
import { everyVariant, nativeVariants } from '../helpers/backends.ts';
import { expectThrow } from '../helpers/errors.ts';

const key = Uint8Array.from({ length: 32 }, (_, i) => 7 * i + 1);
const discrete = { key, step: 3, mode: 'discrete' as const };

/** P(z) of the discrete Gaussian for |z| ≤ most. */
function weights(sigma: number, most: number): number[] {
  const w = Array.from({ length: 2 * most + 1 }, (_, i) =>
    Math.exp(-((i - most) ** 2) / (2 * sigma * sigma)),
  );
  const total = w.reduce((a, b) => a + b, 0);
  return w.map((x) => x / total);
}

/** Pearson's statistic of integers against the discrete Gaussian, with cells of at least 20 expected; and the cells. */
function chiSquare(z: ArrayLike<number>, sigma: number): { statistic: number; cells: number } {
  const most = 12 * sigma;
  const seen = new Float64Array(2 * most + 1);
  for (let i = 0; i < z.length; i++) seen[z[i] + most]++;
  const p = weights(sigma, most);
  let [statistic, cells, expected, got] = [0, 0, 0, 0];
  p.forEach((w, i) => {
    expected += w * z.length;
    got += seen[i];
    if (expected >= 20 || i === p.length - 1) {
      statistic += expected > 0 ? (got - expected) ** 2 / expected : 0;
      cells++;
      expected = 0;
      got = 0;
    }
  });
  return { statistic, cells };
}

describe.each(everyVariant())('discrete noise on $name', ({ options, use }) => {
  const isReference = options.backend === 'reference';

  it('is the same for every split into shards and every number of threads, and on every backend', () => {
    use();
    const n = isReference ? 300 : 5_001;
    const o = { ...options, ...discrete, stddev: 3, granularity: 2 ** -15 };
    const whole = gaussianNoiseSync([n], { ...o, offset: 1000, threads: 2 });
    expect(gaussianNoiseSync([n], { ...o, offset: 1000, threads: 1 }).data).toEqual(whole.data);
    for (const cut of [0, 1, 15, 16, 100, n - 7, n]) {
      const parts = [
        ...gaussianNoiseSync([cut], { ...o, offset: 1000 }).data,
        ...gaussianNoiseSync([n - cut], { ...o, offset: 1000 + cut }).data,
      ];
      expect(parts).toEqual([...whole.data]);
    }
    const reference = discreteGaussianReference(300, key, 3, 1000, 3 * 2 ** 15);
    expect([...whole.data.subarray(0, 300)]).toEqual([...reference].map((z) => Math.fround(z * 2 ** -15)));
  });

  it('rounds to the grid, halves up, and keeps what is not finite', () => {
    use();
    const values = [0, 0.24, 0.25, 0.26, -0.25, -0.26, 0.75, 1e10, -3e38, Number.NaN, Infinity, -Infinity];
    const t = new Tensor('float32', Float32Array.from(values), [values.length]);
    addNoiseSync(t, { ...options, ...discrete, stddev: 0, granularity: 0.5 });
    const expected = [0, 0, 0.5, 0.5, 0, -0.5, 1, 1e10, -3e38, Number.NaN, Infinity, -Infinity];
    expect([...t.data]).toEqual([...Float32Array.from(expected)]);
  });

  it('adds the integers that it draws, and draws on the grid', () => {
    use();
    const o = { ...options, ...discrete, stddev: 2, granularity: 2 ** -4 };
    const z = gaussianNoiseSync([200], o).data;
    const x = Float32Array.from({ length: 200 }, (_, i) => (i - 100) / 7);
    const sum = addNoiseSync(new Tensor('float32', x.slice(), [200]), o).data;
    sum.forEach((s, i) => {
      expect(s).toBe(Math.floor(x[i] * 16 + 0.5) / 16 + z[i]);
      expect(Number.isInteger(z[i] * 16)).toBe(true);
    });
  });
});

describe('the reference', () => {
  it('is a discrete Gaussian (chi-square) at small scales', () => {
    for (const sigma of [1, 2, 5]) {
      const { statistic, cells } = chiSquare(discreteGaussianReference(20_000, key, 1, 0, sigma), sigma);
      expect(Math.abs(statistic - (cells - 1))).toBeLessThan(4 * Math.sqrt(2 * (cells - 1)));
    }
  });
});

describe.each(nativeVariants().slice(0, 1))('distribution on $name', ({ options, use }) => {
  const draw = (sigma: number, count: number, o: object = {}) =>
    gaussianNoiseSync([count], { ...options, ...discrete, stddev: sigma, granularity: 1, ...o }).data;

  it('chi-square: passes at its own scale, and would see a scale 2 % off', () => {
    use();
    for (const sigma of [1, 2, 3, 10, 100, 1000]) {
      const z = draw(sigma, 1_000_000, { step: sigma });
      const { statistic, cells } = chiSquare(z, sigma);
      expect(cells).toBeGreaterThan(8);
      expect(Math.abs(statistic - (cells - 1))).toBeLessThan(4 * Math.sqrt(2 * (cells - 1)));
    }
    const off = chiSquare(draw(51, 1_000_000), 50);
    expect(off.statistic).toBeGreaterThan(2 * off.cells);
  });

  it('moments, at the finest grid too', () => {
    use();
    const n = 1_000_000;
    for (const sigma of [7, 2 ** 20, 2 ** 20 + 1, 2 ** 23]) {
      const z = draw(sigma, n);
      let [m1, m2, m3, m4] = [0, 0, 0, 0];
      for (let i = 0; i < n; i++) {
        const x = z[i] / sigma;
        m1 += x;
        m2 += x * x;
        m3 += x ** 3;
        m4 += x ** 4;
      }
      expect(Math.abs(m1 / n)).toBeLessThan(4 / Math.sqrt(n));
      expect(Math.abs(m2 / n - 1)).toBeLessThan(4 * Math.sqrt(2 / n));
      expect(Math.abs(m3 / n)).toBeLessThan(4 * Math.sqrt(15 / n));
      expect(Math.abs(m4 / n - 3)).toBeLessThan(4 * Math.sqrt(96 / n));
    }
  });

  it('no correlation across keys, steps, shards, neighbours, or with the continuous noise of the same key', () => {
    use();
    const n = 1_000_000;
    const sigma = 2 ** 20;
    const z = draw(sigma, n);
    const other = key.slice();
    other[31] ^= 1;
    const others = [
      draw(sigma, n, { key: other }),
      draw(sigma, n, { step: 4 }),
      draw(sigma, n, { step: 3 + 2 ** 32 }),
      draw(sigma, n, { offset: n }),
      draw(sigma, n, { offset: 2 ** 32 }),
      ...[1, 2, 8, 15, 16, 17].map((offset) => draw(sigma, n, { offset })),
      gaussianNoiseSync([n], { ...options, key, step: 3, stddev: sigma }).data,
    ];
    for (const o of others) {
      let sum = 0;
      for (let i = 0; i < n; i++) sum += (z[i] / sigma) * (o[i] / sigma);
      expect(Math.abs(sum / n)).toBeLessThan(4 / Math.sqrt(n));
    }
  });
});

describe('discreteNoisePlan', () => {
  it('pays for rounding: R + g√n, and never less noise than asked for', () => {
    const plan = discreteNoisePlan({
      maxNorm: 1,
      noiseMultiplier: 1.1,
      elements: 1e8,
      granularity: 2 ** -20,
    });
    expect(plan.sensitivity).toBe(1 + 1e4 * 2 ** -20);
    expect(plan.stddev / plan.sensitivity).toBeGreaterThanOrEqual(1.1);
    expect(plan.stddev / plan.sensitivity).toBeLessThan(1.1 + 2 ** -19);
    const { granularity } = discreteNoisePlan({ maxNorm: 0.3, noiseMultiplier: 0.7, elements: 10 });
    expect(granularity).toBe(noiseGranularity(0.3 * 0.7));
    const sure = discreteNoisePlan({
      maxNorm: 1,
      noiseMultiplier: 1,
      elements: 4,
      granularity: 2 ** -10,
      sumError: 0.25,
    });
    expect(sure.sensitivity).toBe(1 + 2 ** -9 + 0.5);
  });

  it('the bound holds: rounded neighbours of 1,000 elements, R apart', () => {
    const [n, g, R] = [1000, 2 ** -6, 0.5];
    let largest = 0;
    for (let trial = 0; trial < 50; trial++) {
      const sample = gaussianNoiseSync([n], { key, step: trial, stddev: 1 }).data;
      const norm = Math.sqrt(sample.reduce((s, x) => s + x * x, 0));
      const base = gaussianNoiseSync([n], { key, step: 1000 + trial, stddev: 1 }).data;
      let squared = 0;
      for (let i = 0; i < n; i++) {
        const [a, b] = [base[i], base[i] + (R * sample[i]) / norm].map((x) => g * Math.floor(x / g + 0.5));
        squared += (a - b) ** 2;
      }
      largest = Math.max(largest, Math.sqrt(squared));
    }
    expect(largest).toBeGreaterThan(R); // rounding does cost something
    expect(largest).toBeLessThanOrEqual(R + g * Math.sqrt(n));
  });

  it('noiseGranularity is the power of two in (stddev/2²¹, stddev/2²⁰]', () => {
    for (const stddev of [1, 1.999, 2, 3e-20, 7e15]) {
      const g = noiseGranularity(stddev);
      expect(Number.isInteger(Math.log2(g))).toBe(true);
      expect(g * 2 ** 20).toBeLessThanOrEqual(stddev);
      expect(g * 2 ** 21).toBeGreaterThan(stddev);
    }
  });

  it('refuses', () => {
    const noise = (o: object) => () => gaussianNoiseSync([4], { ...discrete, stddev: 1, ...o });
    expectThrow(noise({ granularity: 0.3 }), 'ERR_OPTION', /granularity must be a power of two .* got 0.3/);
    expectThrow(noise({ granularity: 0 }), 'ERR_OPTION', /granularity/);
    expectThrow(noise({ granularity: Number.NaN }), 'ERR_OPTION', /granularity/);
    expectThrow(noise({ granularity: 2 ** -24 }), 'ERR_OPTION', /at least stddev\/2\^23/);
    expectThrow(noise({ stddev: 0 }), 'ERR_OPTION', /granularity is required/);
    expectThrow(noise({ offset: 2 ** 48 - 3 }), 'ERR_OPTION', /offset/);
    expectThrow(noise({ mode: 'exact' }), 'ERR_OPTION', /mode must be one of continuous, discrete/);
    expectThrow(noise({ mode: undefined, granularity: 1 }), 'ERR_OPTION', /granularity is an option of mode/);
    const plan = { maxNorm: 1, noiseMultiplier: 1, elements: 4 };
    expectThrow(() => discreteNoisePlan({ ...plan, elements: 0 }), 'ERR_OPTION', /elements/);
    expectThrow(() => discreteNoisePlan({ ...plan, maxNorm: 0 }), 'ERR_OPTION', /maxNorm/);
    expectThrow(() => discreteNoisePlan({ ...plan, granularity: 2 ** -24 }), 'ERR_OPTION', /granularity/);
    expectThrow(() => noiseGranularity(0), 'ERR_OPTION', /stddev/);
  });
});
