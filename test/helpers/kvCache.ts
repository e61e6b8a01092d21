import fc from 'fast-check';
import { expect } from 'vitest';
import { KVCache, type KVCacheType } from '../../lib/attention/index.ts';
import { type HeddleError, Tensor } from '../../lib/index.ts';
import { expectThrow } from './errors.ts';

export const HEADS = 2;
export const DIM = 3;

/** A tensor of tokens whose elements name the token: exact in every type of the cache. */
export function tokens(values: number[]): Tensor<'float32'> {
  const data = Float32Array.from(values.flatMap((x) => Array(HEADS * DIM).fill(x)));
  return new Tensor('float32', data, [values.length, HEADS, DIM]);
}

/** What a sequence holds from its start on; every head and element must agree. */
export function contents(cache: KVCache, id: number): number[] {
  const from = cache.start(id);
  const { keys, values } = cache.read(id, from, cache.length(id));
  return Array.from({ length: keys.dims[0] }, (_, j) => {
    const seen = new Set<number>();
    for (let i = j * HEADS * DIM; i < (j + 1) * HEADS * DIM; i++) {
      // The scales of integers are rounded.
      seen.add(Math.fround(Math.round(keys.data[i] * 1000) / 1000));
      seen.add(Math.fround(-Math.round(values.data[i] * 1000) / 1000));
    }
    expect(seen.size).toBe(1);
    return [...seen][0] + 0;
  });
}

export function append(cache: KVCache, id: number, values: number[]): void {
  cache.append(id, tokens(values), tokens(values.map((x) => -x)));
}

/** Random programs must leave what plain arrays hold. */
export function checkRandomPrograms(
  type: KVCacheType,
  window: number | undefined,
  device: 'cpu' | 'cuda',
  numRuns: number,
): void {
  const step = fc.record({
    what: fc.constantFrom('create', 'append', 'append', 'append', 'fork', 'truncate', 'free'),
    which: fc.nat(100),
    count: fc.nat(20),
  });
  fc.assert(
    fc.property(fc.integer({ min: 1, max: 5 }), fc.array(step, { maxLength: 60 }), (pageSize, program) => {
      const pages = 12;
      const cache = new KVCache({ keyHeads: HEADS, headDim: DIM, type, pageSize, pages, window, device });
      const model = new Map<number, number[]>();
      /** Where a sequence must begin: nothing that the last append's first token saw is missing. */
      const starts = new Map<number, number>();
      const startFor = (length: number) =>
        window === undefined ? 0 : Math.floor(Math.max(0, length - window) / pageSize) * pageSize;
      let next = 1;
      for (const { what, which, count } of program) {
        const ids = [...model.keys()];
        const id = ids[which % Math.max(1, ids.length)];
        if (what === 'create' || ids.length === 0) {
          const created = cache.create();
          model.set(created, []);
          starts.set(created, 0);
        } else if (what === 'append') {
          const values = Array.from({ length: count }, () => next++ % 100);
          const before = cache.freePages;
          try {
            append(cache, id, values);
            const length = model.get(id)!.length;
            if (count > 0) starts.set(id, Math.max(starts.get(id)!, startFor(length)));
            model.get(id)!.push(...values);
          } catch (error) {
            // Full: nothing has changed.
            expect((error as HeddleError).code).toBe('ERR_MEMORY');
            expect(cache.freePages).toBe(before);
          }
        } else if (what === 'fork') {
          const forked = cache.fork(id);
          model.set(forked, model.get(id)!.slice());
          starts.set(forked, starts.get(id)!);
        } else if (what === 'truncate') {
          const old = model.get(id)!.length;
          const length = Math.max(0, old - count);
          const needs = Math.max(0, length - (window ?? Infinity));
          if (length > 0 && length < old && needs < starts.get(id)!) {
            expectThrow(() => cache.truncate(id, length), 'ERR_VALUE', /^length: .* needs keys from/);
          } else {
            cache.truncate(id, length);
            model.get(id)!.length = length;
            if (length === 0) starts.set(id, 0);
          }
        } else {
          cache.free(id);
          model.delete(id);
          starts.delete(id);
        }
        for (const [s, values] of model) {
          expect(cache.length(s)).toBe(values.length);
          expect(cache.start(s)).toBe(starts.get(s));
          expect(contents(cache, s)).toEqual(values.slice(starts.get(s)));
        }
      }
      for (const s of model.keys()) cache.free(s);
      expect(cache.freePages).toBe(pages);
      cache.dispose();
    }),
    { numRuns },
  );
}
