import { describe, expect, it } from 'vitest';
import {
  type AttentionBackwardOptions,
  attentionBackward,
  attentionBackwardSync,
  attentionSync,
} from '../../lib/attention/index.ts';
import { HeddleError, Tensor } from '../../lib/index.ts';
import { drawAttention } from '../cases/attention/attention.ts';
import { attentionBackwardCases } from '../cases/attention/attentionBackward.ts';
import { Random } from '../cases/random.ts';
import { nativeVariants } from '../helpers/backends.ts';
import { testCases } from '../helpers/cases.ts';
import { expectRejection } from '../helpers/errors.ts';
import { floatTensor, relativeError } from '../helpers/golden.ts';
import { goldenCases, goldenOptions } from './golden.ts';

testCases(attentionBackwardCases);

const variants = nativeVariants();
const everywhere = [{ name: 'reference', options: { backend: 'reference' as const }, use() {} }, ...variants];

describe.each(everywhere)('attentionBackward on $name', ({ name, options, use }) => {
  it.each(goldenCases)("PyTorch's gradients in float64: $name", (c) => {
    use();
    const [q, k, v] = [c.q, c.k, c.v].map(floatTensor);
    const o = { ...options, ...goldenOptions(c), returnLogSumExp: true };
    const { output, logSumExp } = attentionSync(q, k, v, o);
    const g = attentionBackwardSync(floatTensor(c.gradOutput), q, k, v, {
      ...o,
      output,
      logSumExp: logSumExp as Tensor,
    });
    const bound = name === 'reference' ? 1e-6 : 5e-6;
    for (const part of ['query', 'key', 'value', 'bias'] as const) {
      const expected = c.gradients[part];
      if (expected === undefined) {
        expect(g[part]).toBeUndefined();
        continue;
      }
      expect(g[part]!.dims).toEqual(expected.dims);
      expect(relativeError(g[part]!.data as Float32Array, expected.data)).toBeLessThanOrEqual(bound);
    }
  });

  it('masked NaN and infinity never leak into a gradient', () => {
    use();
    const { q, k, v } = drawAttention({ name: '', queries: 50, keys: 70, heads: 2, dim: 12 }, new Random(4));
    const g = new Tensor('float32', new Random(5).normals(50 * 2 * 12), [1, 50, 2, 12]);
    const seen = Uint8Array.from({ length: 70 }, (_, j) => (j === 20 || j === 69 ? 0 : 1));
    const mask = new Tensor('uint8', seen, [1, 1, 1, 70]);
    const { output, logSumExp } = attentionSync(q, k, v, { ...options, mask, returnLogSumExp: true });
    const all = { ...options, mask, output, logSumExp: logSumExp as Tensor };
    const clean = attentionBackwardSync(g, q, k, v, all);
    for (const t of [k, v]) {
      (t.data as Float32Array).fill(NaN, 20 * 24, 21 * 24);
      (t.data as Float32Array).fill(Infinity, 69 * 24, 70 * 24);
    }
    const dirty = attentionBackwardSync(g, q, k, v, all);
    for (const part of ['query', 'key', 'value'] as const) {
      expect(dirty[part].data).toEqual(clean[part].data);
      expect((clean[part].data as Float32Array).every(Number.isFinite)).toBe(true);
    }
    expect((clean.key.data as Float32Array).subarray(20 * 24, 21 * 24).every((x) => x === 0)).toBe(true);
  });
});

describe('attentionBackward against finite differences of the forward (reference)', () => {
  const shapes = [
    { name: 'causal GQA', queries: 5, keys: 7, heads: 4, keyHeads: 2, dim: 3, causal: true },
    {
      name: 'softcap, bias, window',
      queries: 6,
      keys: 6,
      heads: 2,
      dim: 4,
      softcap: 1.5,
      bias: '1HQ',
      window: [2, 1] as [number, number],
    },
    {
      name: 'sinks, ALiBi, mask',
      queries: 4,
      keys: 6,
      heads: 2,
      dim: 4,
      sinks: true,
      alibi: true,
      mask: 'BHQ',
    },
    {
      name: 'empty rows uniform',
      queries: 6,
      keys: 3,
      heads: 1,
      dim: 4,
      causal: true,
      emptyRows: 'uniform' as const,
    },
  ];
  it.each(shapes)('$name', (shape) => {
    const random = new Random(77);
    const { q, k, v, options } = drawAttention(shape, random);
    const g = random.normals(q.dims[1] * q.dims[2] * v.dims[3]);
    const backend = 'reference';
    // float32 outputs round at 6e-8: a step of 2^-6 and central differences leave an error near 1e-4.
    const loss = () => {
      const { output } = attentionSync(q, k, v, { ...options, backend });
      return (output.data as Float32Array).reduce((sum, x, i) => sum + x * g[i], 0);
    };
    const { output, logSumExp } = attentionSync(q, k, v, { ...options, backend });
    const up = new Tensor('float32', g, output.dims);
    const grads = attentionBackwardSync(up, q, k, v, {
      ...options,
      output,
      logSumExp: logSumExp as Tensor,
      backend,
    });
    const inputs = { query: q, key: k, value: v, bias: options.bias as Tensor | undefined };
    for (const part of ['query', 'key', 'value', 'bias'] as const) {
      const x = inputs[part]?.data as Float32Array | undefined;
      if (x === undefined) continue;
      const step = 2 ** -6;
      const numeric = x.map((value, i) => {
        const at = (shifted: number) => {
          x[i] = shifted;
          return loss();
        };
        const difference = at(value + step) - at(value - step);
        x[i] = value;
        return difference / (2 * step);
      });
      expect(relativeError(grads[part]!.data as Float32Array, numeric)).toBeLessThan(1e-3);
    }
  });
});

it.runIf(variants.length > 0)('an abort reaches the thread that waits for the panel of another', async () => {
  const x = new Tensor('float32', new Random(9).normals(8192 * 64), [1, 8192, 1, 64]);
  const logSumExp = Tensor.zeros('float32', [1, 1, 8192]);
  const controller = new AbortController();
  const options = { output: x, logSumExp, threads: 2, signal: controller.signal };
  const running = attentionBackward(x, x, x, x, options);
  setTimeout(() => controller.abort(), 3);
  await expectRejection(running, 'ERR_ABORTED', /attentionBackward/);
});

describe('attentionBackward refuses bad input', () => {
  const q = Tensor.zeros('float32', [1, 4, 2, 8]);
  const kv = Tensor.zeros('float32', [1, 6, 1, 8]);
  const lse = Tensor.zeros('float32', [1, 2, 4]);
  const good = { output: q, logSumExp: lse };
  const run = (g: Tensor, options: unknown) =>
    attentionBackwardSync(g, q, kv, kv, options as AttentionBackwardOptions);
  const cases: [string, () => unknown, string, RegExp][] = [
    ['no options', () => run(q, undefined), 'ERR_ARGUMENT', /output and logSumExp/],
    ['no log-sum-exp', () => run(q, { output: q }), 'ERR_ARGUMENT', /output and logSumExp/],
    ['upstream dims', () => run(kv, good), 'ERR_SHAPE', /^gradOutput: expected \[1, 4, 2, 8\]/],
    ['output dims', () => run(q, { output: kv, logSumExp: lse }), 'ERR_SHAPE', /^output/],
    ['log-sum-exp dims', () => run(q, { output: q, logSumExp: q }), 'ERR_SHAPE', /^logSumExp/],
    [
      'upstream type',
      () => run(Tensor.zeros('bfloat16', [1, 4, 2, 8]) as never, good),
      'ERR_DTYPE',
      /^gradOutput/,
    ],
    ['unknown option', () => run(q, { ...good, softCap: 1 }), 'ERR_OPTION', /softCap/],
    [
      'out overlaps',
      () => run(q, { ...good, out: { query: q, key: kv, value: kv } }),
      'ERR_ARGUMENT',
      /^out.query/,
    ],
  ];
  it.each(cases)('%s', (_, call, code, message) => {
    let error: unknown;
    try {
      call();
    } catch (e) {
      error = e;
    }
    expect(error).toBeInstanceOf(HeddleError);
    expect((error as HeddleError).message).toMatch(message);
    expect((error as HeddleError).code).toBe(code);
  });
});
