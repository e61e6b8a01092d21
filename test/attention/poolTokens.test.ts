import { readFileSync } from 'node:fs';
import { describe, expect, it } from 'vitest';
import { poolTokens, poolTokensSync } from '../../lib/attention/index.ts';
import { encodeFloats } from '../../lib/dtype.ts';
import { type OpOptions, packMatrixSync, Tensor } from '../../lib/index.ts';
import { decoded } from '../cases/attention/attention.ts';
import { Random } from '../cases/random.ts';
import { everyVariant } from '../helpers/backends.ts';
import { expectRejection, testRefusals } from '../helpers/errors.ts';
import { floatTensor, relativeError } from '../helpers/golden.ts';

interface Numbers {
  dims: number[];
  data: number[];
}
const golden: { heads: number; weights: Record<string, Numbers>; x: Numbers; output: Numbers } = JSON.parse(
  readFileSync(new URL('../golden/nn/blocks.json', import.meta.url), 'utf8'),
).pooling;
const { weights } = golden;

/** The golden head; its query is stored with leading axes of 1. */
function head(options: OpOptions) {
  const matrix = (name: string) => packMatrixSync(floatTensor(weights[`${name}.weight`]), options);
  const bias = (name: string) => floatTensor(weights[`${name}.bias`]);
  const query = weights['pooling_attention_query'];
  return {
    kind: 'attention' as const,
    heads: golden.heads,
    query: floatTensor({ ...query, dims: query.dims.slice(1) }),
    perDimScale: floatTensor(weights['per_dim_scale']),
    queryWeight: matrix('q_proj'),
    keyWeight: matrix('k_proj'),
    valueWeight: matrix('v_proj'),
    outputWeight: matrix('o_proj'),
    queryBias: bias('q_proj'),
    keyBias: bias('k_proj'),
    valueBias: bias('v_proj'),
    outputBias: bias('o_proj'),
  };
}

describe.each(everyVariant())('poolTokens on $name', ({ options, use }) => {
  it("transformers' pooling head of VideoPrism", async () => {
    use();
    const x = floatTensor(golden.x);
    const o = { ...options, ...head(options) };
    const y = poolTokensSync(x, o);
    expect(y.dims).toEqual(golden.output.dims);
    expect(relativeError(y.data as Float32Array, golden.output.data)).toBeLessThan(1e-6);
    expect((await poolTokens(x, o)).data).toEqual(y.data);
    const out = Tensor.zeros('float32', y.dims);
    expect(poolTokensSync(x, { ...o, out }).data).toBe(out.data);
    expect(out.data).toEqual(y.data);
    const half = new Tensor('bfloat16', encodeFloats(x.data, 'bfloat16') as Uint16Array, x.dims);
    const low = decoded(poolTokensSync(half, o)).data as Float32Array;
    expect(relativeError(low, golden.output.data)).toBeLessThan(1e-2);
  });

  it('a sequence is bitwise the same alone', () => {
    use();
    const x = floatTensor(golden.x);
    const o = { ...options, ...head(options) };
    const all = poolTokensSync(x, o).data;
    const one = new Tensor('float32', x.data.slice(7 * 24), [1, 7, 24]);
    expect(poolTokensSync(one, o).data).toEqual(all.slice(24));
  });

  it('mean and class', async () => {
    use();
    const x = new Tensor('float32', new Random(2).normals(2 * 5 * 9), [2, 5, 9]);
    const mean = poolTokensSync(x, { ...options, kind: 'mean' });
    expect(mean.dims).toEqual([2, 9]);
    for (let b = 0; b < 2; b++) {
      for (let i = 0; i < 9; i++) {
        const tokens = Array.from({ length: 5 }, (_, t) => x.data[(b * 5 + t) * 9 + i]);
        expect(mean.data[b * 9 + i]).toBeCloseTo(tokens.reduce((a, c) => a + c, 0) / 5, 6);
      }
    }
    expect((await poolTokens(x, { ...options, kind: 'mean' })).data).toEqual(mean.data);
    const third = poolTokensSync(x, { ...options, kind: 'class', index: 2 });
    expect(Array.from(third.data)).toEqual([...x.data.slice(18, 27), ...x.data.slice(63, 72)]);
    const first = await poolTokens(x, { ...options, kind: 'class' });
    expect(Array.from(first.data)).toEqual([...x.data.slice(0, 9), ...x.data.slice(45, 54)]);
  });
});

describe('poolTokens refuses bad input', () => {
  const x = floatTensor(golden.x);
  const good = (o: OpOptions) => ({ ...head(o), ...o });
  testRefusals([
    ['no options', () => poolTokensSync(x, undefined as never), 'ERR_ARGUMENT', /options with a kind/],
    ['no kind', (o) => poolTokensSync(x, { ...o } as never), 'ERR_OPTION', /^kind is required/],
    ['kind', (o) => poolTokensSync(x, { ...o, kind: 'max' as never }), 'ERR_OPTION', /^kind must be/],
    [
      'option of another kind',
      (o) => poolTokensSync(x, { ...o, kind: 'mean', index: 1 } as never),
      'ERR_OPTION',
      /unknown option 'index'/,
    ],
    [
      'rank',
      (o) => poolTokensSync(floatTensor({ dims: [2], data: [1, 2] }), { ...o, kind: 'mean' }),
      'ERR_SHAPE',
      /^x/,
    ],
    [
      'no tokens',
      (o) => poolTokensSync(Tensor.zeros('float32', [1, 0, 4]), { ...o, kind: 'class' }),
      'ERR_SHAPE',
      /^x: there are no tokens/,
    ],
    [
      'index',
      (o) => poolTokensSync(x, { ...o, kind: 'class', index: 7 }),
      'ERR_OPTION',
      /^index must be .* 0 to 6, got 7/,
    ],
    ['heads', (o) => poolTokensSync(x, { ...good(o), heads: 5 }), 'ERR_OPTION', /^heads: 5 does not divide/],
    [
      'query',
      (o) => poolTokensSync(x, { ...good(o), query: Tensor.zeros('float32', [1, 9]) }),
      'ERR_SHAPE',
      /^query/,
    ],
    [
      'scale dims',
      (o) => poolTokensSync(x, { ...good(o), perDimScale: Tensor.zeros('float32', [9]) }),
      'ERR_SHAPE',
      /^perDimScale: expected \[8\]/,
    ],
    ['matrix', (o) => poolTokensSync(x, { ...good(o), keyWeight: x as never }), 'ERR_ARGUMENT', /^keyWeight/],
    [
      'matrix dims',
      (o) => poolTokensSync(x, { ...good(o), valueWeight: head(o).outputWeight }),
      'ERR_SHAPE',
      /^valueWeight: expected \[32, 24\]/,
    ],
    ['out', (o) => poolTokensSync(x, { ...o, kind: 'class', out: x }), 'ERR_SHAPE', /^out/],
  ]);

  it('an aborted signal rejects', async () => {
    await expectRejection(
      poolTokens(x, { ...head({}), signal: AbortSignal.abort() }),
      'ERR_ABORTED',
      /aborted/,
    );
  });
});
