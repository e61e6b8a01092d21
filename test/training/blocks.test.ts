import { describe, expect, it } from 'vitest';
import { runSync } from '../../lib/checkpoint/steps.ts';
import { Tensor } from '../../lib/index.ts';
import {
  AvgPool2d,
  type Block,
  Conv1d,
  Conv2d,
  Conv3d,
  clippedGradientsSync,
  crossEntropy,
  crossEntropySync,
  Embedding,
  Flatten,
  Gelu,
  GroupNorm,
  LayerNorm,
  Linear,
  type LinearLayer,
  MaxPool2d,
  PositionEmbedding,
  type PrivateLayer,
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
import { expectNear, floatTensor, type GoldenTensor, intTensor, readGolden } from '../helpers/golden.ts';

interface GoldenBlock {
  name: string;
  parameters: Record<string, GoldenTensor>;
  x: GoldenTensor & { type: string };
  output: GoldenTensor;
  gradOutput: GoldenTensor;
  gradX: GoldenTensor | null;
  gradients: Record<string, GoldenTensor>;
}
const golden = readGolden<{ blocks: GoldenBlock[]; crossEntropy: Record<string, GoldenTensor> }>(
  'training/blocks.json',
);

const MAKERS: Record<string, () => Block> = {
  linear: () => new Linear(5, 7),
  embedding: () => new Embedding(6, 3),
  position: () => new PositionEmbedding(5, 3),
  'layer-norm': () => new LayerNorm(9),
  'rms-norm': () => new RmsNorm(9),
  'group-norm': () => new GroupNorm(3, 6),
  conv1d: () => new Conv1d(3, 4, 3, { stride: 2, padding: 2, dilation: 2 }),
  conv2d: () => new Conv2d(4, 6, [2, 3], { stride: [1, 2], padding: [0, 1], groups: 2 }),
  conv3d: () => new Conv3d(2, 3, 2, { padding: 1, bias: false }),
  relu: () => new Relu(),
  tanh: () => new Tanh(),
  gelu: () => new Gelu(),
  'gelu-tanh': () => new Gelu({ approximate: 'tanh' }),
  'max-pool': () => new MaxPool2d(3, { stride: 2, padding: 1 }),
  'avg-pool': () => new AvgPool2d([2, 3], { stride: 2, padding: 1 }),
  attention: () => new SelfAttention(6, 2),
  'attention, causal': () => new SelfAttention(6, 3, { causal: true }),
  network: () =>
    new Sequential([
      new Conv2d(1, 4, 3, { stride: 2, padding: 1 }),
      new GroupNorm(2, 4),
      new Tanh(),
      new MaxPool2d(2, { stride: 1 }),
      new Conv2d(4, 6, 2, { groups: 2 }),
      new Relu(),
      new AvgPool2d(2),
      new Flatten(),
      new Linear(6, 3),
    ]),
  transformer: () =>
    new Sequential([
      new Embedding(9, 8),
      new PositionEmbedding(6, 8),
      new Residual(new Sequential([new LayerNorm(8), new SelfAttention(8, 2, { causal: true })])),
      new Residual(new Sequential([new RmsNorm(8), new Linear(8, 12), new Gelu(), new Linear(12, 8)])),
      new Linear(8, 9, { bias: false }),
    ]),
};

const named = (layer: string, parameter: string) => (layer === '' ? parameter : `${layer}.${parameter}`);

function build(g: GoldenBlock): Block {
  const block = MAKERS[g.name]();
  const names = Object.entries(block.layers).flatMap(([layer, p]) =>
    Object.keys(p).map((n) => named(layer, n)),
  );
  expect(names.sort()).toEqual(Object.keys(g.parameters).sort());
  for (const [layer, parameters] of Object.entries(block.layers)) {
    for (const [name, t] of Object.entries(parameters)) {
      const from = g.parameters[named(layer, name)];
      expect(t.dims).toEqual(from.dims);
      t.data.set(from.data);
    }
  }
  return block;
}

/** As expectNear, for gradients that may be exactly zero: a key's bias moves no softmax. */
function expectClose(actual: Float32Array, expected: number[]): void {
  const norm = Math.hypot(...expected);
  const difference = Math.hypot(...expected.map((e, i) => e - actual[i]));
  expect(actual.length).toBe(expected.length);
  expect(difference).toBeLessThanOrEqual(1e-5 * norm + 1e-6);
}

describe.each(everyVariant())('blocks on $name', ({ options, use }) => {
  it.each(golden.blocks)('PyTorch in float64: $name', async (g) => {
    use();
    const block = build(g);
    const x = g.x.type === 'int32' ? intTensor(g.x) : floatTensor(g.x);
    const pass = await block.forward(x, options);
    expect(pass.output.dims).toEqual(g.output.dims);
    expectNear(pass.output.data, g.output.data, 5e-6);

    const layers = await pass.backward(floatTensor(g.gradOutput), options);
    expect(Object.keys(layers).sort()).toEqual(Object.keys(block.layers).sort());
    for (const [layer, record] of Object.entries(layers)) {
      const ones = new Float32Array(g.x.dims[0]).fill(1);
      const sums = clippedGradientsSync(record, ones, options) as unknown as Record<string, Tensor>;
      expect(Object.keys(sums).sort()).toEqual(Object.keys(block.layers[layer]).sort());
      for (const [name, sum] of Object.entries(sums)) {
        const expected = g.gradients[named(layer, name)];
        expect(sum.dims).toEqual(expected.dims);
        expectClose(sum.data as Float32Array, expected.data);
      }
    }

    if (g.gradX !== null) {
      const { backward } = runSync(block.run(x as Tensor<'float32'>, '', options, null));
      const recorder = { layers: {} as Record<string, PrivateLayer>, options };
      const dx = runSync(backward(floatTensor(g.gradOutput), recorder, true));
      expect(dx?.dims).toEqual(g.x.dims);
      expectNear((dx as Tensor).data as Float32Array, g.gradX.data, 1e-5);
    }
  });

  it('PyTorch in float64: cross-entropy per sample, labels missing', async () => {
    use();
    const { logits, labels, losses, gradient } = golden.crossEntropy;
    const got = await crossEntropy(floatTensor(logits), intTensor(labels), options);
    expectNear(got.losses.data, losses.data, 2e-6);
    expectNear(got.gradient.data, gradient.data, 2e-6);
    const best = Array.from({ length: 12 }, (_, r) => {
      const row = logits.data.slice(5 * r, 5 * r + 5);
      return row.indexOf(Math.max(...row));
    });
    expect(Array.from(got.prediction.data)).toEqual(best);
  });

  it('a sample has the same bits alone and in a batch, forward and back', () => {
    use();
    for (const g of golden.blocks) {
      const block = build(g);
      const make = g.x.type === 'int32' ? intTensor : floatTensor;
      const [n, ...rest] = g.x.dims;
      const size = g.x.data.length / n;
      const outSize = g.output.data.length / n;
      const one = make({ dims: [1, ...rest], data: g.x.data.slice(size, 2 * size) });
      const gradient = g.gradOutput.data.slice(outSize, 2 * outSize);
      const all = block.forwardSync(make(g.x), options);
      const alone = block.forwardSync(one, options);
      expect(alone.output.data).toEqual(all.output.data.slice(outSize, 2 * outSize));
      const layers = all.backwardSync(floatTensor(g.gradOutput), options);
      const own = alone.backwardSync(
        floatTensor({ dims: alone.output.dims as number[], data: gradient }),
        options,
      );
      for (const name of Object.keys(layers)) {
        const a = (layers[name] as LinearLayer).gradOutputs.data as Float32Array;
        const b = (own[name] as LinearLayer).gradOutputs.data as Float32Array;
        expect(b).toEqual(a.slice(b.length, 2 * b.length));
      }
    }
  });
});

describe('blocks', () => {
  it('finite differences of a whole network', () => {
    const model = MAKERS.network().initialize(3);
    const random = new Random(5);
    const x = new Tensor('float32', random.normals(2 * 81), [2, 1, 9, 9]);
    const labels = new Tensor('int32', Int32Array.of(0, 2), [2]);
    const options = { backend: 'reference' } as const;
    const loss = () => {
      const { losses } = crossEntropySync(model.forwardSync(x, options).output, labels, options);
      return losses.data[0] + losses.data[1];
    };
    const pass = model.forwardSync(x, options);
    const layers = pass.backwardSync(crossEntropySync(pass.output, labels, options).gradient, options);
    const differences: number[] = [];
    const gradients: number[] = [];
    for (const [layer, parameters] of Object.entries(model.layers)) {
      const sums = clippedGradientsSync(
        layers[layer],
        Float32Array.of(1, 1),
        options,
      ) as unknown as typeof parameters;
      for (const [name, { data }] of Object.entries(parameters)) {
        for (let i = 0; i < data.length; i++) {
          const held = data[i];
          const h = 2 ** -8;
          data[i] = held + h;
          const up = loss();
          data[i] = held - h;
          differences.push((up - loss()) / (2 * h));
          data[i] = held;
        }
        gradients.push(...sums[name].data);
      }
    }
    expect(gradients.length).toBe(4 * 9 + 4 + 8 + 6 * 2 * 4 + 6 + 18 + 3);
    // float32 between the blocks blurs each difference; relu and pooling have corners.
    expectNear(differences, gradients, 0.02);
  });

  it('initialize: the same network from a seed, within its ranges', () => {
    const a = MAKERS.transformer().initialize(7);
    const b = MAKERS.transformer().initialize(7);
    const c = MAKERS.transformer().initialize(8);
    expect(a.layers['4'].weight.data).toEqual(b.layers['4'].weight.data);
    expect(a.layers['4'].weight.data).not.toEqual(c.layers['4'].weight.data);
    expect(a.layers['3.1'].weight.data).not.toEqual(a.layers['3.3'].weight.data.slice(0, 96));
    const limit = 1 / Math.sqrt(8);
    expect(Math.max(...a.layers['4'].weight.data)).toBeLessThanOrEqual(limit);
    expect(Math.min(...a.layers['4'].weight.data)).toBeLessThan(-0.5 * limit);
    expect(Array.from(a.layers['2.0'].weight.data)).toEqual(new Array(8).fill(1));
    expect(Array.from(a.layers['2.0'].bias.data)).toEqual(new Array(8).fill(0));
  });

  it('named blocks, and gradients no deeper than needed', () => {
    const model = new Sequential({ flat: new Flatten(), squash: new Tanh(), head: new Linear(4, 2) });
    expect(Object.keys(model.layers)).toEqual(['head']);
    const pass = model.forwardSync(new Tensor('float32', new Float32Array(12), [3, 2, 2]));
    const layers = pass.backwardSync(new Tensor('float32', new Float32Array(6).fill(1), [3, 2]));
    expect(Object.keys(layers)).toEqual(['head']);
    expectThrow(() => pass.backwardSync(pass.output), 'ERR_DISPOSED', /already run/);
  });

  it('an empty batch goes through', () => {
    const pass = MAKERS.network().forwardSync(new Tensor('float32', new Float32Array(0), [0, 1, 9, 9]));
    expect(pass.output.dims).toEqual([0, 3]);
    const { gradient } = crossEntropySync(pass.output, new Tensor('int32', new Int32Array(0), [0]));
    expect(Object.keys(pass.backwardSync(gradient))).toEqual(['0', '1', '4', '8']);
  });

  it('refusals name the block and what it expects', async () => {
    const f = (dims: number[]) =>
      new Tensor('float32', new Float32Array(dims.reduce((a, b) => a * b, 1)), dims);
    const model = new Sequential([new Linear(3, 4), new Tanh(), new Linear(5, 2)]);
    await expectRejection(
      model.forward(f([2, 3])),
      'ERR_SHAPE',
      /^x of 2: expected \[B, …, 5\], got \[2, 4\]/,
    );
    await expectRejection(model.forward(f([2, 4])), 'ERR_SHAPE', /^x of 0: expected \[B, …, 3\]/);
    await expectRejection(model.forward(f([3])), 'ERR_SHAPE', /^x of 0/);
    const ids = new Tensor('int32', Int32Array.of(0, 6), [2]);
    await expectRejection(model.forward(ids), 'ERR_DTYPE', /x of 0: expected float32, got int32/);
    await expectRejection(new Embedding(6, 3).forward(ids), 'ERR_VALUE', /element 1 is 6: expected 0 to 5/);
    await expectRejection(new Embedding(6, 3).forward(f([2])), 'ERR_DTYPE', /ids/);
    await expectRejection(new Conv2d(3, 4, 3).forward(f([1, 2, 8, 8])), 'ERR_SHAPE', /\[B, 3, size, size\]/);
    await expectRejection(
      new Conv2d(3, 4, 9).forward(f([1, 3, 8, 8])),
      'ERR_SHAPE',
      /kernel \[9, 9\] fits in/,
    );
    await expectRejection(new MaxPool2d(9).forward(f([1, 3, 8, 8])), 'ERR_SHAPE', /fits in/);
    await expectRejection(new Residual(new Linear(3, 4)).forward(f([2, 3])), 'ERR_SHAPE', /as it read/);
    await expectRejection(new LayerNorm(4).forward(f([2, 3])), 'ERR_SHAPE', /\[B, …, 4\]/);
    await expectRejection(new SelfAttention(4, 2).forward(f([2, 4])), 'ERR_SHAPE', /\[B, T, 4\]/);
    const pass = new Linear(3, 4).forwardSync(f([2, 3]));
    expectThrow(() => pass.backwardSync(f([2, 3])), 'ERR_SHAPE', /gradOutput: expected \[2, 4\]/);
    await expectRejection(model.forward(f([2, 3]), { speed: 1 } as object), 'ERR_OPTION', /speed/);
    expectThrow(() => new Linear(0, 4), 'ERR_OPTION', /inputs/);
    expectThrow(() => new Linear(1, 4, { biass: true } as object), 'ERR_OPTION', /biass/);
    expectThrow(() => new Conv2d(3, 4, [1, 2, 3]), 'ERR_OPTION', /kernel must be one number or 2/);
    expectThrow(() => new Conv2d(3, 4, 1, { groups: 2 }), 'ERR_OPTION', /groups must divide/);
    expectThrow(() => new MaxPool2d(2, { padding: 2 }), 'ERR_OPTION', /padding/);
    expectThrow(() => new GroupNorm(4, 6), 'ERR_OPTION', /groups must divide the 6/);
    expectThrow(() => new SelfAttention(6, 4), 'ERR_OPTION', /heads must divide dim 6/);
    expectThrow(() => new Gelu({ approximate: 'fast' as 'none' }), 'ERR_OPTION', /approximate/);
    expectThrow(() => new Sequential({ 'a.b': new Tanh() }), 'ERR_ARGUMENT', /no dot/);
    expectThrow(() => new Sequential([{} as Block]), 'ERR_ARGUMENT', /blocks.0/);
    const y = new Tensor('int32', Int32Array.of(1, 3), [2]);
    expectThrow(
      () => crossEntropySync(f([2, 3]), y),
      'ERR_VALUE',
      /labels: element 1 is 3: expected -1 to 2/,
    );
    const reference = { backend: 'reference' } as const;
    expectThrow(() => crossEntropySync(f([2, 3]), y, reference), 'ERR_VALUE', /labels: element 1 is 3/);
    expectThrow(() => crossEntropySync(f([3, 3]), y), 'ERR_SHAPE', /labels: expected \[3\]/);
    expectThrow(() => crossEntropySync(f([2]), y), 'ERR_SHAPE', /logits/);
  });
});
