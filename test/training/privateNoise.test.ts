import { describe, expect, it } from 'vitest';
import {
  discreteNoisePlan,
  PrivateOptimizer,
  type PrivateOptimizerOptions,
} from '../../lib/privacy/index.ts';
import { expectThrow } from '../helpers/errors.ts';
import { f32, flatten, imageModel, KEY, optimizerFor, SAMPLER } from '../helpers/training.ts';

describe('PrivateOptimizer: noise and accounting', () => {
  it('noise differs from step to step and is drawn once per logical step', () => {
    const { model } = imageModel();
    const optimizer = optimizerFor(model, { noiseMultiplier: 1, maxNorm: 1 });
    const moves: Float32Array[] = [];
    for (let t = 0; t < 3; t++) {
      const before = flatten(model);
      optimizer.stepSync();
      moves.push(flatten(model).map((x, i) => 8 * (x - before[i])));
    }
    for (const m of moves) {
      expect(Math.hypot(...m) / Math.sqrt(m.length)).toBeGreaterThan(0.8);
      expect(Math.hypot(...m) / Math.sqrt(m.length)).toBeLessThan(1.2);
    }
    const correlation = (a: Float32Array, b: Float32Array) =>
      a.reduce((s, x, i) => s + x * b[i], 0) / a.length;
    expect(Math.abs(correlation(moves[0], moves[1]))).toBeLessThan(0.3);
    expect(Math.abs(correlation(moves[1], moves[2]))).toBeLessThan(0.3);
  });

  it('discrete noise lies on a grid, has the deviation of its plan, and is resumed as such', () => {
    const { model } = imageModel();
    const weight = f32(new Array(4096).fill(0), [1, 4096]);
    const make = (more: Partial<PrivateOptimizerOptions> = {}) =>
      optimizerFor(model, {
        layers: { l: { weight } },
        noise: 'discrete',
        noiseMultiplier: 2,
        ...more,
      });
    const optimizer = make({ sampler: { sampleRate: 0.01, expectedBatch: 1 } });
    optimizer.stepSync();
    const plan = discreteNoisePlan({ maxNorm: 0.5, noiseMultiplier: 2, elements: 4096 });
    expect(weight.data.every((x) => Number.isInteger(x / plan.granularity))).toBe(true);
    expect(plan.stddev).toBeGreaterThanOrEqual(1);
    expect(Math.hypot(...weight.data) / 64).toBeGreaterThan(0.95);
    expect(Math.hypot(...weight.data) / 64).toBeLessThan(1.05);
    const other = make({ sampler: { sampleRate: 0.01, expectedBatch: 1 }, noise: 'continuous' });
    expectThrow(
      () => other.load(optimizer.state()),
      'ERR_CHECKPOINT',
      /noise was "discrete" and is "continuous"/,
    );
  });

  it('shards of the parameters draw what the whole draws', () => {
    const [whole, parts] = [imageModel().model, imageModel().model];
    optimizerFor(whole, { noiseMultiplier: 1 }).stepSync();
    let noiseOffset = 0;
    for (const [name, parameters] of Object.entries(parts.layers)) {
      optimizerFor(parts, { noiseMultiplier: 1, layers: { [name]: parameters }, noiseOffset }).stepSync();
      for (const t of Object.values(parameters)) noiseOffset += t.size;
    }
    expect(flatten(parts)).toEqual(flatten(whole));
  });

  it('a dynamic loss scale moves by a noisy count that is accounted for', () => {
    const layer = (g: number, B: number) => ({
      l: {
        kind: 'linear' as const,
        activations: f32(new Array(B).fill(1), [B, 1]),
        gradOutputs: f32(new Array(B).fill(g), [B, 1]),
        bias: false,
      },
    });
    const make = () =>
      new PrivateOptimizer({
        layers: { l: { weight: f32([0], [1, 1]) } },
        algorithm: { type: 'sgd', learningRate: 0 },
        maxNorm: 1,
        noiseMultiplier: 1,
        sampler: SAMPLER,
        key: KEY,
        lossScale: { initial: 1024, growthInterval: 3, countNoise: 10 },
      });
    const optimizer = make();
    expect(optimizer.lossScale).toBe(1024);
    optimizer.accumulateSync(layer(Infinity, 200)); // far above 4·10
    expect(optimizer.stepSync()).toMatchObject({ nonFinite: 200, lossScale: 512 });
    const scales = [1, 2, 3].map(() => {
      optimizer.accumulateSync(layer(1, 200));
      return optimizer.stepSync().lossScale;
    });
    expect(scales).toEqual([512, 512, 1024]);
    const [phase] = optimizer.ledger.phases;
    expect(phase.noiseMultiplier).toBeCloseTo(1 / Math.sqrt(1 + 0.01), 12);
    // One overflow among many cannot be told from noise: it must not move the scale by itself.
    const other = make();
    other.accumulateSync(layer(Infinity, 1));
    expect(other.stepSync().lossScale).toBe(1024);
  });

  it('ε comes from the ledger; without noise it is infinite', () => {
    const { model } = imageModel();
    const optimizer = optimizerFor(model, {
      noiseMultiplier: 1.1,
      sampler: { sampleRate: 256 / 60000, expectedBatch: 256 },
    });
    const spent = { accountant: 'rdp', delta: 1e-5 } as const;
    expect(optimizer.epsilon(spent).epsilon).toBe(0);
    for (let i = 0; i < 5; i++) optimizer.stepSync();
    expect(optimizer.epsilon(spent)).toEqual(optimizer.ledger.epsilon(spent));
    expect(optimizer.ledger.steps).toBe(5);
    const open = optimizerFor(model);
    expect(open.epsilon(spent).epsilon).toBe(0);
    open.stepSync();
    expect(open.epsilon(spent).epsilon).toBe(Infinity);
  });
});
