import { readFileSync } from 'node:fs';
import { describe, expect, it } from 'vitest';
import {
  attentionSync,
  type FactorizedAttentionForwardOptions,
  factorizedAttentionBackwardSync,
  factorizedAttentionSync,
  type KeptTokens,
} from '../../lib/attention/index.ts';
import { Tensor } from '../../lib/index.ts';
import { drawTokens, factorizedAttentionCases } from '../cases/attention/factorizedAttention.ts';
import { Random } from '../cases/random.ts';
import { everyVariant } from '../helpers/backends.ts';
import { testCases } from '../helpers/cases.ts';
import { relativeError } from '../helpers/golden.ts';

testCases(factorizedAttentionCases);

interface Numbers {
  dims: number[];
  data: number[];
}
type Three = Record<'query' | 'key' | 'value', Numbers>;
interface Golden {
  name: string;
  options: FactorizedAttentionForwardOptions;
  q: Numbers;
  k: Numbers;
  v: Numbers;
  gradOutput: Numbers;
  output: Numbers;
  gradients: Three;
  kept?: number[];
  classToken?: Three & { gradOutput: Numbers; output: Numbers; gradients: Three };
}
const file = new URL('../golden/attention/factorized.json', import.meta.url);
const golden: Golden[] = JSON.parse(readFileSync(file, 'utf8'));

const float32 = (n: Numbers) => new Tensor('float32', Float32Array.from(n.data), n.dims);
const tensor = (random: Random, dims: number[]) =>
  new Tensor('float32', random.normals(dims.reduce((a, b) => a * b, 1)), dims);

/** The kept tokens of a flat list of flags, and the rows of a dense tensor that they are. */
function keptOf(flags: number[], [batch, frames, patches]: number[]): KeptTokens {
  const all = frames * patches;
  const indices = flags.flatMap((kept, i) => (kept ? [i % all] : []));
  const counts = Array.from({ length: batch }, (_, b) =>
    flags.slice(b * all, (b + 1) * all).reduce((x, y) => x + y, 0),
  );
  const batchOffsets = [0, ...counts.map((_, b) => counts.slice(0, b + 1).reduce((x, y) => x + y, 0))];
  return { indices: Int32Array.from(indices), batchOffsets: Int32Array.from(batchOffsets), frames, patches };
}
function packRows(n: Numbers, flags: number[]): Numbers {
  const [heads, dim] = n.dims.slice(3);
  const row = heads * dim;
  const data = flags.flatMap((kept, i) => (kept ? n.data.slice(i * row, (i + 1) * row) : []));
  return { dims: [data.length / row, heads, dim], data };
}

/** A transposed copy `[batch, patches, frames, heads, dim]`. */
function swapped(t: Tensor): Tensor<'float32'> {
  const [b, f, p, h, d] = t.dims;
  const out = Tensor.zeros('float32', [b, p, f, h, d]);
  for (let i = 0; i < b * f * p; i++) {
    const [x, y, z] = [Math.floor(i / (f * p)), Math.floor(i / p) % f, i % p];
    const from = (t.data as Float32Array).subarray(i * h * d, (i + 1) * h * d);
    out.data.set(from, ((x * p + z) * f + y) * h * d);
  }
  return out;
}
/** Bitwise equality, without vitest's slow walk over large arrays. */
function expectSame(a: ArrayLike<number>, b: ArrayLike<number>): void {
  const [x, y] = [a, b].map((t) => t as Float32Array);
  expect(
    Buffer.from(x.buffer, x.byteOffset, x.byteLength).equals(
      Buffer.from(y.buffer, y.byteOffset, y.byteLength),
    ),
  ).toBe(true);
}
const reshaped = (t: Tensor, dims: number[]) => new Tensor('float32', t.data as Float32Array, dims);

describe.each(everyVariant())('factorizedAttention on $name', ({ name, options, use }) => {
  it.each(golden)('PyTorch in float64: $name', (c) => {
    use();
    const bound = name === 'reference' ? 1e-7 : 1e-6;
    const pick = (n: Numbers) => (c.kept ? packRows(n, c.kept) : n);
    const o: Omit<FactorizedAttentionForwardOptions, 'out'> = {
      ...options,
      ...c.options,
      returnLogSumExp: true,
    };
    if (c.kept) o.tokens = keptOf(c.kept, c.q.dims);
    const cls = c.classToken;
    if (cls) {
      const [query, key, value] = [cls.query, cls.key, cls.value].map(float32);
      o.classToken = { mode: 'time-skip-space-mean', query, key, value };
    }
    const [q, k, v, g] = [c.q, c.k, c.v, c.gradOutput].map((n) => float32(pick(n)));
    const r = factorizedAttentionSync(q, k, v, o);
    expect(relativeError(r.output.data as Float32Array, pick(c.output).data)).toBeLessThanOrEqual(bound);
    const d = factorizedAttentionBackwardSync(g, q, k, v, {
      ...o,
      output: r.output,
      logSumExp: r.logSumExp as Tensor,
      gradClassToken: cls && float32(cls.gradOutput),
    });
    for (const part of ['query', 'key', 'value'] as const) {
      const expected = pick(c.gradients[part]).data;
      expect(relativeError(d[part].data as Float32Array, expected)).toBeLessThanOrEqual(5 * bound);
    }
    if (!cls) return;
    expect(relativeError(r.classToken!.data as Float32Array, cls.output.data)).toBeLessThanOrEqual(bound);
    for (const part of ['query', 'key', 'value'] as const) {
      const expected = cls.gradients[part].data;
      expect(relativeError(d.classToken![part].data as Float32Array, expected)).toBeLessThanOrEqual(
        5 * bound,
      );
    }
  });

  it('has the bits of attention on transposed copies', () => {
    use();
    const random = new Random(8);
    const [b, f, p, h, d] = name === 'reference' ? [2, 5, 6, 4, 5] : [2, 19, 33, 4, 20];
    const [q, k, v] = [4, 2, 2].map((heads) => tensor(random, [b, f, p, heads, d]));
    const run = (axis: 'joint' | 'time' | 'space', causal: boolean) =>
      factorizedAttentionSync(q, k, v, { ...options, axis, causal }).output.data;
    const whole = (x: Tensor[], dims: number[], causal: boolean) =>
      attentionSync(
        ...(x.map((t) => reshaped(t, [...dims, ...t.dims.slice(3)])) as [Tensor, Tensor, Tensor]),
        { ...options, causal },
      ).output.data;
    for (const causal of [false, true]) {
      expectSame(run('space', causal), whole([q, k, v], [b * f, p], causal));
      const time = whole([q, k, v].map(swapped), [b * p, f], causal) as Float32Array;
      const back = swapped(new Tensor('float32', time, [b, p, f, h, d]));
      expectSame(run('time', causal), back.data);
    }
    expectSame(run('joint', false), whole([q, k, v], [b, f * p], false));
    const blocks = Uint8Array.from({ length: f * f }, (_, i) => (i % f <= Math.floor(i / f) ? 1 : 0));
    const blockMask = { mask: new Tensor('uint8', blocks, [1, 1, f, f]), query: p, key: p };
    const [fq, fk, fv] = [q, k, v].map((t) => reshaped(t, [b, f * p, ...t.dims.slice(3)]));
    const blocked = attentionSync(fq, fk, fv, { ...options, blockMask }).output.data;
    expect(relativeError(run('joint', true) as Float32Array, blocked as Float32Array)).toBeLessThan(1e-6);
  });

  it('is joint attention where there is one frame or one patch', () => {
    use();
    for (const [f, p, axis] of [
      [1, 40, 'space'],
      [40, 1, 'time'],
    ] as const) {
      const random = new Random(3);
      const [q, k, v] = [0, 1, 2].map(() => tensor(random, [2, f, p, 2, 16]));
      const of = (a: 'joint' | 'time' | 'space') =>
        factorizedAttentionSync(q, k, v, { ...options, axis: a, returnLogSumExp: true });
      expect(of(axis).output.data).toEqual(of('joint').output.data);
      expect(of(axis).logSumExp!.data).toEqual(of('joint').logSumExp!.data);
      const other = of(axis === 'time' ? 'space' : 'time'); // sequences of one token
      expect(other.output.data).toEqual(v.data);
    }
  });

  it('split heads are the two axes on halves', () => {
    use();
    const random = new Random(4);
    const [q, k, v] = [4, 2, 2].map((heads) => tensor(random, [2, 5, 7, heads, 8]));
    const run = (axis: 'time' | 'space' | 'split-heads') =>
      factorizedAttentionSync(q, k, v, { ...options, axis }).output.data;
    const [both, time, space] = [run('split-heads'), run('time'), run('space')];
    for (let i = 0; i < both.length; i++)
      expect(both[i]).toBe(Math.floor(i / 8) % 4 < 2 ? time[i] : space[i]);
  });

  it('all tokens kept are dense tokens; one kept token gives its value', () => {
    use();
    const random = new Random(6);
    const [q, k, v] = [0, 1, 2].map(() => tensor(random, [2, 6, 5, 2, 8]));
    const flat = [q, k, v].map((t) => reshaped(t, [60, 2, 8]));
    const all = drawTokens(random, 2, 6, 5, 1, true);
    for (const axis of ['joint', 'time', 'space', 'split-heads'] as const) {
      const dense = factorizedAttentionSync(q, k, v, { ...options, axis }).output.data;
      const [a, b, c] = flat;
      const packed = factorizedAttentionSync(a, b, c, { ...options, axis, tokens: all }).output.data;
      expect(packed).toEqual(dense);
      const one = { indices: Int32Array.of(17), batchOffsets: Int32Array.of(0, 0, 1), frames: 6, patches: 5 };
      const [x, y, z] = [q, k, v].map((t) => new Tensor('float32', t.data.slice(0, 16), [1, 2, 8]));
      const single = factorizedAttentionSync(x, y, z, { ...options, axis, tokens: one });
      expect(single.output.data).toEqual(z.data);
    }
  });

  it('an output inside a larger tensor is filled through strides, and nothing else', () => {
    use();
    const random = new Random(9);
    const [b, f, p, h, d] = [2, 3, 4, 2, 8];
    const [q, k, v] = [0, 1, 2].map(() => tensor(random, [b, f, p, h, d]));
    const [query, key, value] = [0, 1, 2].map(() => tensor(random, [b, 1, h, d]));
    const classToken = { mode: 'time-skip-space-mean', query, key, value } as const;
    const plain = factorizedAttentionSync(q, k, v, { ...options, axis: 'space', classToken });
    const row = h * d;
    const whole = new Float32Array(b * (1 + f * p) * row + 5).fill(7);
    const batch = (1 + f * p) * row;
    const out = {
      output: {
        type: 'float32',
        data: whole.subarray(row),
        dims: [b, f, p, h, d],
      } as unknown as Tensor<'float32'>,
      classToken: { type: 'float32', data: whole, dims: [b, 1, h, d] } as unknown as Tensor<'float32'>,
    };
    factorizedAttentionSync(q, k, v, {
      ...options,
      axis: 'space',
      strides: { output: [batch, p * row, row, d, 1] },
      classToken: { ...classToken, strides: { output: [batch, row, d, 1] } },
      out,
    });
    for (let x = 0; x < b; x++) {
      const classRow = plain.classToken!.data.slice(x * row, (x + 1) * row);
      expect(whole.slice(x * batch, x * batch + row)).toEqual(classRow);
      const rows = plain.output.data.slice(x * f * p * row, (x + 1) * f * p * row);
      expect(whole.slice(x * batch + row, (x + 1) * batch)).toEqual(rows);
    }
    expect(Array.from(whole.slice(b * batch))).toEqual([7, 7, 7, 7, 7]);
  });
});

describe.each(everyVariant().slice(1))('factorizedAttention on $name, large', ({ options, use }) => {
  it('more than 65,535 sequences', () => {
    use();
    const random = new Random(2);
    const [f, p] = [2, 70_001];
    const [q, k, v] = [0, 1, 2].map(() => tensor(random, [1, f, p, 1, 2]));
    const time = factorizedAttentionSync(q, k, v, { ...options, axis: 'time' }).output.data;
    // The same sequences as frames: 70,001 of two patches.
    const [a, b, c] = [q, k, v].map(swapped);
    const space = factorizedAttentionSync(a, b, c, { ...options, axis: 'space' }).output;
    expectSame(swapped(space as Tensor).data, time);
    const last = factorizedAttentionSync(
      ...([a, b, c].map((t) => new Tensor('float32', t.data.slice(-4) as Float32Array, [1, 1, 2, 1, 2])) as [
        Tensor,
        Tensor,
        Tensor,
      ]),
      { backend: 'reference', axis: 'space' },
    ).output.data;
    expect(relativeError(space.data.slice(-4) as Float32Array, last as Float32Array)).toBeLessThan(1e-6);
  });
});
