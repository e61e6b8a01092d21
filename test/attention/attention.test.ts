import fc from 'fast-check';
import { describe, expect, it } from 'vitest';
import { type AttentionForwardOptions, attention, attentionSync } from '../../lib/attention/index.ts';
import { Tensor } from '../../lib/index.ts';
import { attentionCases, drawAttention } from '../cases/attention/attention.ts';
import { Random } from '../cases/random.ts';
import { nativeVariants } from '../helpers/backends.ts';
import { testCases } from '../helpers/cases.ts';
import { floatTensor, relativeError } from '../helpers/golden.ts';
import { goldenCases, goldenOptions } from './golden.ts';

testCases(attentionCases);

const variants = nativeVariants();
const everywhere = [{ name: 'reference', options: { backend: 'reference' as const }, use() {} }, ...variants];

function tensor(values: ArrayLike<number>, dims: number[]): Tensor<'float32'> {
  return new Tensor('float32', Float32Array.from(values), dims);
}

/** Positions [begin, end) of a batch-1 tensor. */
function slice(t: Tensor<'float32'>, begin: number, end: number): Tensor<'float32'> {
  const row = t.dims[2] * t.dims[3];
  return new Tensor('float32', t.data.slice(begin * row, end * row), [
    1,
    end - begin,
    ...t.dims.slice(2),
  ] as number[]);
}

describe.each(everywhere)('attention on $name', ({ name, options, use }) => {
  it.each(goldenCases)('PyTorch in float64: $name', (c) => {
    use();
    const r = attentionSync(floatTensor(c.q), floatTensor(c.k), floatTensor(c.v), {
      ...options,
      ...goldenOptions(c),
      returnLogSumExp: true,
    });
    const bound = name === 'reference' ? 1e-7 : 1e-6;
    expect(relativeError(r.output.data as Float32Array, c.output.data)).toBeLessThanOrEqual(bound);
    const lse = c.logSumExp.map((x) => x ?? -Infinity);
    expect(relativeError(r.logSumExp!.data, lse)).toBeLessThanOrEqual(bound);
  });

  it('a worked case: weights 1/4 and 3/4', () => {
    use();
    const q = tensor([1], [1, 1, 1, 1]);
    const k = tensor([0, Math.log(3)], [1, 2, 1, 1]);
    const v = tensor([8, 4], [1, 2, 1, 1]);
    const r = attentionSync(q, k, v, { ...options, returnLogSumExp: true });
    expect(r.output.data[0]).toBeCloseTo(5, 5);
    expect(r.logSumExp!.data[0]).toBeCloseTo(Math.log(4), 6);
    expect(attentionSync(q, k, v, options).logSumExp).toBeUndefined();
  });

  it('logits of 1e4 and -1e4 are exact; equal keys give the mean of the values', () => {
    use();
    const n = 700;
    const random = new Random(3);
    const q = tensor([100, 0], [1, 1, 1, 2]);
    const values = Array.from({ length: n }, () => random.integer(-8, 8));
    const v = tensor(values, [1, n, 1, 1]);
    const mean = values.reduce((a, b) => a + b) / n;
    for (const key of [100, -100]) {
      const k = tensor(Array.from({ length: n }, (_, j) => [key, j]).flat(), [1, n, 1, 2]);
      const r = attentionSync(q, k, v, { ...options, scale: 1, returnLogSumExp: true });
      expect(Math.abs(Number(r.output.data[0]) - mean)).toBeLessThan(1e-6);
      expect(r.logSumExp!.data[0]).toBeCloseTo(key * 100 + Math.log(n), 2);
    }
    const k = tensor(Array.from({ length: n }, (_, j) => [j === 611 ? 100 : -100, 0]).flat(), [1, n, 1, 2]);
    expect(attentionSync(q, k, v, { ...options, scale: 1 }).output.data[0]).toBe(values[611]);
    // One logit below the top by exactly 1: the difference survives at 1e4.
    const near = tensor([100, 0, 99.99, 0], [1, 2, 1, 2]);
    const two = attentionSync(q, near, tensor([0, 1], [1, 2, 1, 1]), { ...options, scale: 1 });
    const d = 100 * (Math.fround(99.99) - 100);
    expect(Number(two.output.data[0])).toBeCloseTo(Math.exp(d) / (1 + Math.exp(d)), 3);
  });

  it('masked NaN and infinity never leak, whatever masks them', () => {
    use();
    const [s, d] = [75, 20];
    const random = new Random(11);
    const draw = () => random.normals(s * 2 * d);
    const [q, k, v] = [draw(), draw(), draw()];
    const dims = [1, s, 2, d];
    const bad = [3, 40, 70];
    const poison = (x: Float32Array) => {
      const y = x.slice();
      for (const j of bad) y.fill(j === 40 ? Infinity : NaN, j * 2 * d, (j + 1) * 2 * d);
      return new Tensor('float32', y, dims);
    };
    const seen = (j: number) => (bad.includes(j) ? 0 : 1);
    const mask = new Tensor(
      'uint8',
      Uint8Array.from({ length: s }, (_, j) => seen(j)),
      [1, 1, 1, s],
    );
    const blockMask = { mask, query: s, key: 1 };
    for (const o of [{ mask }, { blockMask }, { mask, causal: true }, { mask, softcap: 4 }]) {
      const all = { ...options, ...o, returnLogSumExp: true };
      const clean = attentionSync(tensor(q, dims), tensor(k, dims), tensor(v, dims), all);
      const dirty = attentionSync(tensor(q, dims), poison(k), poison(v), all);
      expect(dirty.output.data).toEqual(clean.output.data);
      expect(dirty.logSumExp!.data).toEqual(clean.logSumExp!.data);
    }
    // Beyond the diagonal and outside the window.
    const causal = attentionSync(tensor(q, dims), poison(k), poison(v), { ...options, causal: true });
    for (let i = 0; i < s; i++) {
      const finite = causal.output.data.slice(i * 2 * d, (i + 1) * 2 * d).every(Number.isFinite);
      expect(finite).toBe(i < 3);
    }
    const window = attentionSync(tensor(q, dims), poison(k), poison(v), { ...options, window: [5, 5] });
    for (let i = 0; i < s; i++) {
      const finite = window.output.data.slice(i * 2 * d, (i + 1) * 2 * d).every(Number.isFinite);
      expect(finite).toBe(bad.every((j) => Math.abs(i - j) > 5));
    }
  });

  it('rows without a visible key: 0, or the mean of the values; -Infinity as log-sum-exp', () => {
    use();
    const v = tensor([1, 2, 6], [1, 3, 1, 1]);
    const ones = tensor([1, 1, 1], [1, 3, 1, 1]);
    const mask = new Tensor('uint8', Uint8Array.from([0, 0, 0, 1, 0, 0, 0, 0, 0]), [1, 1, 3, 3]);
    const zero = attentionSync(ones, ones, v, { ...options, mask, returnLogSumExp: true });
    expect(Array.from(zero.output.data)).toEqual([0, 1, 0]);
    expect(Array.from(zero.logSumExp!.data)).toEqual([-Infinity, 1, -Infinity]);
    const uniform = attentionSync(ones, ones, v, { ...options, mask, emptyRows: 'uniform' });
    expect(Array.from(uniform.output.data)).toEqual([3, 1, 3]);
  });

  it('a bias of -Infinity masks', () => {
    use();
    const ones = tensor([1, 1], [1, 2, 1, 1]);
    const bias = tensor([0, -Infinity], [1, 1, 1, 2]);
    const v = tensor([5, NaN], [1, 2, 1, 1]);
    expect(Array.from(attentionSync(ones, ones, v, { ...options, bias }).output.data)).toEqual([5, 5]);
  });

  it('a visible NaN makes its own row NaN and no other', () => {
    use();
    const random = new Random(5);
    const q = tensor(random.normals(20 * 8), [1, 20, 1, 8]);
    q.data[7 * 8 + 3] = NaN;
    const kv = tensor(random.normals(40 * 8), [1, 40, 1, 8]);
    const r = attentionSync(q, kv, kv, { ...options, returnLogSumExp: true });
    for (let i = 0; i < 20; i++) {
      expect(Number.isNaN(r.output.data[i * 8])).toBe(i === 7);
      expect(Number.isNaN(r.logSumExp!.data[i])).toBe(i === 7);
    }
  });

  it('rows are bitwise the same alone, among others, in a batch and packed', () => {
    use();
    const random = new Random(21);
    const [s, keys, d] = [61, 1100, 40];
    const q = tensor(random.normals(s * 4 * d), [1, s, 4, d]);
    const k = tensor(random.normals(keys * 2 * d), [1, keys, 2, d]);
    const v = tensor(random.normals(keys * 2 * d), [1, keys, 2, d]);
    const rowOf = (x: Tensor, i: number) => x.data.slice(i * 4 * d, (i + 1) * 4 * d);
    const variations: AttentionForwardOptions[] = [{}, { window: [700, 100] }, { softcap: 5 }];
    for (const o of variations) {
      const all = attentionSync(q, k, v, { ...options, ...o }).output;
      // A prefix of the queries; the window moves with the bottom right corner, so it is shifted back.
      for (const [begin, end] of [
        [0, 1],
        [s - 1, s],
        [5, 25],
      ]) {
        const shift = s - end;
        const part = attentionSync(slice(q, begin, end), k, v, {
          ...options,
          ...o,
          ...(o.window ? { window: [o.window[0] + shift, o.window[1] - shift] as const } : {}),
        }).output;
        for (let i = begin; i < end; i++) expect(rowOf(part, i - begin)).toEqual(rowOf(all, i));
      }
      const twice = (t: Tensor<'float32'>) =>
        tensor([...t.data.map((x) => x + 1), ...t.data], [2, ...t.dims.slice(1)]);
      const batch = attentionSync(twice(q), twice(k), twice(v), { ...options, ...o }).output;
      expect(batch.data.slice(s * 4 * d)).toEqual(all.data);
      const join = (t: Tensor<'float32'>) =>
        tensor([...slice(t, 0, 9).data, ...t.data], [1, t.dims[1] + 9, ...t.dims.slice(2)]);
      const segments = { query: Int32Array.from([0, 9, 9 + s]), key: Int32Array.from([0, 9, 9 + keys]) };
      const packed = attentionSync(join(q), join(k), join(v), { ...options, ...o, segments }).output;
      expect(packed.data.slice(9 * 4 * d)).toEqual(all.data);
    }
  });

  it('logits that outgrow the first keys: exact, and the rows beside keep their bits', () => {
    use();
    const random = new Random(33);
    const [s, keys, d] = [30, 1500, 64];
    const draw = (n: number) => tensor(random.normals(n * d), [1, n, 1, d]);
    const [q, k, v] = [draw(s), draw(keys), draw(keys)];
    for (let i = 0; i < s; i++) q.data[i * d] = 0;
    for (let j = 0; j < keys; j++) k.data[j * d] = j < 40 ? 0 : (j % 7) + Math.floor(j / 32) / 2;
    // From panel to panel logits grow by 30, grow by 300, shrink, are NaN, are infinite.
    for (const [row, growth] of [
      [4, 30],
      [5, 300],
      [6, -30],
      [9, NaN],
      [10, Infinity],
    ]) {
      q.data.fill(0, row * d, (row + 1) * d);
      q.data[row * d] = growth;
    }
    const [all, want] = [options, { backend: 'reference' as const }].map((o) =>
      attentionSync(q, k, v, { ...o, returnLogSumExp: true }),
    );
    const row = (x: Tensor, i: number) => x.data.slice(i * d, (i + 1) * d) as Float32Array;
    for (let i = 0; i < s; i++) {
      expect(attentionSync(slice(q, i, i + 1), k, v, options).output.data).toEqual(row(all.output, i));
      if (i === 9 || i === 10) {
        expect(row(all.output, i).every(Number.isNaN)).toBe(true);
        continue;
      }
      expect(relativeError(row(all.output, i), row(want.output, i))).toBeLessThanOrEqual(5e-6);
      expect(Number(all.logSumExp!.data[i])).toBeCloseTo(Number(want.logSumExp!.data[i]), 3);
    }
  });

  it('property: weights are convex, whatever the shape and the mask', () => {
    use();
    fc.assert(
      fc.property(
        fc.record({
          queries: fc.integer({ min: 1, max: 40 }),
          keys: fc.integer({ min: 1, max: 80 }),
          keyHeads: fc.integer({ min: 1, max: 2 }),
          group: fc.integer({ min: 1, max: 3 }),
          dim: fc.integer({ min: 1, max: 35 }),
          valueDim: fc.integer({ min: 1, max: 35 }),
          causal: fc.boolean(),
          left: fc.integer({ min: -1, max: 20 }),
          masked: fc.boolean(),
          seed: fc.integer({ min: 0, max: 2 ** 30 }),
        }),
        (c) => {
          const random = new Random(c.seed);
          const {
            q,
            k,
            v,
            options: o,
          } = drawAttention(
            {
              name: '',
              queries: c.queries,
              keys: c.keys,
              heads: c.keyHeads * c.group,
              keyHeads: c.keyHeads,
              dim: c.dim,
              valueDim: c.valueDim,
              causal: c.causal,
              window: [c.left, -1],
              mask: c.masked ? 'BHQ' : undefined,
            },
            random,
          );
          // With every value 1 a row is 1, or 0 where nothing is visible.
          v.data.fill(1);
          const r = attentionSync(q, k, v, { ...options, ...o });
          for (let i = 0; i < r.output.data.length; i++) {
            const heads = c.keyHeads * c.group;
            const head = Math.floor(i / c.valueDim) % heads;
            const query = Math.floor(i / c.valueDim / heads);
            const seen = r.logSumExp!.data[head * c.queries + query] !== -Infinity;
            expect(Math.abs(Number(r.output.data[i]) - (seen ? 1 : 0))).toBeLessThan(1e-5);
          }
        },
      ),
      { numRuns: 60 },
    );
  });

  it('out is filled in place; a second call gives the same bits', async () => {
    use();
    const { q, k, v } = drawAttention(
      { name: '', queries: 30, keys: 30, heads: 2, dim: 16, causal: true },
      new Random(1),
    );
    const first = attentionSync(q, k, v, { ...options, causal: true, returnLogSumExp: true });
    const copy = first.output.data.slice();
    first.output.data.fill(7);
    const again = await attention(q, k, v, { ...options, causal: true, out: first });
    expect(again.output.data).toBe(first.output.data);
    expect(again.logSumExp!.data).toBe(first.logSumExp!.data);
    expect(again.output.data).toEqual(copy);
  });
});
