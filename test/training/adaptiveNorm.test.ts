import { describe, expect, it } from 'vitest';
import {
  AdaptiveClipping,
  type AdaptiveClippingOptions,
  computeEpsilon,
  discreteNoisePlan,
  gaussianNoiseSync,
  PoissonSampler,
  type PrivateOptimizerOptions,
  TruncatedPoissonSampler,
} from '../../lib/privacy/index.ts';
import { discreteGaussianReference } from '../../lib/reference/privacy/discreteGaussian.ts';
import { COUNT_STREAM } from '../../lib/reference/privacy/gaussianNoise.ts';
import { everyVariant } from '../helpers/backends.ts';
import { expectThrow } from '../helpers/errors.ts';
import { expectNear } from '../helpers/golden.ts';
import {
  f32,
  flatten,
  imageModel,
  KEY,
  layersOf,
  naiveGradients,
  optimizerFor,
  SAMPLER,
  textModel,
} from '../helpers/training.ts';

const B = SAMPLER.expectedBatch;
const adaptive = (more: Partial<AdaptiveClippingOptions> = {}) =>
  new AdaptiveClipping({ key: KEY, maxNorm: 0.3, expectedBatch: B, countStddev: 2, rate: 0.5, ...more });

/** Noise on the count with σ_b = 2: the grid's step is 2⁻¹⁹. */
const countNoise = (step: number) =>
  discreteGaussianReference(1, KEY, step, 0, 2 ** 20, COUNT_STREAM)[0] * 2 ** -19;

describe.each(everyVariant())('PrivateOptimizer with an adaptive norm on $name', ({ options, use }) => {
  it.each([
    ['text, flat', textModel, 'flat'],
    ['images, by layer', imageModel, 'layer'],
  ] as const)('Andrew et al. 2021, algorithm 1, written out: %s', (_, make, grouping) => {
    use();
    const [problem, twin] = [make(), make()];
    const lengths = naiveGradients(twin.model, layersOf(twin), 6).map((g) => Math.hypot(...g));
    let R = 1.001 * lengths.sort((a, b) => a - b)[2];
    const optimizer = optimizerFor(problem.model, {
      maxNorm: adaptive({ maxNorm: R }),
      noiseMultiplier: 1,
      grouping,
      ...options,
    });
    // 1 = (z⁻² + (2σ_b)⁻²)^−½
    const z = 1 / Math.sqrt(1 - 1 / 16);
    const parameters = Object.values(twin.model.layers).map((p) => Object.values(p));
    const layerOf = parameters.flatMap((p, l) => p.flatMap((t) => new Array<number>(t.size).fill(l)));
    const groups = grouping === 'flat' ? 1 : parameters.length;
    const start = flatten(twin.model);
    let [within, beyond] = [0, 0];
    for (let step = 0; step < 4; step++) {
      for (const [from, to] of [
        [0, 2],
        [2, 6],
      ]) {
        optimizer.accumulateSync(layersOf(problem, from, to, 1, options));
      }
      expect(optimizer.maxNorm).toBeCloseTo(R, 6);
      optimizer.stepSync();

      const gradients = naiveGradients(twin.model, layersOf(twin), 6);
      const noise = gaussianNoiseSync([start.length], { key: KEY, step, stddev: z * R }).data;
      const sum = Array.from(noise);
      let count = 0;
      for (const g of gradients) {
        const squares = new Float64Array(groups);
        g.forEach((v, i) => {
          squares[groups === 1 ? 0 : layerOf[i]] += v * v;
        });
        const factors = squares.map((s) => Math.min(1, R / Math.sqrt(groups) / (Math.sqrt(s) + 1e-6)));
        g.forEach((v, i) => {
          sum[i] += factors[groups === 1 ? 0 : layerOf[i]] * v;
        });
        const norm = Math.hypot(...g);
        count += norm <= R ? 0.5 : -0.5;
        if (norm <= R) within++;
        else beyond++;
      }
      let at = 0;
      for (const t of parameters.flat()) for (let i = 0; i < t.size; i++) t.data[i] -= sum[at++] / B;
      R *= Math.exp(-0.5 * (0.5 + (count + countNoise(step)) / B - 0.5));
    }
    expect(optimizer.maxNorm).toBeCloseTo(R, 6);
    expect(within).toBeGreaterThan(0);
    expect(beyond).toBeGreaterThan(0);
    expectNear(
      flatten(problem.model).map((x, i) => x - start[i]),
      flatten(twin.model).map((x, i) => x - start[i]),
      1e-5,
    );
  });
});

describe('PrivateOptimizer with an adaptive norm', () => {
  it('sum and count together are what the ledger is told, with every other release', () => {
    const { model } = imageModel();
    const make = (more: Partial<PrivateOptimizerOptions> = {}) =>
      optimizerFor(model, { maxNorm: adaptive(), noiseMultiplier: 1, ...more });
    const optimizer = make();
    for (let t = 0; t < 3; t++) optimizer.stepSync();
    expect(optimizer.ledger.phases).toEqual([{ noiseMultiplier: 1, sampleRate: 0.01, steps: 3 }]);
    const scaled = make({ lossScale: { initial: 4, countNoise: 10 } });
    scaled.stepSync();
    expect(scaled.ledger.phases[0].noiseMultiplier).toBeCloseTo(1 / Math.sqrt(1 + 0.01), 12);
    // Without sampling ε of the two releases one after the other, at their own multipliers, is the same.
    const whole = make({ sampler: { sampleRate: 1, expectedBatch: B } });
    whole.stepSync();
    const rdp = { accountant: 'rdp', delta: 1e-5 } as const;
    const [z, count] = [1 / Math.sqrt(1 - 1 / 16), 4].map((noiseMultiplier) => ({
      noiseMultiplier,
      sampleRate: 1,
      steps: 1,
    }));
    expect(whole.epsilon(rdp).epsilon).toBeCloseTo(computeEpsilon({ ...rdp, phases: [z, count] }).epsilon, 9);
  });

  it('the norm follows the quantile of the norms in training', () => {
    const problem = imageModel();
    const optimizer = optimizerFor(problem.model, {
      maxNorm: adaptive({ maxNorm: 50, expectedBatch: 6, countStddev: 0.3 }),
      sampler: { sampleRate: 1, expectedBatch: 6 },
      algorithm: { type: 'sgd', learningRate: 0 },
    });
    for (let t = 0; t < 60; t++) {
      optimizer.accumulateSync(layersOf(problem));
      optimizer.stepSync();
    }
    const norms = naiveGradients(problem.model, layersOf(problem), 6).map((g) => Math.hypot(...g));
    norms.sort((a, b) => a - b);
    expect(optimizer.maxNorm).toBeGreaterThan(0.8 * norms[1]);
    expect(optimizer.maxNorm).toBeLessThan(1.2 * norms[4]);
  });

  it('discrete noise: the grid of each step is that of its norm', () => {
    const weight = f32(new Array(4096).fill(0), [1, 4096]);
    const optimizer = optimizerFor(imageModel().model, {
      layers: { l: { weight } },
      maxNorm: adaptive({ maxNorm: 1, expectedBatch: 1, rate: 8 }),
      sampler: { sampleRate: 0.01, expectedBatch: 1 },
      noise: 'discrete',
      noiseMultiplier: 1,
    });
    const grids = [0, 1].map(() => {
      const { maxNorm } = optimizer;
      weight.data.fill(0);
      optimizer.stepSync();
      const noiseMultiplier = 1 / Math.sqrt(1 - 1 / 16);
      const plan = discreteNoisePlan({ maxNorm, noiseMultiplier, elements: 4096 });
      expect(weight.data.every((x) => Number.isInteger(x / plan.granularity))).toBe(true);
      expect(Math.abs(Math.hypot(...weight.data) / 64 / plan.stddev - 1)).toBeLessThan(0.05);
      return plan.granularity;
    });
    expect(grids[1]).not.toBe(grids[0]);
  });

  it('a sample that is not finite counts as beyond the norm', () => {
    const [bad, none] = [imageModel(1), imageModel(1)];
    bad.x.data.fill(Number.NaN);
    const moved = [bad, none].map((problem) => {
      const optimizer = optimizerFor(problem.model, { maxNorm: adaptive(), noiseMultiplier: 1 });
      if (problem === bad) expect(optimizer.accumulateSync(layersOf(problem)).nonFinite).toEqual([0]);
      optimizer.stepSync();
      return optimizer.maxNorm;
    });
    expect(moved[0] / moved[1]).toBeCloseTo(Math.exp((0.5 * 0.5) / B), 10);
  });

  it('is saved and resumed: the same norms, the same bits', () => {
    const make = (model = imageModel()) => {
      const optimizer = optimizerFor(model.model, {
        maxNorm: adaptive(),
        noiseMultiplier: 1,
        algorithm: { type: 'adamw', learningRate: 0.01 },
      });
      const train = (steps: number) => {
        for (let t = 0; t < steps; t++) {
          optimizer.accumulateSync(layersOf(model));
          optimizer.stepSync();
        }
      };
      return { model: model.model, optimizer, train };
    };
    const [whole, resumed] = [make(), make()];
    whole.train(2);
    const state = JSON.parse(JSON.stringify({ ...whole.optimizer.state(), tensors: undefined }));
    state.tensors = whole.optimizer.state().tensors;
    expect(state.progress.clipping.maxNorm).toBe(whole.optimizer.maxNorm);
    whole.train(3);
    resumed.train(1);
    resumed.optimizer.accumulateSync(layersOf(imageModel())); // its norms are forgotten too
    resumed.optimizer.load(state);
    expect(resumed.optimizer.maxNorm).toBe(state.progress.clipping.maxNorm);
    resumed.train(3);
    expect(resumed.optimizer.maxNorm).toBe(whole.optimizer.maxNorm);
    expect(flatten(resumed.model)).toEqual(flatten(whole.model));

    const { optimizer } = make();
    const load = (progress: object) => () =>
      optimizer.load({ ...state, progress: { ...state.progress, ...progress } });
    expectThrow(load({ clipping: null }), 'ERR_CHECKPOINT', /adaptive clipping/);
    const later = { ...state.progress.clipping, nextStep: 3 };
    expectThrow(load({ clipping: later }), 'ERR_CHECKPOINT', /clipping norm is that of step 3, not 2/);
    const louder = { ...state.progress.clipping, countStddev: 1 };
    expectThrow(load({ clipping: louder }), 'ERR_CHECKPOINT', /clipping norm is of another configuration/);
    expect(optimizer.steps).toBe(0);
    const refused = (maxNorm: number | AdaptiveClipping, message: RegExp) =>
      expectThrow(
        () => optimizerFor(imageModel().model, { noiseMultiplier: 1, algorithm, maxNorm }).load(state),
        'ERR_CHECKPOINT',
        message,
      );
    const algorithm = { type: 'adamw', learningRate: 0.01 } as const;
    refused(adaptive({ quantile: 0.7 }), /clipping.maxNorm.quantile was 0.5 and is 0.7/);
    refused(adaptive({ maxNorm: 1 }), /clipping.maxNorm.initial was 0.3 and is 1/);
    refused(0.3, /clipping.maxNorm was \{.*\} and is 0.3/);
  });

  it('refuses what would not be what it says', () => {
    const make = (more: object) => () =>
      optimizerFor(imageModel().model, { noiseMultiplier: 1, ...more } as PrivateOptimizerOptions);
    const used = adaptive();
    used.update(new Float32Array(3), 0);
    expectThrow(make({ maxNorm: used }), 'ERR_ARGUMENT', /got one after step 0; a saved optimizer state/);
    expectThrow(
      make({ maxNorm: adaptive({ expectedBatch: 9 }) }),
      'ERR_OPTION',
      /maxNorm.expectedBatch must be the sampler's 8, got 9/,
    );
    expectThrow(
      make({ maxNorm: adaptive(), noiseMultiplier: 4 }),
      'ERR_OPTION',
      /noiseMultiplier must be below 2·countStddev = 4, got 4/,
    );
    expectThrow(make({ maxNorm: adaptive().toJSON() }), 'ERR_OPTION', /maxNorm must be a finite number/);
  });
});

describe('PrivateOptimizer and its sampler', () => {
  const common = { key: KEY, size: 1000, sampleRate: 0.01 };
  const make = (sampler: PrivateOptimizerOptions['sampler'], more: Partial<PrivateOptimizerOptions> = {}) =>
    optimizerFor(imageModel().model, { noiseMultiplier: 1, sampler, ...more });

  it('truncated batches: the ledger is told how often they are cut', () => {
    const sampler = new TruncatedPoissonSampler({ ...common, maxBatch: 50 });
    const optimizer = make(sampler);
    for (let t = 0; t < 4; t++) optimizer.stepSync();
    const tau = sampler.overflowProbability;
    expect(tau).toBeGreaterThan(0);
    const phase = { noiseMultiplier: 1, sampleRate: 0.01, steps: 4, overflowProbability: tau };
    expect(optimizer.ledger.phases).toEqual([phase]);
    const spent = { accountant: 'rdp', delta: 1e-5 } as const;
    expect(optimizer.epsilon(spent)).toEqual(computeEpsilon({ ...spent, ...phase }));
    // What a sampler would say does as well.
    const { sampleRate, expectedBatch, guarantee } = sampler;
    const told = make({ sampleRate, expectedBatch, guarantee, overflowProbability: tau });
    told.stepSync();
    expect(told.ledger.phases).toEqual([{ ...phase, steps: 1 }]);
    // Cut below the expected batch, it is hardly ever what was accounted for.
    const tight = new TruncatedPoissonSampler({ ...common, maxBatch: 9 });
    expectThrow(() => make(tight), 'ERR_OPTION', /overflowProbability .* got 1: raise maxBatch well above/);
    expectThrow(
      () => make({ sampleRate, expectedBatch, guarantee }),
      'ERR_OPTION',
      /overflowProbability .* got undefined/,
    );
  });

  it('a saved state knows the sampler: another one under the same key is refused', () => {
    const plain = new PoissonSampler(common);
    const truncated = new TruncatedPoissonSampler({ ...common, maxBatch: 50 });
    const save = (sampler: PrivateOptimizerOptions['sampler']) => {
      const optimizer = make(sampler);
      optimizer.stepSync();
      return optimizer.state();
    };
    const states = { plain: save(plain), truncated: save(truncated) };
    expect(JSON.stringify(states)).not.toContain(Buffer.from(KEY).toString('hex'));
    make(new PoissonSampler(common)).load(states.plain);
    make(new TruncatedPoissonSampler({ ...common, maxBatch: 50 })).load(states.truncated);
    const refused = (sampler: PrivateOptimizerOptions['sampler'], of: keyof typeof states, message: RegExp) =>
      expectThrow(() => make(sampler).load(states[of]), 'ERR_CHECKPOINT', message);
    refused(new PoissonSampler({ ...common, key: KEY.map((k) => k ^ 1) }), 'plain', /sampler.keyFingerprint/);
    refused(new PoissonSampler({ ...common, size: 999 }), 'plain', /sampler.size was 1000 and is 999/);
    refused(truncated, 'plain', /sampler.guarantee was "poisson" and is "poisson-truncated"/);
    refused(
      new TruncatedPoissonSampler({ ...common, maxBatch: 51 }),
      'truncated',
      /maxBatch was 50 and is 51/,
    );
    refused({ sampleRate: 0.01, expectedBatch: 10 }, 'plain', /sampler.size was 1000 and is undefined/);
  });
});

it('a truncated sampler says what it is, and holds no secret', () => {
  const sampler = new TruncatedPoissonSampler({ key: KEY, size: 10, sampleRate: 0.5, maxBatch: 9 });
  const saved = JSON.parse(JSON.stringify(sampler));
  expect(saved).toEqual({
    guarantee: 'poisson-truncated',
    size: 10,
    sampleRate: 0.5,
    maxBatch: 9,
    keyFingerprint: saved.keyFingerprint,
  });
  expect(saved.keyFingerprint).toMatch(/^[0-9a-f]{32}$/);
  const { keyFingerprint } = new PoissonSampler({ key: KEY, size: 3, sampleRate: 1 }).toJSON();
  expect(keyFingerprint).toBe(saved.keyFingerprint);
});
