import { describe, expect, it } from 'vitest';
import { Tensor } from '../../lib/index.ts';
import {
  Conv1d,
  clippedGradientsSync,
  crossEntropy,
  crossEntropySync,
  Embedding,
  Flatten,
  Gelu,
  GroupNorm,
  LayerNorm,
  Linear,
  MaxPool2d,
  MeanTokens,
  PositionEmbedding,
  type PrivateLayer,
  perSampleSquaredNormsSync,
  Relu,
  Residual,
  RmsNorm,
  SelfAttention,
  Sequential,
  Tanh,
} from '../../lib/privacy/index.ts';
import { Random } from '../cases/random.ts';
import { everyVariant } from '../helpers/backends.ts';
import { expectRejection, expectThrow } from '../helpers/errors.ts';
import { expectNear, type GoldenTensor, intTensor, readGolden } from '../helpers/golden.ts';
import { f32, flatten, naiveGradients, optimizerFor } from '../helpers/training.ts';

interface GoldenMasked {
  name: 'language model' | 'classifier';
  parameters: Record<string, GoldenTensor>;
  ids: GoldenTensor;
  mask: GoldenTensor;
  labels: GoldenTensor;
  losses: GoldenTensor;
  squaredNorms: GoldenTensor;
  gradients: Record<string, GoldenTensor>;
}
const golden = readGolden<GoldenMasked[]>('training/masked.json');

const bits = (t: GoldenTensor) => new Tensor('uint8', Uint8Array.from(t.data), t.dims);
const transformer = (causal: boolean) => [
  new Residual(new Sequential([new LayerNorm(8), new SelfAttention(8, 2, { causal })])),
  new Residual(new Sequential([new RmsNorm(8), new Linear(8, 12), new Gelu(), new Linear(12, 8)])),
];
const MODELS = {
  'language model': () => [...transformer(true), new Linear(8, 9, { bias: false })],
  classifier: () => [...transformer(false), new MeanTokens(), new Linear(8, 3)],
};

function build(g: GoldenMasked): Sequential {
  const model = new Sequential([new Embedding(9, 8), new PositionEmbedding(7, 8), ...MODELS[g.name]()]);
  for (const [layer, parameters] of Object.entries(model.layers)) {
    for (const [name, t] of Object.entries(parameters)) {
      expect(g.parameters[`${layer}.${name}`].dims).toEqual(t.dims);
      t.data.set(g.parameters[`${layer}.${name}`].data);
    }
  }
  expect(Object.keys(g.parameters).length).toBe(Object.values(model.layers).flatMap(Object.keys).length);
  return model;
}

/** Ids and labels with what cannot be read at padding, so that reading it would fail. */
function padded(g: GoldenMasked) {
  const spoil = (t: GoldenTensor, value: number) =>
    intTensor({ dims: t.dims, data: t.data.map((v, i) => (g.mask.data[i] === 0 ? value : v)) });
  const perToken = g.labels.dims.length === 2;
  return { ids: spoil(g.ids, 99), labels: perToken ? spoil(g.labels, 99) : intTensor(g.labels) };
}

/** Sample i without its padding. */
function alone(g: GoldenMasked, i: number) {
  const width = g.ids.dims[1];
  const own = (t: GoldenTensor) =>
    t.data.slice(i * width, (i + 1) * width).filter((_, p) => g.mask.data[i * width + p] !== 0);
  const ids = own(g.ids);
  const perToken = g.labels.dims.length === 2;
  return {
    ids: intTensor({ dims: [1, ids.length], data: ids }),
    labels: perToken
      ? intTensor({ dims: [1, ids.length], data: own(g.labels) })
      : intTensor({ dims: [1], data: [g.labels.data[i]] }),
  };
}

const squaredNorms = (layers: Record<string, PrivateLayer>, options = {}) => {
  const lists = Object.values(layers).map((layer) => perSampleSquaredNormsSync(layer, options).data);
  return lists[0].map((_, i) => lists.reduce((sum, list) => sum + list[i], 0));
};

describe.each(everyVariant())('padding on $name', ({ options, use }) => {
  it.each(golden)('PyTorch on each sample without its padding: $name', async (g) => {
    use();
    const model = build(g);
    const { ids, labels } = padded(g);
    const pass = await model.forward(ids, { mask: bits(g.mask), ...options });
    expect(pass.mask?.dims).toEqual(g.name === 'classifier' ? undefined : g.mask.dims);
    const { losses, gradient } = await crossEntropy(pass.output, labels, { mask: pass.mask, ...options });
    expectNear(losses.data, g.losses.data, 2e-6);
    const layers = await pass.backward(gradient, options);
    expectNear(squaredNorms(layers, options), g.squaredNorms.data, 1e-5);
    for (const [layer, parameters] of Object.entries(model.layers)) {
      const ones = new Float32Array(5).fill(1);
      const sums = clippedGradientsSync(layers[layer], ones, options) as unknown as typeof parameters;
      for (const name of Object.keys(parameters)) {
        const expected = g.gradients[`${layer}.${name}`].data;
        const difference = Math.hypot(...expected.map((e, i) => e - sums[name].data[i]));
        expect(difference).toBeLessThanOrEqual(1e-5 * Math.hypot(...expected) + 1e-6);
      }
    }
  });

  it.each(golden)('the same per-sample gradients as without padding, one by one: $name', (g) => {
    use();
    const model = build(g);
    const { ids, labels } = padded(g);
    const pass = model.forwardSync(ids, { mask: bits(g.mask), ...options });
    const { gradient } = crossEntropySync(pass.output, labels, { mask: pass.mask, ...options });
    const together = naiveGradients(model, pass.backwardSync(gradient, options), 5);
    for (let i = 0; i < 5; i++) {
      const one = alone(g, i);
      const own = model.forwardSync(one.ids, options);
      const { gradient } = crossEntropySync(own.output, one.labels, options);
      const [expected] = naiveGradients(model, own.backwardSync(gradient, options), 1);
      expectNear(together[i], expected, 2e-6);
    }
  });

  it('nothing that stands at padding is read, not even NaN, forward or back', () => {
    use();
    const model = new Sequential([
      new Linear(6, 8),
      new LayerNorm(8, { epsilon: 0 }),
      new Residual(new SelfAttention(8, 2)),
      new Relu(),
      new RmsNorm(8, { epsilon: 0 }),
      new Residual(new SelfAttention(8, 4, { causal: true })),
      new Tanh(),
      new Linear(8, 3),
    ]).initialize(3);
    const random = new Random(6);
    const mask = new Tensor('uint8', Uint8Array.of(1, 1, 0, 1, 0, 1, 0, 0, 0, 0, 1, 1), [3, 4]);
    const x = random.normals(3 * 4 * 6);
    const g = random.normals(3 * 4 * 3);
    const labels = intTensor({ dims: [3, 4], data: Array.from(mask.data, (on, i) => (on ? i % 3 : 7)) });
    const run = (filling: number) => {
      const fill = (values: Float32Array, width: number) =>
        values.map((v, i) => (mask.data[Math.floor(i / width)] === 0 ? filling : v));
      const pass = model.forwardSync(f32(fill(x, 6), [3, 4, 6]), { mask, ...options });
      const entropy = crossEntropySync(pass.output, labels, { mask, ...options });
      const layers = pass.backwardSync(f32(fill(g, 3), [3, 4, 3]), options);
      const ones = new Float32Array(3).fill(1);
      return {
        output: pass.output.data.filter((_, i) => mask.data[Math.floor(i / 3)] !== 0),
        loss: [entropy.losses.data, entropy.gradient.data],
        norms: squaredNorms(layers, options),
        sums: Object.values(layers).map((layer) => clippedGradientsSync(layer, ones, options)),
      };
    };
    const zero = run(0);
    expect(zero.norms.every((n) => n > 0 && Number.isFinite(n))).toBe(true);
    expect([...zero.output, ...zero.loss[0]].every(Number.isFinite)).toBe(true);
    for (const filling of [Number.NaN, Infinity, 1e30]) expect(run(filling)).toEqual(zero);
  });

  it('a sample of padding alone has no loss and no gradient, and changes no other', () => {
    use();
    const [g] = golden;
    const model = build(g);
    const { ids, labels } = padded(g);
    const without = bits(g.mask);
    without.data.fill(0, 7, 14);
    const run = (mask: Tensor<'uint8'>) => {
      const pass = model.forwardSync(ids, { mask, ...options });
      const { losses, gradient } = crossEntropySync(pass.output, labels, { mask: pass.mask, ...options });
      return { losses: losses.data, norms: squaredNorms(pass.backwardSync(gradient, options), options) };
    };
    const [all, four] = [run(bits(g.mask)), run(without)];
    expect([four.losses[1], four.norms[1]]).toEqual([0, 0]);
    for (const i of [0, 2, 3, 4]) {
      expect([four.losses[i], four.norms[i]]).toEqual([all.losses[i], all.norms[i]]);
    }
  });

  it('one private step of a padded batch is that of its samples by themselves', () => {
    use();
    const [g] = golden;
    const [batch, single] = [build(g), build(g)];
    const start = flatten(batch);
    const R = Math.sqrt(g.squaredNorms.data[1]); // some samples are clipped
    const [a, b] = [batch, single].map((m) => optimizerFor(m, { maxNorm: R, ...options }));
    const { ids, labels } = padded(g);
    const pass = batch.forwardSync(ids, { mask: bits(g.mask), ...options });
    const { gradient } = crossEntropySync(pass.output, labels, { mask: pass.mask, ...options });
    expect(a.accumulateSync(pass.backwardSync(gradient, options)).samples).toBe(5);
    for (let i = 0; i < 5; i++) {
      const one = alone(g, i);
      const own = single.forwardSync(one.ids, options);
      b.accumulateSync(own.backwardSync(crossEntropySync(own.output, one.labels, options).gradient, options));
    }
    a.stepSync();
    b.stepSync();
    const moved = (model: Sequential) => flatten(model).map((x, i) => x - start[i]);
    expectNear(moved(batch), moved(single), 1e-5);
  });
});

describe('masks', () => {
  it('MeanTokens: means, of tokens, and of none', () => {
    const x = f32([1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12], [2, 3, 2]);
    const pass = new MeanTokens().forwardSync(x);
    expect([pass.output.dims, Array.from(pass.output.data)]).toEqual([
      [2, 2],
      [3, 4, 9, 10],
    ]);
    const mask = new Tensor('uint8', Uint8Array.of(1, 0, 1, 0, 0, 0), [2, 3]);
    expect(Array.from(new MeanTokens().forwardSync(x, { mask }).output.data)).toEqual([3, 4, 0, 0]);
    const none = new Tensor('float32', new Float32Array(0), [2, 0, 2]);
    expect(Array.from(new MeanTokens().forwardSync(none).output.data)).toEqual([0, 0, 0, 0]);
    expectThrow(() => new MeanTokens().forwardSync(f32([1, 2], [1, 2])), 'ERR_SHAPE', /\[B, T, dim\]/);
  });

  it('without padding a mask changes nothing but rounding', () => {
    const [g] = golden;
    const model = build(g);
    const ones = new Tensor('uint8', new Uint8Array(35).fill(1), [5, 7]);
    const [a, b] = [{}, { mask: ones }].map((o) => model.forwardSync(intTensor(g.ids), o).output.data);
    expectNear(b, a, 2e-6);
  });

  it('refusals name the block and what is expected', async () => {
    const x = f32(new Array(2 * 3 * 4).fill(1), [2, 3, 4]);
    const mask = new Tensor('uint8', new Uint8Array(6).fill(1), [2, 3]);
    const refused = (model: Sequential, message: RegExp) =>
      expectThrow(() => model.forwardSync(x, { mask }), 'ERR_ARGUMENT', message);
    refused(new Sequential([new Tanh(), new Flatten()]), /^mask of 1: Flatten would mix padding with tokens/);
    refused(new Sequential([new Conv1d(3, 2, 1)]), /^mask of 0: Conv1d would mix/);
    refused(new Sequential({ norm: new GroupNorm(1, 3) }), /^mask of norm: GroupNorm would mix/);
    expectThrow(
      () =>
        new MaxPool2d(1).forwardSync(f32([1], [1, 1, 1, 1]), { mask: bits({ dims: [1, 1, 1], data: [1] }) }),
      'ERR_ARGUMENT',
      /^mask: pooling would mix/,
    );
    const other = new Tensor('uint8', new Uint8Array(6), [3, 2]);
    const expected = /mask: expected \[2, 3\] as x without its last, got \[3, 2\]/;
    await expectRejection(new Tanh().forward(x, { mask: other }), 'ERR_SHAPE', expected);
    const ids = new Tensor('int32', new Int32Array(6), [2, 3]);
    await expectRejection(
      new Embedding(3, 2).forward(ids, { mask: other }),
      'ERR_SHAPE',
      /mask: expected \[2, 3\] as x, got/,
    );
    await expectRejection(new Tanh().forward(x, { mask: ids }), 'ERR_DTYPE', /mask/);
    await expectRejection(
      crossEntropy(x, ids, { mask: other }),
      'ERR_SHAPE',
      /mask: expected \[2, 3\] as the labels/,
    );
  });
});
