import { readFileSync, rmSync, writeFileSync } from 'node:fs';
import { join } from 'node:path';
import { describe, expect, it } from 'vitest';
import { encodeFloats } from '../../lib/dtype.ts';
import { openCheckpointSync, Tensor } from '../../lib/index.ts';
import {
  Conv2d,
  clipFactorsSync,
  crossEntropySync,
  Embedding,
  Flatten,
  GroupNorm,
  gaussianNoiseSync,
  LayerNorm,
  Linear,
  PoissonSampler,
  type PrivateLayer,
  PrivateOptimizer,
  type PrivateOptimizerOptions,
  perSampleSquaredNormsSync,
  Residual,
  SelfAttention,
  Sequential,
  ShuffledSampler,
  Tanh,
} from '../../lib/privacy/index.ts';
import { prepareLayer } from '../../lib/privacy/layer.ts';
import { perSampleGradient } from '../../lib/reference/privacy/perSampleGradient.ts';
import { Random } from '../cases/random.ts';
import { everyVariant } from '../helpers/backends.ts';
import { expectRejection, expectThrow } from '../helpers/errors.ts';
import { expectNear, floatTensor, type GoldenTensor, readGolden } from '../helpers/golden.ts';
import { temporaryFolder } from '../helpers/program.ts';

const KEY = Uint8Array.from({ length: 32 }, (_, i) => 7 * i + 3);
const SAMPLER = { sampleRate: 0.01, expectedBatch: 8 };
const f32 = (data: ArrayLike<number>, dims: number[]) => new Tensor('float32', Float32Array.from(data), dims);

/** A transformer with every kind of layer that a text model has, and a batch for it. */
function textModel(samples = 6) {
  const model = new Sequential([
    new Embedding(7, 8),
    new Residual(new Sequential([new LayerNorm(8), new SelfAttention(8, 2, { causal: true })])),
    new Linear(8, 7),
  ]).initialize(1);
  const random = new Random(2);
  const ids = new Tensor(
    'int32',
    Int32Array.from({ length: samples * 5 }, () => random.integer(0, 6)),
    [samples, 5],
  );
  return { model, x: ids, labels: ids };
}

function imageModel(samples = 6) {
  const model = new Sequential([
    new Conv2d(1, 4, 3, { stride: 2 }),
    new GroupNorm(2, 4),
    new Tanh(),
    new Flatten(),
    new Linear(36, 3),
  ]).initialize(1);
  const random = new Random(3);
  const x = f32(random.normals(samples * 64), [samples, 1, 8, 8]);
  const labels = new Tensor(
    'int32',
    Int32Array.from({ length: samples }, () => random.integer(0, 2)),
    [samples],
  );
  return { model, x, labels };
}

type Problem = ReturnType<typeof textModel> | ReturnType<typeof imageModel>;

const take = <T extends Tensor>(t: T, from: number, to: number): T => {
  const each = t.size / t.dims[0];
  return new Tensor(t.type, t.data.slice(from * each, to * each) as never, [
    to - from,
    ...t.dims.slice(1),
  ]) as T;
};

function layersOf({ model, x, labels }: Problem, from = 0, to = x.dims[0], scale = 1, options = {}) {
  const pass = model.forwardSync(take<Tensor>(x, from, to), options);
  const { gradient } = crossEntropySync(pass.output, take(labels, from, to), { scale, ...options });
  return pass.backwardSync(gradient, options);
}

function optimizerFor(model: Sequential, more: Partial<PrivateOptimizerOptions> = {}): PrivateOptimizer {
  return new PrivateOptimizer({
    layers: model.layers,
    algorithm: { type: 'sgd', learningRate: 1 },
    maxNorm: 0.5,
    noiseMultiplier: 0,
    sampler: SAMPLER,
    key: KEY,
    ...more,
  });
}

const flatten = (model: Sequential) =>
  Float32Array.from(
    Object.values(model.layers).flatMap((p) => Object.values(p).flatMap((t) => Array.from(t.data))),
  );

/** Every sample's whole gradient in float64, parameter after parameter in the order of the model. */
function naiveGradients(
  model: Sequential,
  layers: Record<string, PrivateLayer>,
  samples: number,
): number[][] {
  return Array.from({ length: samples }, (_, i) =>
    Object.entries(model.layers).flatMap(([name, parameters]) => {
      const own = perSampleGradient(prepareLayer(layers[name]).reference(), i) as Record<
        string,
        Float64Array
      >;
      return Object.keys(parameters).flatMap((p) => Array.from(own[p]));
    }),
  );
}

describe.each(everyVariant())('PrivateOptimizer on $name', ({ options, use }) => {
  it.each([
    ['text', textModel],
    ['images', imageModel],
  ] as const)('%s: the clipped sum over the expected batch equals the naive loop', (_, make) => {
    use();
    const problem = make();
    const { model } = problem;
    const samples = problem.x.dims[0];
    const before = flatten(model);
    const layers = layersOf(problem, 0, samples, 1, options);
    const all = naiveGradients(model, layers, samples);
    const norms = all.map((g) => Math.hypot(...g));
    const R = [...norms].sort((a, b) => a - b)[3]; // some are clipped, some are not
    const mean = before.map(
      (_, p) => all.reduce((sum, g, i) => sum + Math.min(1, R / (norms[i] + 1e-6)) * g[p], 0) / 8,
    );
    const optimizer = optimizerFor(model, { maxNorm: R, ...options });
    expect(optimizer.accumulateSync(layers)).toEqual({ samples, nonFinite: [] });
    optimizer.stepSync();
    expectNear(
      before.map((b, i) => b - flatten(model)[i]),
      mean,
      1e-5,
    );
  });

  it('a clipping norm that nothing reaches: plain gradient descent, divided by the expected batch', () => {
    use();
    const problem = imageModel();
    const before = flatten(problem.model);
    const layers = layersOf(problem, 0, 6, 1, options);
    const all = naiveGradients(problem.model, layers, 6);
    const optimizer = optimizerFor(problem.model, { maxNorm: 1e6, ...options });
    optimizer.accumulateSync(layers);
    optimizer.stepSync();
    const sum = before.map((_, p) => all.reduce((s, g) => s + g[p], 0) / SAMPLER.expectedBatch);
    expectNear(
      before.map((b, i) => b - flatten(problem.model)[i]),
      sum,
      1e-5,
    );
  });

  it('micro-batches add up to one batch', async () => {
    use();
    const [one, parts] = [textModel(), textModel()];
    const [a, b] = [one, parts].map((p) => optimizerFor(p.model, { noiseMultiplier: 1, ...options }));
    const start = flatten(one.model);
    await a.accumulate(layersOf(one, 0, 6, 1, options));
    for (const [from, to] of [
      [0, 1],
      [1, 1],
      [1, 4],
      [4, 6],
    ])
      await b.accumulate(layersOf(parts, from, to, 1, options));
    expect((await a.step()).samples).toBe(6);
    expect((await b.step()).samples).toBe(6);
    const moved = flatten(one.model).map((x, i) => x - start[i]);
    expectNear(
      flatten(parts.model).map((x, i) => x - start[i]),
      moved,
      2e-6,
    );
  });

  it('an empty batch is a step of noise alone, and counts', () => {
    use();
    const { model } = imageModel();
    const before = flatten(model);
    const optimizer = optimizerFor(model, { noiseMultiplier: 2, maxNorm: 0.5, ...options });
    expect(optimizer.stepSync()).toEqual({ step: 0, samples: 0, nonFinite: 0, lossScale: 1 });
    // One stream over all parameters, in their order: σ·R over the expected batch.
    const noise = gaussianNoiseSync([before.length], { key: KEY, step: 0, stddev: 2 * 0.5, ...options });
    expectNear(
      before.map((b, i) => b - flatten(model)[i]),
      noise.data.map((z) => z / 8),
      1e-4,
    );
    expect(optimizer.steps).toBe(1);
    expect(optimizer.ledger.phases).toEqual([{ noiseMultiplier: 2, sampleRate: 0.01, steps: 1 }]);
  });

  const run = readGolden<{
    parameter: GoldenTensor;
    gradients: GoldenTensor[];
    runs: { options: PrivateOptimizerOptions['algorithm']; steps: GoldenTensor[] }[];
  }>('training/optimizers.json');
  it.each(run.runs)('PyTorch in float64: $options', ({ options: algorithm, steps }) => {
    use();
    // A linear layer on one-hot inputs: its gradient is whatever the output's gradients are.
    const weight = floatTensor(run.parameter);
    const eye = f32(
      Array.from({ length: 25 }, (_, i) => (i % 6 === 0 ? 1 : 0)),
      [1, 5, 5],
    );
    const optimizer = new PrivateOptimizer({
      layers: { l: { weight } },
      algorithm,
      maxNorm: 1e9,
      noiseMultiplier: 0,
      sampler: { sampleRate: 1, expectedBatch: 1 },
      key: KEY,
      ...options,
    });
    steps.forEach((expected, t) => {
      const g = run.gradients[t].data;
      const transposed = Array.from({ length: 20 }, (_, i) => g[(i % 4) * 5 + Math.floor(i / 4)]);
      const layer = {
        kind: 'linear',
        activations: eye,
        gradOutputs: f32(transposed, [1, 5, 4]),
        bias: false,
      } as const;
      optimizer.accumulateSync({ l: layer });
      optimizer.stepSync();
      expectNear(weight.data, expected.data, 2e-6);
    });
  });

  it('a loss scale changes nothing but the overflow of 16-bit gradients', () => {
    use();
    const weights = [1, 2 ** 10, 2 ** 16].map((lossScale) => {
      const weight = f32([0, 0, 0], [1, 3]);
      const optimizer = new PrivateOptimizer({
        layers: { l: { weight } },
        algorithm: { type: 'sgd', learningRate: 1 },
        maxNorm: 1,
        noiseMultiplier: 0,
        sampler: { sampleRate: 1, expectedBatch: 2 },
        key: KEY,
        lossScale,
        ...options,
      });
      const scaled = Float32Array.of(1 / 64, 0.75, 3).map((g) => g * lossScale); // 3·2¹⁶ is beyond float16
      const gradOutputs = new Tensor('float16', encodeFloats(scaled, 'float16') as Uint16Array, [3, 1]);
      const activations = f32([1, 2, 2, 0, 1, 0, 0, 0, 1], [3, 3]);
      const { nonFinite } = optimizer.accumulateSync({
        l: { kind: 'linear', activations, gradOutputs, bias: false },
      });
      const report = optimizer.stepSync();
      expect(report.nonFinite).toBe(nonFinite.length);
      return { weight: Array.from(weight.data), nonFinite };
    });
    const [plain, scaled, over] = weights;
    expect(plain.nonFinite).toEqual([]);
    expectNear(plain.weight, [-1 / 128, -(1 / 64 + 0.375), -(1 / 64 + 0.5)], 1e-5);
    expect(scaled).toEqual(plain);
    expect(over.nonFinite).toEqual([2]);
    expectNear(over.weight, [-1 / 128, -(1 / 64 + 0.375), -1 / 64], 1e-5);
  });
});

describe('PrivateOptimizer', () => {
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

  it.each([
    ['layer', 'layer'],
    ['groups', { '0': 0, '1': 0, '4': 1 }],
  ] as const)('grouping by %s: each group is bounded by R over the root of their number', (_, grouping) => {
    const problem = imageModel(1);
    const optimizer = optimizerFor(problem.model, { maxNorm: 0.01, grouping });
    const before = flatten(problem.model);
    const layers = layersOf(problem);
    optimizer.accumulateSync(layers);
    optimizer.stepSync();
    const names = Object.keys(problem.model.layers);
    const groups = names.map((n, i) => (grouping === 'layer' ? i : grouping[n as '0']));
    const factors = clipFactorsSync(
      names.map((n) => perSampleSquaredNormsSync(layers[n])),
      { maxNorm: 0.01, grouping: groups },
    );
    expect(factors.every((f) => f.data[0] < 1)).toBe(true);
    const [gradient] = naiveGradients(problem.model, layers, 1);
    const sizes = names.map((n) => Object.values(problem.model.layers[n]).reduce((s, t) => s + t.size, 0));
    const of = sizes.flatMap((size, i) => new Array<number>(size).fill(groups[i]));
    const moved = Array.from(before, (b, i) => 8 * (b - flatten(problem.model)[i]));
    expectNear(
      moved,
      gradient.map((g, i) => g * factors[of[i]].data[0]),
      1e-3,
    );
    const count = new Set(groups).size;
    for (let k = 0; k < count; k++) {
      expect(Math.hypot(...moved.filter((_, i) => of[i] === k))).toBeLessThan(0.01 / Math.sqrt(count) + 1e-5);
    }
  });

  it('a NaN in one sample leaves it out and nothing else, and no step is skipped', () => {
    const [bad, good] = [imageModel(), imageModel()];
    bad.x.data[2 * 64 + 5] = Number.NaN;
    const reports = [bad, good].map((problem) => {
      const optimizer = optimizerFor(problem.model, { noiseMultiplier: 1 });
      const layers = layersOf(problem);
      if (problem === good) {
        optimizer.accumulateSync(layersOf(problem, 0, 2));
        optimizer.accumulateSync(layersOf(problem, 3, 6));
      } else {
        expect(optimizer.accumulateSync(layers)).toEqual({ samples: 6, nonFinite: [2] });
      }
      return { ...optimizer.stepSync(), ledger: optimizer.ledger.steps };
    });
    expect(reports[0]).toEqual({ step: 0, samples: 6, nonFinite: 1, lossScale: 1, ledger: 1 });
    expectNear(flatten(bad.model), flatten(good.model), 1e-6);
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

  it.each([
    { type: 'sgd', learningRate: 0.5, momentum: 0.9 },
    { type: 'adamw', learningRate: 0.01 },
    { type: 'lamb', learningRate: 0.01 },
  ] as const)('saved and resumed by another process state: the same bits ($type)', async (algorithm) => {
    const folder = temporaryFolder();
    try {
      const path = join(folder.path, 'run.safetensors');
      const train = (problem: Problem, optimizer: PrivateOptimizer, steps: number) => {
        for (let t = 0; t < steps; t++) {
          optimizer.learningRate *= 0.9;
          optimizer.accumulateSync(layersOf(problem, t % 3, 6));
          optimizer.stepSync();
        }
      };
      const make = (problem: Problem) =>
        optimizerFor(problem.model, {
          algorithm,
          noiseMultiplier: 1,
          lossScale: { initial: 4, growthInterval: 3 },
        });
      const through = textModel();
      const whole = make(through);
      train(through, whole, 2);
      const early = whole.state();
      await whole.save(path);
      train(through, whole, 4);

      for (const load of ['file', 'file, sync', 'JSON and arrays'] as const) {
        const problem = textModel();
        problem.model.initialize(99); // everything must come from the state
        const optimizer = make(problem);
        optimizer.accumulateSync(layersOf(problem)); // forgotten by the load
        if (load === 'file') await optimizer.loadFile(path);
        else if (load === 'file, sync') optimizer.loadFileSync(path);
        else optimizer.load(early);
        expect(optimizer.steps).toBe(2);
        train(problem, optimizer, 4);
        expect(flatten(problem.model)).toEqual(flatten(through.model));
        expect(optimizer.ledger.toJSON()).toEqual(whole.ledger.toJSON());
        expect(optimizer.state()).toEqual(whole.state());
      }
    } finally {
      folder.remove();
    }
  });

  it('refuses a state of another key, configuration, model, or a damaged one, and changes nothing', () => {
    const folder = temporaryFolder();
    try {
      const path = join(folder.path, 's.safetensors');
      const { model } = imageModel();
      const optimizer = optimizerFor(model, { noiseMultiplier: 1 });
      optimizer.stepSync();
      optimizer.saveSync(path);
      const metadata = openCheckpointSync(path).metadata['heddle.privacy.optimizer'];
      expect(metadata).not.toContain(Buffer.from(KEY).toString('hex'));
      const before = flatten(model);
      const refused = (more: Partial<PrivateOptimizerOptions>, message: RegExp) =>
        expectThrow(
          () => optimizerFor(model, { noiseMultiplier: 1, ...more }).loadFileSync(path),
          'ERR_CHECKPOINT',
          message,
        );
      refused({ key: KEY.map((k) => k + 1) }, /another key/);
      refused({ noiseMultiplier: 2 }, /noiseMultiplier was 1 and is 2. A changed run needs a new key/);
      refused({ maxNorm: 1 }, /clipping.maxNorm was 0.5 and is 1/);
      refused({ sampler: { sampleRate: 0.02, expectedBatch: 8 } }, /sampleRate was 0.01/);
      refused({ algorithm: { type: 'sgd', learningRate: 1, momentum: 0.9 } }, /algorithm.momentum/);
      refused({ layers: textModel().model.layers }, /parameters/);
      const state = optimizer.state();
      const other = optimizerFor(imageModel().model, { noiseMultiplier: 1 });
      expectThrow(() => other.load({ ...state, format: 'x' as never }), 'ERR_CHECKPOINT', /format/);
      expectThrow(() => other.load({ ...state, version: 2 as never }), 'ERR_CHECKPOINT', /version/);
      const fewer = { ...state.progress, steps: 0 };
      expectThrow(
        () => other.load({ ...state, progress: fewer }),
        'ERR_CHECKPOINT',
        /the ledger has 1 steps, the state 0/,
      );
      expectThrow(
        () => other.load({ ...state, tensors: {} }),
        'ERR_CHECKPOINT',
        /tensor parameter.0.weight is missing/,
      );
      writeFileSync(path, readFileSync(path).subarray(0, 2000));
      expectThrow(() => other.loadFileSync(path), 'ERR_CHECKPOINT', /./);
      rmSync(path);
      expectThrow(() => other.loadFileSync(path), 'ERR_CHECKPOINT', /no such file/);
      expectThrow(
        () => optimizer.saveSync(join(path, 'in', 'a', 'file')),
        'ERR_CHECKPOINT',
        /cannot be written/,
      );
      expect(other.steps).toBe(0);
      expect(flatten(model)).toEqual(before);
    } finally {
      folder.remove();
    }
  });

  it('refuses what would void the guarantee', async () => {
    const problem = imageModel();
    const { model } = problem;
    const layers = layersOf(problem);
    const optimizer = optimizerFor(model, { noiseMultiplier: 1 });
    const { '0': conv, ...rest } = layers;
    await expectRejection(
      optimizer.accumulate(rest),
      'ERR_ARGUMENT',
      /layers.0 is missing: every trained layer/,
    );
    await expectRejection(
      optimizer.accumulate({ ...layers, 9: conv }),
      'ERR_ARGUMENT',
      /layers.9 is not a layer/,
    );
    const lstm = { ...layers, 4: { kind: 'lstm' } as never };
    await expectRejection(optimizer.accumulate(lstm), 'ERR_ARGUMENT', /kind must be one of/);
    const unbiased = { ...layers, 4: { ...layers['4'], bias: false } as PrivateLayer };
    await expectRejection(optimizer.accumulate(unbiased), 'ERR_ARGUMENT', /bias/);
    const fewer = { ...layers, 4: layersOf(problem, 0, 2)['4'] };
    await expectRejection(
      optimizer.accumulate(fewer),
      'ERR_SHAPE',
      /layers.4: expected 6 as layers.0 samples, got 2/,
    );
    // None of these left a trace.
    const other = imageModel();
    const fresh = optimizerFor(other.model, { noiseMultiplier: 1 });
    optimizer.accumulateSync(layers);
    fresh.accumulateSync(layersOf(other));
    expectThrow(() => optimizer.state(), 'ERR_ARGUMENT', /half accumulated/);
    optimizer.stepSync();
    fresh.stepSync();
    expect(flatten(model)).toEqual(flatten(other.model));
    const together = [optimizer.accumulate(layersOf(problem)), optimizer.step()];
    await expectRejection(together[1], 'ERR_ARGUMENT', /another call of this optimizer is running/);
    await together[0];
    optimizer.learningRate = Number.NaN;
    expectThrow(() => optimizer.stepSync(), 'ERR_OPTION', /learningRate/);
    expect(optimizer.ledger.steps).toBe(1);

    const frozen = optimizerFor(model, { layers: { '4': model.layers['4'] }, frozen: ['0', '1'] });
    expect(frozen.accumulateSync(layersOf(problem)).samples).toBe(6);
    const shuffled = new ShuffledSampler({ key: KEY, size: 100, batch: 10 });
    const make = (more: object) => () => optimizerFor(model, more as Partial<PrivateOptimizerOptions>);
    expectThrow(make({ sampler: shuffled }), 'ERR_OPTION', /its batches are 'shuffled'/);
    expectThrow(make({ sampler: { sampleRate: 0, expectedBatch: 1 } }), 'ERR_OPTION', /sampleRate/);
    expectThrow(make({ sampler: { sampleRate: 0.1 } }), 'ERR_OPTION', /expectedBatch/);
    expectThrow(make({ noiseMultiplier: undefined }), 'ERR_OPTION', /noiseMultiplier/);
    expectThrow(make({ maxNorm: Infinity }), 'ERR_OPTION', /maxNorm/);
    expectThrow(make({ mode: 'softly' }), 'ERR_OPTION', /mode/);
    expectThrow(make({ key: KEY.slice(1) }), 'ERR_ARGUMENT', /32 bytes/);
    expectThrow(make({ layers: {} }), 'ERR_ARGUMENT', /at least one layer/);
    expectThrow(make({ learningRate: 1 }), 'ERR_OPTION', /unknown option 'learningRate'/);
    expectThrow(make({ grouping: { '0': 0 } }), 'ERR_OPTION', /group/);
    expectThrow(make({ grouping: { x: 0 } }), 'ERR_OPTION', /grouping.x/);
    expectThrow(make({ lossScale: 3 }), 'ERR_OPTION', /power of two/);
    expectThrow(make({ noiseMultiplier: 1, lossScale: { countNoise: 0 } }), 'ERR_OPTION', /countNoise/);
    expectThrow(make({ algorithm: { type: 'adam', learningRate: 1 } }), 'ERR_OPTION', /algorithm.type/);
    expectThrow(make({ algorithm: { type: 'sgd' } }), 'ERR_OPTION', /algorithm.learningRate/);
    expectThrow(
      make({ algorithm: { type: 'sgd', learningRate: 1, nesterov: true } }),
      'ERR_OPTION',
      /nesterov/,
    );
    expectThrow(make({ algorithm: { type: 'adamw', learningRate: 1, beta2: 1 } }), 'ERR_OPTION', /beta2/);
    const tied = { a: model.layers['4'], b: { weight: model.layers['4'].weight } };
    expectThrow(make({ layers: tied }), 'ERR_ARGUMENT', /layers.b.weight shares memory with layers.a.weight/);
    const half = { a: { weight: new Tensor('bfloat16', new Uint16Array(2), [1, 2]) } };
    expectThrow(make({ layers: half }), 'ERR_DTYPE', /layers.a.weight/);
  });

  it('a small network learns under noise, in Poisson batches', { timeout: 60_000 }, async () => {
    // Two moons of points in the plane, 2,000 of them.
    const random = new Random(4);
    const size = 2000;
    const points = new Float32Array(2 * size);
    const classes = Int32Array.from({ length: size }, (_, i) => i % 2);
    for (let i = 0; i < size; i++) {
      const angle = Math.PI * (random.uniform() + (i % 2));
      points[2 * i] = Math.cos(angle) + (i % 2) - 0.5 + 0.1 * random.normal();
      points[2 * i + 1] = Math.sin(angle) + (i % 2 ? 0.25 : -0.25) + 0.1 * random.normal();
    }
    const model = new Sequential([new Linear(2, 16), new Tanh(), new Linear(16, 2)]).initialize(5);
    const sampler = new PoissonSampler({ key: KEY, size, sampleRate: 0.1 });
    const optimizer = optimizerFor(model, {
      algorithm: { type: 'sgd', learningRate: 2, momentum: 0.8 },
      noiseMultiplier: 1,
      maxNorm: 0.5,
      sampler,
    });
    const all = { x: f32(points, [size, 2]), labels: new Tensor('int32', classes, [size]) };
    const evaluate = async () => {
      const { losses, prediction } = crossEntropySync((await model.forward(all.x)).output, all.labels);
      const correct = prediction.data.reduce((sum, p, i) => sum + (p === classes[i] ? 1 : 0), 0);
      return { loss: losses.data.reduce((a, b) => a + b, 0) / size, accuracy: correct / size };
    };
    const start = await evaluate();
    while (optimizer.steps < 60) {
      const batch = sampler.batch(optimizer.steps);
      const x = f32(
        Array.from(batch).flatMap((i) => [points[2 * i], points[2 * i + 1]]),
        [batch.length, 2],
      );
      const labels = new Tensor(
        'int32',
        Int32Array.from(batch, (i) => classes[i]),
        [batch.length],
      );
      const pass = await model.forward(x);
      await optimizer.accumulate(await pass.backward(crossEntropySync(pass.output, labels).gradient));
      await optimizer.step();
    }
    const end = await evaluate();
    expect(start.loss).toBeGreaterThan(0.6);
    expect(end.loss).toBeLessThan(0.35);
    expect(end.accuracy).toBeGreaterThan(0.85);
    expect(optimizer.epsilon({ accountant: 'rdp', delta: 1e-5 }).epsilon).toBeLessThan(8);
  });
});
