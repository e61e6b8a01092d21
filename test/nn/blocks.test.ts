import { readFileSync } from 'node:fs';
import { describe, expect, it } from 'vitest';
import {
  addResidual,
  addResidualSync,
  gelu,
  geluSync,
  layerNorm,
  layerNormBackwardSync,
  layerNormSync,
  meanTokensSync,
  rmsNormBackwardSync,
  rmsNormSync,
  Tensor,
} from '../../lib/index.ts';
import { elementwiseCases } from '../cases/nn/elementwise.ts';
import { normBackwardCases, normCases } from '../cases/nn/norm.ts';
import { Random } from '../cases/random.ts';
import { everyVariant } from '../helpers/backends.ts';
import { testCases } from '../helpers/cases.ts';
import { expectRejection, testRefusals } from '../helpers/errors.ts';
import { floatTensor, relativeError } from '../helpers/golden.ts';

testCases(normCases);
testCases(normBackwardCases);
testCases(elementwiseCases);

interface Numbers {
  dims: number[];
  data: number[];
}
interface GoldenNorm
  extends Partial<Record<'weight' | 'bias' | 'residual' | 'sum' | 'gradWeight' | 'gradBias', Numbers>> {
  name: string;
  kind: 'layer' | 'rms';
  options: { epsilon: number; unitOffset?: boolean };
  x: Numbers;
  output: Numbers;
  gradOutput: Numbers;
  gradX: Numbers;
}
interface Golden {
  norms: GoldenNorm[];
  gelu: { approximate: 'none' | 'tanh'; x: Numbers; output: Numbers }[];
  gated: { x: Numbers; y: Numbers; gate: Numbers; output: Numbers };
}
const golden: Golden = JSON.parse(readFileSync(new URL('../golden/nn/blocks.json', import.meta.url), 'utf8'));

const optional = (n: Numbers | undefined) => (n === undefined ? undefined : floatTensor(n));
const errorOf = (t: { data: unknown } | undefined, n: Numbers) =>
  relativeError((t as Tensor<'float32'>).data, n.data);

describe.each(everyVariant())('transformer block ops on $name', ({ options, use }) => {
  it.each(golden.norms)("PyTorch's norm: $kind $name", (c) => {
    use();
    const o = { ...options, ...c.options, weight: optional(c.weight) };
    const x = floatTensor(c.x);
    const forward = { ...o, residual: optional(c.residual), returnSum: true, returnStatistics: true };
    const r =
      c.kind === 'layer' ? layerNormSync(x, { ...forward, bias: optional(c.bias) }) : rmsNormSync(x, forward);
    expect(errorOf(r.output, c.output)).toBeLessThan(1e-6);
    expect(errorOf(r.sum, c.sum ?? c.x)).toBeLessThan(1e-7);
    for (const statistics of [{}, c.kind === 'layer' ? { mean: r.mean, rstd: r.rstd } : { rstd: r.rstd }]) {
      // A mean that was rounded to float32 costs digits where it is far from 0.
      const bound = c.name === 'far mean' && 'mean' in statistics ? 1e-3 : 2e-6;
      const backward = { ...o, ...statistics };
      if (c.kind === 'layer') {
        const g = layerNormBackwardSync(floatTensor(c.gradOutput), r.sum as Tensor, backward);
        expect(errorOf(g.x, c.gradX)).toBeLessThan(bound);
        if (c.gradWeight) expect(errorOf(g.weight, c.gradWeight)).toBeLessThan(bound);
        if (c.gradBias) expect(errorOf(g.bias, c.gradBias)).toBeLessThan(bound);
      } else {
        const g = rmsNormBackwardSync(floatTensor(c.gradOutput), r.sum as Tensor, backward);
        expect(errorOf(g.x, c.gradX)).toBeLessThan(bound);
        if (c.gradWeight) expect(errorOf(g.weight, c.gradWeight)).toBeLessThan(bound);
      }
    }
  });

  it.each(golden.gelu)("PyTorch's GELU: $approximate", (c) => {
    use();
    const y = geluSync(floatTensor(c.x), { ...options, approximate: c.approximate });
    expect(errorOf(y, c.output)).toBeLessThan(5e-7);
  });

  it('a gated residual', () => {
    use();
    const { x, y, gate, output } = golden.gated;
    const z = addResidualSync(floatTensor(x), floatTensor(y), { ...options, gate: floatTensor(gate) });
    expect(errorOf(z, output)).toBeLessThan(1e-7);
    const closed = addResidualSync(floatTensor(x), floatTensor(y), { ...options, gate: 0 });
    expect(closed.data).toEqual(floatTensor(x).data);
  });

  it('a normalised row has mean 0 and variance 1; a constant row gives the bias', () => {
    use();
    const x = new Tensor('float32', new Random(3).normals(5 * 333, 40), [5, 333]);
    const { data } = layerNormSync(x, { ...options, epsilon: 0 }).output;
    for (let r = 0; r < 5; r++) {
      const row = Array.from(data.slice(r * 333, (r + 1) * 333));
      expect(row.reduce((a, b) => a + b, 0) / 333).toBeCloseTo(0, 6);
      expect(row.reduce((a, b) => a + b * b, 0) / 333).toBeCloseTo(1, 5);
    }
    const constant = new Tensor('float32', new Float32Array(37).fill(1e6), [1, 37]);
    const bias = new Tensor('float32', new Random(4).normals(37), [37]);
    expect(layerNormSync(constant, { ...options, bias }).output.data).toEqual(bias.data);
  });

  it('a row is bitwise the same alone and in a batch', () => {
    use();
    const random = new Random(5);
    const [rows, width] = [70, 93];
    const x = new Tensor('float32', random.normals(rows * width), [rows, width]);
    const g = new Tensor('float32', random.normals(rows * width), [rows, width]);
    const all = layerNormSync(x, options).output.data;
    const grads = layerNormBackwardSync(g, x, options).x.data;
    const row = (t: Tensor<'float32'>, r: number) =>
      new Tensor('float32', t.data.slice(r * width, (r + 1) * width), [1, width]);
    for (const r of [0, 1, 63, 64, 69]) {
      const part = (data: ArrayLike<number>) => Array.from(data).slice(r * width, (r + 1) * width);
      expect(Array.from(layerNormSync(row(x, r), options).output.data)).toEqual(part(all));
      expect(Array.from(layerNormBackwardSync(row(g, r), row(x, r), options).x.data)).toEqual(part(grads));
    }
  });

  it('in place: the stream, the output and the gradient', () => {
    use();
    const random = new Random(6);
    const make = () => new Tensor('float32', random.normals(9 * 45), [9, 45]);
    const [x, y, g] = [make(), make(), make()];
    const expected = layerNormSync(y, { ...options, residual: x, returnSum: true });
    const stream = new Tensor('float32', x.data.slice(), x.dims);
    const branch = new Tensor('float32', y.data.slice(), y.dims);
    const got = layerNormSync(branch, { ...options, residual: stream, out: { output: branch, sum: stream } });
    expect(got.sum?.data).toBe(stream.data);
    expect(stream.data).toEqual(expected.sum?.data);
    expect(branch.data).toEqual(expected.output.data);
    const grads = layerNormBackwardSync(g, x, { ...options, gradSum: y });
    const copy = new Tensor('float32', y.data.slice(), y.dims);
    layerNormBackwardSync(g, x, { ...options, gradSum: copy, out: { x: copy } });
    expect(copy.data).toEqual(grads.x.data);
    const sum = addResidualSync(x, y, { ...options, gate: 0.5 });
    addResidualSync(x, y, { ...options, gate: 0.5, out: x });
    expect(x.data).toEqual(sum.data);
  });

  it('NaN and infinity make their row NaN and no other', () => {
    use();
    const x = new Tensor('float32', new Random(7).normals(3 * 40), [3, 40]);
    for (const bad of [NaN, Infinity]) {
      x.data[45] = bad;
      for (const norm of [layerNormSync, rmsNormSync]) {
        const { data } = norm(x, options).output;
        expect(Array.from(data.slice(0, 40)).every(Number.isFinite)).toBe(true);
        expect(Array.from(data.slice(80)).every(Number.isFinite)).toBe(true);
        expect(Number.isNaN(data[45])).toBe(true);
        if (norm === layerNormSync) expect(Array.from(data.slice(40, 80)).every(Number.isNaN)).toBe(true);
      }
    }
    const edge = new Tensor('float32', Float32Array.of(Infinity, NaN, 1e30, -1e30), [4]);
    for (const approximate of ['none', 'tanh'] as const) {
      expect(Array.from(geluSync(edge, { ...options, approximate }).data)).toEqual([
        Infinity,
        NaN,
        Math.fround(1e30),
        -0,
      ]);
    }
  });
});

describe('transformer block ops refuse bad input', () => {
  const x = Tensor.zeros('float32', [2, 8]);
  const short = Tensor.zeros('float32', [7]);
  const ints = new Tensor('int32', new Int32Array(16), [2, 8]);
  testRefusals([
    ['type', (o) => layerNormSync(ints, o), 'ERR_DTYPE', /^x: type int32/],
    [
      'no width',
      (o) => layerNormSync(Tensor.zeros('float32', [3, 0]), o),
      'ERR_SHAPE',
      /^x: expected .* width of at least 1/,
    ],
    ['scalar', (o) => rmsNormSync(Tensor.zeros('float32', []), o), 'ERR_SHAPE', /^x: expected/],
    [
      'weight',
      (o) => layerNormSync(x, { ...o, weight: short }),
      'ERR_SHAPE',
      /^weight: expected \[8\], got \[7\]/,
    ],
    ['bias', (o) => layerNormSync(x, { ...o, bias: short }), 'ERR_SHAPE', /^bias/],
    [
      'rms bias',
      (o) => rmsNormSync(x, { ...o, bias: short } as never),
      'ERR_OPTION',
      /rmsNorm: unknown option 'bias'/,
    ],
    ['epsilon', (o) => layerNormSync(x, { ...o, epsilon: -1 }), 'ERR_OPTION', /^epsilon/],
    [
      'residual dims',
      (o) => layerNormSync(x, { ...o, residual: short }),
      'ERR_SHAPE',
      /^residual: expected \[2, 8\] as x/,
    ],
    ['outType', (o) => layerNormSync(x, { ...o, outType: 'int8' as never }), 'ERR_OPTION', /^outType/],
    ['returnSum', (o) => layerNormSync(x, { ...o, returnSum: 1 as never }), 'ERR_OPTION', /^returnSum/],
    ['out', (o) => layerNormSync(x, { ...o, out: { output: short } }), 'ERR_SHAPE', /^out.output/],
    ['out key', (o) => layerNormSync(x, { ...o, out: x as never }), 'ERR_OPTION', /^out of layerNorm/],
    [
      'output and sum in one place',
      (o) => layerNormSync(x, { ...o, out: { output: x, sum: x } }),
      'ERR_ARGUMENT',
      /^out.sum overlaps/,
    ],
    [
      'shifted output',
      (o) => {
        const data = new Float32Array(20);
        const from = new Tensor('float32', data.subarray(0, 16), [2, 8]);
        return layerNormSync(from, {
          ...o,
          out: { output: new Tensor('float32', data.subarray(4), [2, 8]) },
        });
      },
      'ERR_ARGUMENT',
      /^out.output overlaps/,
    ],
    ['gradient', (o) => layerNormBackwardSync(short, x, o), 'ERR_SHAPE', /^gradOutput/],
    ['no gradient', (o) => layerNormBackwardSync(undefined as never, x, o), 'ERR_ARGUMENT', /^gradOutput/],
    [
      'mean alone',
      (o) => layerNormBackwardSync(x, x, { ...o, mean: short }),
      'ERR_SHAPE',
      /^mean: expected 2 elements/,
    ],
    [
      'mean without rstd',
      (o) => layerNormBackwardSync(x, x, { ...o, mean: Tensor.zeros('float32', [2]) }),
      'ERR_OPTION',
      /^mean and rstd/,
    ],
    ['rms bias out', (o) => rmsNormBackwardSync(x, x, { ...o, out: { bias: short } }), 'ERR_OPTION', /bias/],
    ['approximate', (o) => geluSync(x, { ...o, approximate: 'erf' as never }), 'ERR_OPTION', /^approximate/],
    [
      'gate',
      (o) => addResidualSync(x, x, { ...o, gate: short }),
      'ERR_SHAPE',
      /^gate: expected a number, \[1\] or \[8\]/,
    ],
    ['y', (o) => addResidualSync(x, short, o), 'ERR_SHAPE', /^y: expected \[2, 8\] as x/],
    [
      'no tokens',
      (o) => meanTokensSync(Tensor.zeros('float32', [2, 0, 3]), o),
      'ERR_SHAPE',
      /^x: the mean of 0 tokens/,
    ],
    ['mean rank', (o) => meanTokensSync(x, o), 'ERR_SHAPE', /^x: expected 3 dimensions/],
  ]);

  it('an aborted signal rejects', async () => {
    const signal = AbortSignal.abort();
    await expectRejection(layerNorm(x, { signal }), 'ERR_ABORTED', /layerNorm/);
    await expectRejection(gelu(x, { signal }), 'ERR_ABORTED', /gelu/);
    await expectRejection(addResidual(x, x, { signal }), 'ERR_ABORTED', /addResidual/);
  });
});
