import { describe, expect, it } from 'vitest';
import type { AttentionOptions } from '../../lib/attention/index.ts';
import {
  attentionSync,
  factorizedAttention,
  factorizedAttentionSync,
  maskTokens,
} from '../../lib/attention/index.ts';
import { cudaMemory } from '../../lib/device.ts';
import { decodeFloats, encodeFloats, type FloatType } from '../../lib/dtype.ts';
import { type DTypeArrays, Tensor } from '../../lib/index.ts';
import { Random } from '../cases/random.ts';
import { hasCuda } from '../helpers/cuda.ts';
import { expectThrow } from '../helpers/errors.ts';

const TYPES = ['float32', 'bfloat16', 'float16'] as const;
const HALVES = ['bfloat16', 'float16'] as const;
const random = new Random(23);

function draw<T extends FloatType>(type: T, dims: number[]): Tensor<T> {
  const count = dims.reduce((a, b) => a * b, 1);
  return new Tensor(type, encodeFloats(random.normals(count), type) as DTypeArrays[T], dims);
}
const bytes = (t: Tensor) => Buffer.from(t.data.buffer, t.data.byteOffset, t.data.byteLength);
const numbers = (t: Tensor<FloatType>) => decodeFloats(t.data, t.type);

/** Largest difference, in units of the largest number expected. */
function difference(actual: Tensor<FloatType>, expected: Tensor<FloatType>): number {
  const [x, y] = [numbers(actual), numbers(expected)];
  expect(x.length).toBe(y.length);
  let [worst, size] = [0, 0];
  y.forEach((value, i) => {
    // Written so that NaN counts as a difference.
    if (!(Math.abs(x[i] - value) <= worst)) worst = Math.abs(x[i] - value);
    size = Math.max(size, Math.abs(value));
  });
  return size === 0 ? worst : worst / size;
}
const TOLERANCE = { bfloat16: 1e-2, float16: 2e-3 };

/** Positions [begin, begin + count) of one batch entry. */
function part<T extends FloatType>(t: Tensor<T>, begin: number, count: number): Tensor<T> {
  const row = t.size / t.dims[1];
  const data = t.data.slice(begin * row, (begin + count) * row) as DTypeArrays[T];
  return new Tensor(t.type, data, [1, count, ...t.dims.slice(2)]);
}

describe.skipIf(!hasCuda())('cuda, sequences of up to 64 keys', () => {
  const shapes: [name: string, sizes: number[], options: (heads: number, q: number, k: number) => object][] =
    [
      // queries, keys, heads, key heads, dim, value dim
      ['16 keys', [16, 16, 3, 3, 64, 64], () => ({})],
      ['17 keys, causal', [17, 17, 4, 2, 64, 32], () => ({ causal: true })],
      ['32 keys, window', [32, 32, 2, 1, 128, 128], () => ({ window: [5, 2] })],
      ['33 keys, odd sizes', [9, 33, 3, 1, 20, 36], () => ({ causal: true })],
      [
        '64 keys, ALiBi, sinks, softcap',
        [64, 64, 2, 2, 72, 40],
        (h) => ({ softcap: 2, sinks: random.normals(h), alibiSlopes: random.normals(h) }),
      ],
      ['64 keys, more rows than a part', [150, 64, 6, 2, 16, 16], () => ({})],
      ['bias', [13, 40, 2, 2, 64, 64], (h, q, k) => ({ bias: draw('float32', [1, h, q, k]) })],
      [
        'more queries than keys, causal, uniform',
        [20, 7, 2, 1, 24, 24],
        () => ({ causal: true, emptyRows: 'uniform' }),
      ],
      ['one key', [3, 1, 1, 1, 8, 8], () => ({})],
      ['negative scale', [5, 18, 1, 1, 8, 8], () => ({ scale: -0.3 })],
    ];
  for (const type of HALVES) {
    it.each(shapes)(`are right: %s (${type})`, (_, [queries, keys, heads, keyHeads, dim, valueDim], make) => {
      const q = draw(type, [3, queries, heads, dim]);
      const k = draw(type, [3, keys, keyHeads, dim]);
      const v = draw(type, [3, keys, keyHeads, valueDim]);
      const options = { ...(make(heads, queries, keys) as AttentionOptions), returnLogSumExp: true } as const;
      const actual = attentionSync(q, k, v, { ...options, backend: 'cuda' });
      const expected = attentionSync(q, k, v, { ...options, backend: 'reference' });
      expect(difference(actual.output, expected.output)).toBeLessThan(TOLERANCE[type]);
      actual.logSumExp!.data.forEach((x, i) => {
        const y = expected.logSumExp!.data[i];
        expect(x === y || Math.abs(x - y) < 1e-4 * Math.max(1, Math.abs(y)), `${x} ${y}`).toBe(true);
      });
    });

    it(`have the same bits alone and beside longer ones: ${type}`, () => {
      const lengths = [70, 1, 31, 0, 64, 65, 17];
      const offsets = Int32Array.from([0, ...lengths], (_, i) =>
        lengths.slice(0, i).reduce((a, b) => a + b, 0),
      );
      const total = offsets[lengths.length];
      const q = draw(type, [1, total, 4, 64]);
      const [k, v] = [0, 1].map(() => draw(type, [1, total, 2, 64]));
      const shared = { causal: true, backend: 'cuda' } as const;
      const packed = attentionSync(q, k, v, { ...shared, segments: { query: offsets, key: offsets } }).output;
      lengths.forEach((length, i) => {
        const cut = <T extends FloatType>(t: Tensor<T>) => part(t, offsets[i], length);
        const alone = attentionSync(cut(q), cut(k), cut(v), shared).output;
        expect(bytes(alone).equals(bytes(cut(packed))), `sequence ${i}`).toBe(true);
      });
    });

    it(`let nothing through that is not seen, and everything that is: ${type}`, () => {
      const dims = [1, 40, 2, 32];
      const [q, k, v] = [0, 1, 2].map(() => draw(type, dims));
      const spoiled = (value: number) => {
        const x = numbers(v);
        x.fill(value, 20 * 64, 21 * 64); // key 20: queries 20 to 39
        return new Tensor(type, encodeFloats(x, type) as DTypeArrays[typeof type], dims);
      };
      const run = (values: Tensor<FloatType>) =>
        numbers(attentionSync(q, k, values, { causal: true, backend: 'cuda' }).output);
      const clean = run(v);
      for (const value of [Number.NaN, Number.POSITIVE_INFINITY]) {
        const x = run(spoiled(value));
        expect(x.slice(1280)).toEqual(new Float32Array(1280).fill(value));
        clean.slice(0, 1280).forEach((y, i) => {
          expect(Math.abs(x[i] - y)).toBeLessThan(TOLERANCE[type] * 4);
        });
      }
    });
  }

  it('may be more than 65,535', () => {
    // Most of them empty, so that the host shim has little to do.
    const tokens = maskTokens({ frames: 2, patches: 70_000, ratio: 0.99, seed: 1 });
    const count = tokens.indices.length;
    expect(tokens.indices.some((i) => i % 70_000 > 65_535)).toBe(true);
    const [q, k, v] = [0, 1, 2].map(() => draw('bfloat16', [count, 1, 8]));
    const run = (backend: 'cuda' | 'reference') =>
      factorizedAttentionSync(q, k, v, { axis: 'time', tokens, backend }).output;
    expect(difference(run('cuda'), run('reference'))).toBeLessThan(TOLERANCE.bfloat16);
  });
});

describe.skipIf(!hasCuda())('cuda, factorizedAttention', () => {
  it.each(TYPES)('computes on the device with the bits of host tensors: %s', async (type) => {
    const before = cudaMemory();
    const q = draw(type, [2, 3, 5, 4, 16]);
    const [k, v] = [0, 1].map(() => draw(type, [2, 3, 5, 2, 16]));
    const cq = draw(type, [2, 1, 4, 16]);
    const [ck, cv] = [0, 1].map(() => draw(type, [2, 1, 2, 16]));
    const shared = { axis: 'space', sinks: random.normals(4), returnLogSumExp: true } as const;
    const mode = 'time-skip-space-mean';
    const classToken = { mode, query: cq, key: ck, value: cv } as const;
    const expected = factorizedAttentionSync(q, k, v, { ...shared, classToken, backend: 'cuda' });
    const moved = await Promise.all([q, k, v, cq, ck, cv].map((t) => t.to('cuda')));
    const [dq, dk, dv, dcq, dck, dcv] = moved;
    const onDevice = { ...shared, classToken: { mode, query: dcq, key: dck, value: dcv } } as const;
    const fresh = await factorizedAttention(dq, dk, dv, onDevice);
    const out = factorizedAttentionSync(dq, dk, dv, onDevice);
    factorizedAttentionSync(dq, dk, dv, { ...onDevice, sinks: undefined, out }); // something else in it
    const again = factorizedAttentionSync(dq, dk, dv, { ...onDevice, out });
    for (const name of ['output', 'logSumExp', 'classToken'] as const) {
      for (const result of [fresh, again]) {
        expect(result[name]!.location).toBe('cuda');
        const host: Tensor = await result[name]!.to('cpu');
        expect(bytes(host).equals(bytes(expected[name] as Tensor)), name).toBe(true);
      }
    }
    for (const t of [...moved, ...Object.values(fresh), ...Object.values(out)]) t.dispose();
    expect(cudaMemory().live).toBe(before.live);
  });

  it.each(TYPES)('has the same bits for all tokens and for tokens of which all are kept: %s', (type) => {
    const [batch, frames, patches] = [2, 4, 17];
    const tokens = maskTokens({ batch, frames, patches, ratio: 0, seed: 1 });
    const dense = [0, 1, 2].map(() => draw(type, [batch, frames, patches, 2, 16]));
    const [q, k, v] = dense.map((t) => new Tensor(t.type, t.data, [batch * frames * patches, 2, 16]));
    for (const axis of ['joint', 'time', 'space', 'split-heads'] as const) {
      const options = { axis, backend: 'cuda' } as const;
      const packed = factorizedAttentionSync(q, k, v, { ...options, tokens }).output;
      const expected = factorizedAttentionSync(dense[0], dense[1], dense[2], options).output;
      expect(bytes(packed).equals(bytes(expected)), axis).toBe(true);
    }
  });

  it('wants all tensors in one place', () => {
    const [q, k, v] = [0, 1, 2].map(() => draw('float32', [1, 2, 3, 1, 4]));
    const device = q.toSync('cuda');
    expectThrow(
      () => factorizedAttentionSync(device, k, v, { axis: 'time' }),
      'ERR_ARGUMENT',
      /^factorizedAttention: q is on cuda but k is on cpu/,
    );
    expectThrow(
      () => factorizedAttentionSync(q, k, v, { axis: 'time', out: { output: device } }),
      'ERR_ARGUMENT',
      /^factorizedAttention: out.output is on cuda but q is on cpu/,
    );
    device.dispose();
  });
});
