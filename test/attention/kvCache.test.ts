import { describe, expect, it } from 'vitest';
import { KVCache, type KVCacheOptions, type KVCacheType } from '../../lib/attention/index.ts';
import { HeddleError, Tensor } from '../../lib/index.ts';
import { expectThrow } from '../helpers/errors.ts';
import { append, checkRandomPrograms, contents, DIM, HEADS, tokens } from '../helpers/kvCache.ts';

describe('KVCache', () => {
  const types: KVCacheType[] = ['float32', 'bfloat16', 'float16', 'int8', 'int4'];
  const kinds = types.flatMap((type): [KVCacheType, number | undefined][] => [
    [type, undefined],
    [type, 0],
    [type, 3],
    [type, 9],
  ]);
  it.each(kinds)(
    'property: a random program leaves what plain arrays hold (%s, window %s)',
    (type, window) => {
      checkRandomPrograms(type, window, 'cpu', 60);
    },
  );

  it('forks share pages until one writes', () => {
    const cache = new KVCache({ keyHeads: HEADS, headDim: DIM, pageSize: 4, pages: 4 });
    const a = cache.create();
    append(cache, a, [1, 2, 3, 4, 5]);
    const b = cache.fork(a);
    expect(cache.freePages).toBe(2);
    append(cache, b, [6]);
    expect(cache.freePages).toBe(1);
    append(cache, a, [7]);
    expect(cache.freePages).toBe(1);
    expect(contents(cache, a)).toEqual([1, 2, 3, 4, 5, 7]);
    expect(contents(cache, b)).toEqual([1, 2, 3, 4, 5, 6]);
  });

  it('maxBytes bounds the memory', () => {
    const cache = new KVCache({ keyHeads: 2, headDim: 8, pageSize: 16, maxBytes: 10_000 });
    expect(cache.pages).toBe(4); // 2 heads x 16 slots x (8 + 8) x 4 bytes a page
    expect(cache.bytes).toBe(8192);
    const int8 = new KVCache({ keyHeads: 2, headDim: 8, pageSize: 16, type: 'int8', pages: 1 });
    expect(int8.bytes).toBe(2 * 16 * (16 + 8));
  });

  it.each(['int8', 'int4'] as const)(
    'an %s vector with a NaN or an infinity is NaN; zeros stay zeros',
    (type) => {
      const cache = new KVCache({ keyHeads: 1, headDim: 2, type, pageSize: 4, pages: 1 });
      const id = cache.create();
      const k = new Tensor('float32', Float32Array.from([0, 0, 1, NaN, -Infinity, 1]), [3, 1, 2]);
      cache.append(id, k, k);
      const { keys, values } = cache.read(id, 0, 3);
      for (const t of [keys, values]) expect(Array.from(t.data)).toEqual([0, 0, NaN, NaN, NaN, NaN]);
    },
  );

  it('int8 and int4 are symmetric, with a scale per token and head', () => {
    for (const [type, top] of [
      ['int8', 127],
      ['int4', 7],
    ] as const) {
      const cache = new KVCache({ keyHeads: 2, headDim: 4, type, pages: 1 });
      const id = cache.create();
      const data = Float32Array.from([1.1, -2, 0.3, 1.9, 100, -52, 3, 7]);
      cache.append(id, new Tensor('float32', data, [1, 2, 4]), new Tensor('float32', data, [1, 2, 4]));
      const { keys, values } = cache.read(id, 0, 1);
      expect(values.data).toEqual(keys.data);
      for (const [i, x] of data.entries()) {
        const step = (i < 4 ? 2 : 100) / top;
        expect(keys.data[i]).toBeCloseTo(Math.round(x / step) * step, 5);
      }
    }
    expect(new KVCache({ keyHeads: 2, headDim: 64, pageSize: 16, type: 'int4', pages: 1 }).bytes).toBe(
      2 * 16 * (64 + 8),
    );
  });

  it.each(['int8', 'int4'] as const)(
    'scales of %s vectors are never negative: decoding relies on it',
    (type) => {
      const cache = new KVCache({ keyHeads: 2, headDim: 4, type, pageSize: 4, pages: 1 });
      const id = cache.create();
      const rows = [
        [-3, -2, -1, -5],
        [0, -0, 0, -0],
        [-1e-30, 0, 0, 0],
        [1, -2, 3, -4],
      ];
      const x = new Tensor('float32', Float32Array.from(rows.flatMap((r) => [...r, ...r])), [4, 2, 4]);
      cache.append(id, x, x);
      const { pools } = cache.beginRead([id]);
      for (const scales of [pools.keyScales, pools.valueScales] as Float32Array[]) {
        expect(scales.some((s) => s > 0)).toBe(true);
        expect(scales.every((s) => s >= 0 && !Object.is(s, -0))).toBe(true);
      }
    },
  );

  it('a window bounds the memory while positions go on counting', () => {
    const cache = new KVCache({ keyHeads: HEADS, headDim: DIM, pageSize: 4, pages: 5, window: 10 });
    const id = cache.create();
    for (let i = 0; i < 1000; i++) append(cache, id, [i % 100, (i + 1) % 100]);
    expect(cache.length(id)).toBe(2000);
    expect(cache.start(id)).toBe(1988); // the token at 1998 sees from there on
    expect(contents(cache, id).slice(0, 2)).toEqual([94, 95]);
    cache.truncate(id, 1999);
    expectThrow(() => cache.truncate(id, 1997), 'ERR_VALUE', /needs keys from 1987 on.* from 1988 on/);
    expect(cache.length(id)).toBe(1999);
    cache.truncate(id, 0);
    expect([cache.start(id), cache.freePages]).toEqual([0, 5]);
  });

  it('what a running decode reads is not written over after a cut', async () => {
    const cache = new KVCache({ keyHeads: HEADS, headDim: DIM, pageSize: 4, pages: 2 });
    const id = cache.create();
    append(cache, id, [1, 2, 3]);
    const { pools } = cache.beginRead([id]);
    const before = pools.keys.slice();
    cache.truncate(id, 1);
    append(cache, id, [9]);
    expect(contents(cache, id)).toEqual([1, 9]);
    expect(pools.keys.slice(0, before.length / 2)).toEqual(before.slice(0, before.length / 2));
    cache.endRead();
    expect(cache.freePages).toBe(1);
  });

  const good: KVCacheOptions = { keyHeads: HEADS, headDim: DIM, pages: 2, pageSize: 4 };
  const cache = new KVCache(good);
  const id = cache.create();
  const freed = cache.create();
  cache.free(freed);
  const disposed = new KVCache(good);
  disposed.dispose();
  const two = tokens([1, 2]);
  const cases: [string, () => unknown, string, RegExp][] = [
    ['no options', () => new KVCache(undefined as never), 'ERR_OPTION', /^keyHeads/],
    ['unknown option', () => new KVCache({ ...good, heads: 2 } as never), 'ERR_OPTION', /heads/],
    ['no size', () => new KVCache({ keyHeads: 1, headDim: 1 }), 'ERR_OPTION', /pages or maxBytes/],
    ['two sizes', () => new KVCache({ ...good, maxBytes: 1e6 }), 'ERR_OPTION', /pages or maxBytes/],
    [
      'less than a page',
      () => new KVCache({ ...good, pages: undefined, maxBytes: 10 }),
      'ERR_OPTION',
      /^maxBytes/,
    ],
    ['type', () => new KVCache({ ...good, type: 'float64' as never }), 'ERR_OPTION', /^type/],
    ['head dim', () => new KVCache({ ...good, headDim: 513 }), 'ERR_OPTION', /^headDim/],
    ['window', () => new KVCache({ ...good, window: -1 }), 'ERR_OPTION', /^window/],
    ['device', () => new KVCache({ ...good, device: 'gpu' as never }), 'ERR_OPTION', /^device.*cpu, cuda/],
    ['read beyond', () => cache.read(id, 0, 1), 'ERR_OPTION', /^end/],
    ['page size', () => new KVCache({ ...good, pageSize: 0 }), 'ERR_OPTION', /^pageSize/],
    [
      'memory',
      () => new KVCache({ keyHeads: 65536, headDim: 512, pages: 2 ** 30 }),
      'ERR_MEMORY',
      /allocate/,
    ],
    ['freed', () => cache.append(freed, two, two), 'ERR_ARGUMENT', /sequence 1 does not exist/],
    ['freed twice', () => cache.free(freed), 'ERR_ARGUMENT', /sequence 1 does not exist/],
    ['never created', () => cache.length(99), 'ERR_ARGUMENT', /sequence 99/],
    [
      'k dims',
      () => cache.append(id, Tensor.zeros('float32', [2, 1, 3]), two),
      'ERR_SHAPE',
      /^k: expected \[tokens, 2, 3\]/,
    ],
    ['v tokens', () => cache.append(id, two, tokens([1])), 'ERR_SHAPE', /^v: expected 2 tokens/],
    ['v type', () => cache.append(id, two, Tensor.zeros('int8', [2, 2, 3])), 'ERR_DTYPE', /^v/],
    ['truncate beyond the end', () => cache.truncate(id, 1), 'ERR_OPTION', /^length/],
    [
      'exhausted',
      () => cache.append(id, tokens(Array(9).fill(1)), tokens(Array(9).fill(1))),
      'ERR_MEMORY',
      /need 3 pages, 2 are free/,
    ],
    ['disposed', () => disposed.create(), 'ERR_DISPOSED', /dispose/],
  ];
  it.each(cases)('refuses: %s', (_, call, code, message) => {
    let error: unknown;
    try {
      call();
    } catch (e) {
      error = e;
    }
    expect(error).toBeInstanceOf(HeddleError);
    expect((error as HeddleError).message).toMatch(message);
    expect((error as HeddleError).code).toBe(code);
    expect(cache.freePages).toBe(2);
  });
});
