import { describe, expect, it } from 'vitest';
import { encodeFloats } from '../../lib/dtype.ts';
import { Tensor } from '../../lib/index.ts';
import {
  clipFactorsSync,
  clippedGradientsSync,
  crossEntropySync,
  gaussianNoiseSync,
  Linear,
  PoissonSampler,
  PrivateOptimizer,
  type PrivateOptimizerOptions,
  perSampleSquaredNormsSync,
  Sequential,
  Tanh,
} from '../../lib/privacy/index.ts';
import { Random } from '../cases/random.ts';
import { everyVariant } from '../helpers/backends.ts';
import { expectNear, floatTensor, type GoldenTensor, readGolden } from '../helpers/golden.ts';
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
  it('adapters and tied embeddings train as well', () => {
    const random = new Random(8);
    const draw = (...dims: number[]) => f32(random.normals(dims.reduce((a, b) => a * b, 1)), dims);
    const adapter = { a: draw(2, 5), b: draw(3, 2) };
    const table = { weight: draw(7, 4) };
    const layers = {
      adapter: { kind: 'lora', activations: draw(3, 2, 5), gradOutputs: draw(3, 2, 3), ...adapter },
      table: {
        kind: 'tied-embedding',
        indices: new Tensor('int32', Int32Array.of(0, 1, 2, 3, 4, 5), [3, 2]),
        gradEmbeddings: draw(3, 2, 4),
        hidden: draw(3, 2, 4),
        gradLogits: draw(3, 2, 7),
      },
    } as const;
    const { model } = imageModel();
    const start = [adapter.a, adapter.b, table.weight].map((t) => t.data.slice());
    const [a, b] = [perSampleSquaredNormsSync(layers.adapter), perSampleSquaredNormsSync(layers.table)];
    const factors = clipFactorsSync([a, b], { maxNorm: 1 });
    const lora = clippedGradientsSync(layers.adapter, factors);
    const tied = clippedGradientsSync(layers.table, factors);
    const optimizer = optimizerFor(model, { layers: { adapter, table }, maxNorm: 1 });
    optimizer.accumulateSync(layers);
    optimizer.stepSync();
    [adapter.a, adapter.b, table.weight].forEach((t, i) => {
      const sum = [lora.a, lora.b, tied.weight][i];
      expectNear(
        t.data,
        start[i].map((x, e) => x - sum.data[e] / 8),
        1e-6,
      );
    });
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
