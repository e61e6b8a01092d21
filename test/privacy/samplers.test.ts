import { describe, expect, it } from 'vitest';
import { HeddleError } from '../../lib/index.ts';
import { PoissonSampler, ShuffledSampler, TruncatedPoissonSampler } from '../../lib/privacy/index.ts';
import { chacha20Block, keyWords } from '../../lib/reference/privacy/chacha20.ts';

const key = Uint8Array.from({ length: 32 }, (_, i) => 3 * i + 5);

describe('PoissonSampler', () => {
  it('is u < q for the documented words of the stream, on every backend', () => {
    const sampler = new PoissonSampler({ key, size: 37, sampleRate: 0.3 });
    const step = 2 ** 32 + 4;
    const expected: number[] = [];
    for (let i = 0; i < 37; i++) {
      const block = chacha20Block(keyWords(key), Math.floor(i / 8), [2 ** 24, 4, 1]);
      const w = 2 * (i % 8);
      const u = (BigInt(block[w + 1]) << 32n) | BigInt(block[w]);
      if (Number(u) / 2 ** 64 < 0.3) expected.push(i);
    }
    expect(expected.length).toBeGreaterThan(3);
    expect(Array.from(sampler.batch(step))).toEqual(expected);
    expect(Array.from(sampler.batch(step, { backend: 'reference' }))).toEqual(expected);
    expect(sampler.guarantee).toBe('poisson');
    expect(sampler.expectedBatch).toBeCloseTo(11.1, 12);
  });

  it('includes every example at the rate, independently, in steps that do not repeat', () => {
    const [size, steps, rate] = [500, 4000, 0.02];
    const sampler = new PoissonSampler({ key, size, sampleRate: rate });
    const seen = new Float64Array(size);
    const sizes = new Float64Array(steps);
    let neighbours = 0;
    for (let s = 0; s < steps; s++) {
      const batch = sampler.batch(s);
      sizes[s] = batch.length;
      batch.forEach((i, k) => {
        seen[i]++;
        if (k > 0 && batch[k - 1] === i - 1) neighbours++;
      });
    }
    // χ² of the inclusions: `size` terms of mean 1 and variance 2.
    const chi = seen.reduce((sum, c) => sum + (c - steps * rate) ** 2 / (steps * rate * (1 - rate)), 0);
    expect(Math.abs(chi - size)).toBeLessThan(4 * Math.sqrt(2 * size));
    // Batch sizes are binomial: fixed-size batches would have variance 0.
    const mean = sizes.reduce((a, b) => a + b) / steps;
    const variance = sizes.reduce((sum, x) => sum + (x - mean) ** 2, 0) / steps;
    const binomial = size * rate * (1 - rate);
    expect(Math.abs(mean - size * rate)).toBeLessThan(4 * Math.sqrt(binomial / steps));
    expect(Math.abs(variance / binomial - 1)).toBeLessThan(4 * Math.sqrt(2 / steps));
    const pairs = (size - 1) * steps * rate * rate;
    expect(Math.abs(neighbours - pairs)).toBeLessThan(4 * Math.sqrt(pairs));
  });

  it('empty batches and whole ones', () => {
    const rare = new PoissonSampler({ key, size: 10, sampleRate: 1e-9 });
    expect(rare.batch(3)).toEqual(new Int32Array(0));
    const all = new PoissonSampler({ key, size: 10, sampleRate: 1 });
    expect(Array.from(all.batch(3))).toEqual([0, 1, 2, 3, 4, 5, 6, 7, 8, 9]);
    expect(new PoissonSampler({ key, size: 0, sampleRate: 0.5 }).batch(0)).toHaveLength(0);
  });
});

describe('TruncatedPoissonSampler', () => {
  it('cuts only what is too large, to a random part', () => {
    const common = { key, size: 200, sampleRate: 0.1 };
    const whole = new PoissonSampler(common);
    const cut = new TruncatedPoissonSampler({ ...common, maxBatch: 20 });
    expect(cut.guarantee).toBe('poisson-truncated');
    let cuts = 0;
    let first = 0;
    for (let s = 0; s < 400; s++) {
      const a = whole.batch(s);
      const b = cut.batch(s);
      expect(b.length).toBe(Math.min(20, a.length));
      expect(b.every((i) => a.includes(i))).toBe(true);
      if (a.length > 20) {
        cuts++;
        if (b[0] === a[0]) first++;
      } else expect(b).toEqual(a);
    }
    expect(cuts).toBeGreaterThan(100);
    expect(first).toBeLessThan(cuts); // not simply the first ones
    expect(first).toBeGreaterThan(cuts / 2);
  });

  it('bounds the probability of a cut', () => {
    const bound = (maxBatch: number) =>
      new TruncatedPoissonSampler({ key, size: 1000, sampleRate: 0.1, maxBatch }).overflowProbability;
    expect(bound(1000)).toBe(0);
    expect(bound(50)).toBe(1);
    // P(Binomial(1000, 0.1) > 130) = 0.00105; Chernoff is above it, and useful.
    expect(bound(130)).toBeGreaterThan(0.00105);
    expect(bound(130)).toBeLessThan(0.02);
    expect(bound(200)).toBeLessThan(1e-18);
  });
});

describe('ShuffledSampler', () => {
  it('every example once per epoch, another order in the next', () => {
    const sampler = new ShuffledSampler({ key, size: 50, batch: 8, dropLast: false });
    expect(sampler.guarantee).toBe('shuffled');
    expect(sampler.batchesPerEpoch).toBe(7);
    const epoch = (e: number) =>
      Array.from({ length: 7 }, (_, b) => Array.from(sampler.batch(7 * e + b))).flat();
    const sorted = (list: number[]) => list.slice().sort((a, b) => a - b);
    const natural = Array.from({ length: 50 }, (_, i) => i);
    expect(sorted(epoch(0))).toEqual(natural);
    expect(sorted(epoch(1))).toEqual(natural);
    expect(epoch(0)).not.toEqual(natural);
    expect(epoch(1)).not.toEqual(epoch(0));
    expect(epoch(0)).toEqual(epoch(0));
    const dropped = new ShuffledSampler({ key, size: 50, batch: 8 });
    expect(dropped.batchesPerEpoch).toBe(6);
    expect(dropped.batch(6)).toHaveLength(8);
    expect(new ShuffledSampler({ key, size: 5, batch: 8 }).batch(0)).toHaveLength(0);
  });

  it('every place is uniform', () => {
    const places = new Float64Array(10);
    for (let e = 0; e < 5000; e++) {
      places[new ShuffledSampler({ key, size: 10, batch: 10 }).batch(e).indexOf(3)]++;
    }
    const chi = places.reduce((sum, c) => sum + (c - 500) ** 2 / 500, 0);
    expect(chi).toBeLessThan(27.9); // χ² of 9, p = .001
  });
});

it('samplers refuse bad options', () => {
  const code = (make: () => unknown) => {
    try {
      make();
    } catch (e) {
      return `${e instanceof HeddleError} ${(e as HeddleError).code} ${(e as Error).message}`;
    }
    return 'none';
  };
  const good = { key, size: 10, sampleRate: 0.5 };
  expect(code(() => new PoissonSampler({ ...good, sampleRate: 0 }))).toMatch(/true ERR_OPTION sampleRate/);
  expect(code(() => new PoissonSampler({ ...good, sampleRate: 1.5 }))).toMatch(/ERR_OPTION sampleRate/);
  expect(code(() => new PoissonSampler({ ...good, size: -1 }))).toMatch(/ERR_OPTION size/);
  expect(code(() => new PoissonSampler({ ...good, key: new Uint8Array(16) }))).toMatch(/ERR_ARGUMENT key/);
  expect(code(() => new PoissonSampler({ ...good, maxBatch: 3 } as never))).toMatch(/ERR_OPTION.*maxBatch/);
  expect(code(() => new PoissonSampler(good).batch(-1))).toMatch(/ERR_OPTION step/);
  expect(code(() => new TruncatedPoissonSampler({ ...good, maxBatch: 0 }))).toMatch(/ERR_OPTION maxBatch/);
  expect(code(() => new ShuffledSampler({ key, size: 10, batch: 0 }))).toMatch(/ERR_OPTION batch/);
});
