import fc from 'fast-check';
import { describe, expect, it } from 'vitest';
import { KVCache, type KVCacheOptions, type KVCacheType } from '../../lib/attention/index.ts';
import { decodeFloats } from '../../lib/dtype.ts';
import { HeddleError, Tensor } from '../../lib/index.ts';

const HEADS = 2;
const DIM = 3;

/** A tensor of tokens whose elements name the token: exact in every type of the cache. */
function tokens(values: number[]): Tensor<'float32'> {
  const data = Float32Array.from(values.flatMap((x) => Array(HEADS * DIM).fill(x)));
  return new Tensor('float32', data, [values.length, HEADS, DIM]);
}

/** What a sequence holds, read through its page table; every head and element must agree. */
function contents(cache: KVCache, id: number): number[] {
  const { pools, table, lengths } = cache.beginRead([id]);
  cache.endRead();
  return Array.from({ length: lengths[0] }, (_, j) => {
    const page = table[Math.floor(j / pools.pageSize)];
    const seen = new Set<number>();
    for (let h = 0; h < HEADS; h++) {
      const vector = (page * HEADS + h) * pools.pageSize + (j % pools.pageSize);
      for (const [pool, scales, sign] of [
        [pools.keys, pools.keyScales, 1],
        [pools.values, pools.valueScales, -1],
      ] as const) {
        const part = pool.slice(vector * DIM, (vector + 1) * DIM);
        const numbers =
          pools.type === 'int8'
            ? Array.from(part as Int8Array, (x) => Math.round(x * scales![vector]))
            : Array.from(decodeFloats(part, pools.type));
        for (const x of numbers) seen.add(sign * x);
      }
    }
    expect(seen.size).toBe(1);
    return [...seen][0];
  });
}

function append(cache: KVCache, id: number, values: number[]): void {
  cache.append(id, tokens(values), tokens(values.map((x) => -x)));
}

describe('KVCache', () => {
  it.each(['float32', 'bfloat16', 'float16', 'int8'] as KVCacheType[])(
    'property: a random program leaves what plain arrays hold (%s)',
    (type) => {
      const step = fc.record({
        what: fc.constantFrom('create', 'append', 'append', 'append', 'fork', 'truncate', 'free'),
        which: fc.nat(100),
        count: fc.nat(9),
      });
      fc.assert(
        fc.property(
          fc.integer({ min: 1, max: 5 }),
          fc.array(step, { maxLength: 60 }),
          (pageSize, program) => {
            const pages = 12;
            const cache = new KVCache({ keyHeads: HEADS, headDim: DIM, type, pageSize, pages });
            const model = new Map<number, number[]>();
            let next = 1;
            for (const { what, which, count } of program) {
              const ids = [...model.keys()];
              const id = ids[which % Math.max(1, ids.length)];
              if (what === 'create' || ids.length === 0) {
                model.set(cache.create(), []);
              } else if (what === 'append') {
                const values = Array.from({ length: count }, () => next++ % 100);
                try {
                  append(cache, id, values);
                  model.get(id)!.push(...values);
                } catch (error) {
                  // Full: nothing has changed.
                  expect((error as HeddleError).code).toBe('ERR_MEMORY');
                }
              } else if (what === 'fork') {
                model.set(cache.fork(id), model.get(id)!.slice());
              } else if (what === 'truncate') {
                const length = Math.min(count, model.get(id)!.length);
                cache.truncate(id, length);
                model.get(id)!.length = length;
              } else {
                cache.free(id);
                model.delete(id);
              }
              for (const [s, values] of model) {
                expect(cache.length(s)).toBe(values.length);
                expect(contents(cache, s)).toEqual(values);
              }
            }
            for (const s of model.keys()) cache.free(s);
            expect(cache.freePages).toBe(pages);
          },
        ),
        { numRuns: 60 },
      );
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

  it('an int8 vector with a NaN is NaN; zeros stay zeros', () => {
    const cache = new KVCache({ keyHeads: 1, headDim: 2, type: 'int8', pageSize: 4, pages: 1 });
    const id = cache.create();
    const k = new Tensor('float32', Float32Array.from([0, 0, 1, NaN]), [2, 1, 2]);
    cache.append(id, k, k);
    const { pools } = cache.beginRead([id]);
    cache.endRead();
    expect(Array.from(pools.keyScales!.slice(0, 2))).toEqual([0, NaN]);
    expect(Array.from(pools.keys.slice(0, 2) as Int8Array)).toEqual([0, 0]);
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
