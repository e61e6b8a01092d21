import { describe, expect, it } from 'vitest';
import { AdaptiveClipping, calibrateNoiseMultiplier, computeEpsilon } from '../../lib/privacy/index.ts';
import { expectThrow } from '../helpers/errors.ts';

const key = Uint8Array.from({ length: 32 }, (_, i) => 5 * i + 2);
const base = { key, maxNorm: 0.1, expectedBatch: 100 };
/** Squares of norms spread evenly over [0, 2). */
const spread = (count: number) => Float32Array.from({ length: count }, (_, i) => ((2 * i) / count) ** 2);

describe('AdaptiveClipping', () => {
  it('finds the quantile in spite of the noise, from below and from above', () => {
    for (const [quantile, maxNorm] of [
      [0.5, 0.1],
      [0.5, 20],
      [0.8, 0.1],
    ]) {
      const clipping = new AdaptiveClipping({ ...base, quantile, maxNorm });
      let sum = 0;
      for (let step = 0; step < 400; step++) {
        clipping.update(spread(100), step);
        if (step >= 200) sum += clipping.maxNorm / 200;
      }
      expect(Math.abs(sum - 2 * quantile)).toBeLessThan(0.03);
    }
  });

  it('is the formula: R·e^(−η(b̃ − γ)), b̃ = ½ + (Σ(b_i − ½) + noise)/B̄', () => {
    const quiet = { ...base, maxNorm: 1, countStddev: 1e-9, rate: 0.3, expectedBatch: 10 };
    const move = (norms: number[]) =>
      new AdaptiveClipping(quiet).update(
        Float32Array.from(norms, (n) => n * n),
        0,
      );
    expect(move([0.5, 1, 1.5, 2])).toBeCloseTo(Math.exp(0), 8);
    expect(move([0.5, 0.5, 0.5, 2])).toBeCloseTo(Math.exp(-0.3 * 0.1), 8);
    expect(move([])).toBeCloseTo(1, 8);
    // What is not finite was left out of the sum: it counts as clipped, and moves b̃ by no more than any sample.
    expect(move([Number.NaN, Infinity, 0.5])).toBeCloseTo(Math.exp(0.3 * 0.05), 8);
    const layers = [Float32Array.of(0.5, 9), Float32Array.of(0.4, 0)];
    expect(new AdaptiveClipping(quiet).update(layers, 0)).toBeCloseTo(1, 8);
  });

  it('noises the count with σ_b', () => {
    const [n, countStddev] = [4000, 3];
    let [m1, m2] = [0, 0];
    for (let step = 0; step < n; step++) {
      const clipping = new AdaptiveClipping({ ...base, maxNorm: 1, countStddev, rate: 1 });
      const moved = clipping.update(new Float32Array(0), step);
      const noise = -100 * Math.log(moved); // b̃ = ½ + noise/100
      m1 += noise / countStddev;
      m2 += (noise / countStddev) ** 2;
    }
    expect(Math.abs(m1 / n)).toBeLessThan(4 / Math.sqrt(n));
    expect(Math.abs(m2 / n - 1)).toBeLessThan(4 * Math.sqrt(2 / n));
  });

  it('accounting (theorem 1): sum and count together are one query of multiplier z', () => {
    // The paper, section 3.1: with z = 1 and σ_b = m/20, m = 100 samples the sum needs hardly more noise.
    const clipping = new AdaptiveClipping(base);
    expect(clipping.countStddev).toBe(5);
    const sum = clipping.gradientNoiseMultiplier(1);
    expect(sum).toBeCloseTo((1 - 1 / 100) ** -0.5, 14);
    expect(clipping.effectiveNoiseMultiplier(sum)).toBeCloseTo(1, 14);
    // Without sampling Gaussian RDP adds: the ε of the pair is that of both phases one after the other.
    const at = (noiseMultiplier: number) => ({ noiseMultiplier, sampleRate: 1, steps: 10 });
    const together = computeEpsilon({ accountant: 'rdp', delta: 1e-5, phases: [at(4)] });
    const apart = computeEpsilon({
      accountant: 'rdp',
      delta: 1e-5,
      phases: [at(clipping.gradientNoiseMultiplier(4)), at(2 * clipping.countStddev)],
    });
    expect(apart.epsilon).toBeCloseTo(together.epsilon, 10);
    const z = calibrateNoiseMultiplier({
      accountant: 'rdp',
      epsilon: 3,
      delta: 1e-5,
      sampleRate: 0.01,
      steps: 1000,
    });
    expect(clipping.gradientNoiseMultiplier(z)).toBeGreaterThan(z);
    expectThrow(() => clipping.gradientNoiseMultiplier(10), 'ERR_OPTION', /below 2·countStddev = 10/);
    expect(clipping.effectiveNoiseMultiplier(0)).toBe(0);
  });

  it('goes on where it stopped, and never draws a step twice', () => {
    const a = new AdaptiveClipping(base);
    for (let step = 0; step < 5; step++) a.update(spread(90), step);
    const text = JSON.stringify(a);
    expect(text).not.toContain('key');
    const b = AdaptiveClipping.fromJSON(text, key);
    expect(b.maxNorm).toBe(a.maxNorm);
    expectThrow(() => b.update(spread(90), 4), 'ERR_OPTION', /step must be an integer from 5/);
    for (let step = 5; step < 9; step++) expect(b.update(spread(80), step)).toBe(a.update(spread(80), step));
    const other = AdaptiveClipping.fromJSON(
      text,
      key.map((x) => x ^ 1),
    );
    expect(other.update(spread(80), 5)).not.toBe(AdaptiveClipping.fromJSON(text, key).update(spread(80), 5));
  });

  it('stays finite whatever the noise says', () => {
    const wild = new AdaptiveClipping({ ...base, rate: 1e6, countStddev: 100 });
    for (let step = 0; step < 20; step++) {
      const r = wild.update(spread(100), step);
      expect(r > 0 && Number.isFinite(Math.fround(r))).toBe(true);
    }
  });

  it('refuses what it does not know', () => {
    const make = (o: object) => () => new AdaptiveClipping({ ...base, ...o });
    expectThrow(make({ maxNorm: 0 }), 'ERR_OPTION', /maxNorm/);
    expectThrow(make({ quantile: 1.1 }), 'ERR_OPTION', /quantile/);
    expectThrow(make({ rate: -1 }), 'ERR_OPTION', /rate/);
    expectThrow(make({ expectedBatch: 0 }), 'ERR_OPTION', /expectedBatch/);
    expectThrow(make({ countStddev: 0 }), 'ERR_OPTION', /countStddev/);
    expectThrow(make({ key: 'secret' }), 'ERR_ARGUMENT', /key/);
    expectThrow(make({ sigma: 1 }), 'ERR_OPTION', /sigma/);
    expectThrow(() => new AdaptiveClipping(base).update([], 0), 'ERR_ARGUMENT', /squaredNorms/);
    expectThrow(
      () => new AdaptiveClipping(base).update([spread(2), spread(3)], 0),
      'ERR_SHAPE',
      /squaredNorms\[1\]: expected \[2\]/,
    );
    const saved = new AdaptiveClipping(base).toJSON();
    const load = (o: object) => () => AdaptiveClipping.fromJSON({ ...saved, ...o }, key);
    expectThrow(load({ format: 'other' }), 'ERR_CHECKPOINT', /format/);
    expectThrow(load({ version: 2 }), 'ERR_CHECKPOINT', /version/);
    expectThrow(load({ maxNorm: 'NaN' }), 'ERR_CHECKPOINT', /maxNorm/);
    expectThrow(load({ nextStep: -1 }), 'ERR_CHECKPOINT', /nextStep/);
    expectThrow(() => AdaptiveClipping.fromJSON('{', key), 'ERR_CHECKPOINT', /adaptive clipping/);
    const { rate: _, ...incomplete } = saved;
    expectThrow(
      () => AdaptiveClipping.fromJSON(incomplete as typeof saved, key),
      'ERR_CHECKPOINT',
      /rate is missing/,
    );
  });
});
