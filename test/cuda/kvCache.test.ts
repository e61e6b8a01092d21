import { afterEach, describe, expect, it } from 'vitest';
import {
  decodeAttention,
  decodeAttentionSync,
  KVCache,
  type KVCacheOptions,
  type KVCacheType,
} from '../../lib/attention/index.ts';
import { type PageLayout, pageLayout, readElement } from '../../lib/attention/kvLayout.ts';
import { cudaMemory, setCudaMemoryLimit } from '../../lib/device.ts';
import { encodeFloats, type FloatType } from '../../lib/dtype.ts';
import { Tensor } from '../../lib/index.ts';
import type { TypedArray } from '../../lib/tensor.ts';
import { decodeShapes, prepareShape } from '../cases/attention/decodeAttention.ts';
import { sameBits } from '../cases/case.ts';
import { Random } from '../cases/random.ts';
import { hasCuda } from '../helpers/cuda.ts';
import { expectRejection, expectThrow } from '../helpers/errors.ts';
import { append, checkRandomPrograms, contents, DIM, HEADS, tokens } from '../helpers/kvCache.ts';
import { requireDist, root, runCommand } from '../helpers/program.ts';

const random = new Random(11);
const draw = (...dims: number[]) =>
  new Tensor('float32', random.normals(dims.reduce((a, b) => a * b, 1)), dims);
const types: KVCacheType[] = ['float32', 'bfloat16', 'float16', 'int8', 'int4'];

/** Nothing may be in use that was not before. */
async function withoutLeak(run: () => unknown) {
  const before = cudaMemory();
  await run();
  const { live, liveBlocks, jobs } = cudaMemory();
  expect({ live, liveBlocks, jobs }).toEqual({
    live: before.live,
    liveBlocks: before.liveBlocks,
    jobs: before.jobs,
  });
}

describe.skipIf(!hasCuda())('decodeAttention with a cache on cuda: the bits of one on the host', () => {
  const small = decodeShapes.filter((s) => !s.bench);
  it.each(small.map((s, i) => [s.name, s.cache ?? 'float32', i] as const))('%s, %s', (_, __, index) =>
    withoutLeak(async () => {
      const there = prepareShape(small[index], new Random(index), 'cuda');
      const here = prepareShape(small[index], new Random(index));
      const expected = here.run({ backend: 'cuda' });
      expect(sameBits(there.run({}), expected)).toBe(true);
      expect(sameBits(await there.runAsync({ backend: 'cuda' }), expected)).toBe(true);
      there.dispose?.();
      here.dispose?.();
    }),
  );
});

describe.skipIf(!hasCuda())('KVCache on cuda', () => {
  afterEach(() => setCudaMemoryLimit(0));

  it.each(types.flatMap((type) => [undefined, 0, 9].map((window) => [type, window] as const)))(
    'property: a random program leaves what plain arrays hold (%s, window %s)',
    (type, window) => withoutLeak(() => checkRandomPrograms(type, window, 'cuda', 30)),
  );

  /** Elements without their scales, and the scales, of the tokens of a sequence of one page table. */
  async function stored(cache: KVCache, id: number) {
    const { pools, table, lengths } = cache.beginRead([id]);
    cache.endRead();
    const array = async (data: TypedArray | null, type: 'int8' | 'uint8' | 'float32' | FloatType) => {
      if (data === null || cache.device === 'cpu') return data;
      const t = new Tensor('int32', new Int32Array(0), [0]).reshape([0]);
      Object.assign(t, { type, data, dims: [data.length] });
      return (await t.to('cpu')).data as TypedArray;
    };
    const element = cache.type === 'int4' ? 'uint8' : cache.type;
    const part = async (l: PageLayout, data: TypedArray, scales: TypedArray | null) => {
      const pool = (await array(data, element)) as TypedArray;
      const factors = await array(scales, 'float32');
      const out: number[] = [];
      for (let at = 0; at < lengths[0]; at++) {
        for (let h = 0; h < cache.keyHeads; h++) {
          const vector = table[Math.floor(at / cache.pageSize)] * cache.keyHeads + h;
          const slot = at % cache.pageSize;
          if (factors !== null) out.push(factors[vector * l.slots + slot] as number);
          for (let e = 0; e < l.dim; e++) out.push(readElement(l, pool, vector * l.size, slot, e));
        }
      }
      return out;
    };
    return [
      await part(pageLayout(cache.type, cache.headDim, cache.pageSize, false), pools.keys, pools.keyScales),
      await part(
        pageLayout(cache.type, cache.valueDim, cache.pageSize, true),
        pools.values,
        pools.valueScales,
      ),
    ];
  }

  it.each(
    types.flatMap((type) =>
      (['float32', 'bfloat16', 'float16'] as const).map((from) => [type, from] as const),
    ),
  )('stores the bits of a cache on the host: %s from %s', (type, from) =>
    withoutLeak(async () => {
      const common = { keyHeads: 3, headDim: 37, valueDim: 22, type, pageSize: 7, pages: 12 };
      const [here, there] = [new KVCache(common), new KVCache({ ...common, device: 'cuda' })];
      const [a, b] = [here.create(), there.create()];
      const made = (dim: number, n: number) => {
        const x = random.normals(n * 3 * dim);
        // Halves between two integers, zeros, tiny and huge values, and those that are not finite.
        for (let i = 0; i < dim; i++) x[i] = (i - 18) / 2;
        x[0] = type === 'int4' ? 7 : 127;
        x.fill(0, dim, 2 * dim);
        x[2 * dim] *= 1e4;
        if (n > 2) {
          x.fill(1e-45, 3 * dim, 4 * dim);
          x[4 * dim] = Number.NaN;
          x[5 * dim + 1] = Number.NEGATIVE_INFINITY;
        }
        return new Tensor(from, encodeFloats(x, from) as never, [n, 3, dim]);
      };
      for (const n of [1, 1, 9, 4, 30, 2]) {
        const [k, v] = [made(37, n), made(22, n)];
        here.append(a, k, v);
        const device =
          n === 9 ? [await k.to('cuda'), await v.to('cuda')] : [k, n === 4 ? await v.to('cuda') : v];
        there.append(b, device[0], device[1]);
        for (const t of device) t.dispose();
      }
      expect(await stored(there, b)).toEqual(await stored(here, a));
      expect(there.read(b, 3, 40)).toEqual(here.read(a, 3, 40));
      there.dispose();
    }),
  );

  it('q and results stay on the device; q on the host gets results there', () =>
    withoutLeak(async () => {
      const cache = new KVCache({ keyHeads: 2, headDim: 16, type: 'bfloat16', pages: 3, device: 'cuda' });
      const id = cache.create();
      cache.append(id, draw(100, 2, 16), draw(100, 2, 16));
      const q = draw(1, 2, 4, 16);
      const expected = decodeAttentionSync(q, cache, { sequences: [id], returnLogSumExp: true });
      expect(expected.output.location).toBe('cpu');
      const there = await q.to('cuda');
      // Nothing but the partial results, the numbers of the problem and the table: no room for copies of the pages.
      const out = await decodeAttention(there, cache, { sequences: [id], returnLogSumExp: true });
      expect([out.output.location, out.logSumExp!.location]).toEqual(['cuda', 'cuda']);
      const again = decodeAttentionSync(there, cache, { sequences: [id], out });
      expect(again.output).toBe(out.output);
      expect((await out.output.to('cpu')).data).toEqual(expected.output.data);
      expect((await out.logSumExp!.to('cpu')).data).toEqual(expected.logSumExp!.data);
      for (const t of [there, out.output, out.logSumExp!, cache]) t.dispose();
    }));

  it('pages are not copied by a decode', () =>
    withoutLeak(async () => {
      const cache = new KVCache({ keyHeads: 2, headDim: 64, pages: 60, device: 'cuda' });
      const id = cache.create();
      cache.append(id, draw(64, 2, 64), draw(64, 2, 64));
      const { live } = cudaMemory();
      expect(live).toBeGreaterThanOrEqual(cache.bytes);
      setCudaMemoryLimit(live + 40_000); // pages: 3.9 MB, the one in use 65,536 bytes
      const r = decodeAttentionSync(draw(1, 1, 2, 64), cache, { sequences: [id] });
      expect(r.output.size).toBe(128);
      cache.dispose();
    }));

  it('a running decode keeps what it reads', () =>
    withoutLeak(async () => {
      const cache = new KVCache({ keyHeads: 1, headDim: 16, pageSize: 16, pages: 14, device: 'cuda' });
      const id = cache.create();
      cache.append(id, draw(199, 1, 16), draw(199, 1, 16));
      const q = draw(1, 1, 2, 16);
      const expected = decodeAttentionSync(q, cache, { sequences: [id] }).output.data;
      const cut = decodeAttention(q, cache, { sequences: [id] });
      cache.truncate(id, 195);
      cache.append(id, draw(3, 1, 16), draw(3, 1, 16));
      const freed = cache.fork(id);
      cache.free(id);
      expect((await cut).output.data).toEqual(expected);
      const last = decodeAttentionSync(q, cache, { sequences: [freed] }).output.data;
      expect(last).not.toEqual(expected);
      const running = decodeAttention(q, cache, { sequences: [freed] });
      cache.dispose();
      expect((await running).output.data).toEqual(last);
    }));

  it.each([false, true])(
    'is counted, bounded and freed; an append without memory changes nothing (fork: %s)',
    (shared) =>
      withoutLeak(() => {
        const options: KVCacheOptions = {
          keyHeads: HEADS,
          headDim: DIM,
          pageSize: 4,
          pages: shared ? 5 : 3,
          window: 4,
        };
        const { live } = cudaMemory();
        const cache = new KVCache({ ...options, type: 'int8', device: 'cuda' });
        expect(cudaMemory().live - live).toBeGreaterThanOrEqual(cache.bytes);
        const id = cache.create();
        append(cache, id, [1, 2, 3, 4, 5, 6, 7, 8, 9]);
        const fork = shared ? cache.fork(id) : -1;
        const before = [contents(cache, id), cache.start(id), cache.freePages];
        setCudaMemoryLimit(1);
        // The append would give a page back, copy the last one where it is shared, and take new ones.
        for (let i = 0; i < 3; i++) {
          expectThrow(
            () => append(cache, id, [10, 11, 12, 13]),
            'ERR_MEMORY',
            /^kvAppend: not enough memory/,
          );
        }
        expectThrow(
          () => new KVCache({ ...options, device: 'cuda' }),
          'ERR_MEMORY',
          /cannot allocate .* on cuda.*limit 1/,
        );
        setCudaMemoryLimit(0);
        expect([contents(cache, id), cache.start(id), cache.freePages]).toEqual(before);
        append(cache, id, [10, 11, 12, 13]);
        expect(contents(cache, id)).toEqual([5, 6, 7, 8, 9, 10, 11, 12, 13]);
        if (shared) expect(contents(cache, fork)).toEqual(before[0]);
        cache.dispose();
        cache.dispose();
        expectThrow(() => cache.create(), 'ERR_DISPOSED', /dispose/);
      }),
  );

  it('refuses what is on another device', () =>
    withoutLeak(async () => {
      const common = { keyHeads: HEADS, headDim: DIM, pages: 2 };
      const [here, there] = [new KVCache(common), new KVCache({ ...common, device: 'cuda' })];
      expect([here.device, there.device]).toEqual(['cpu', 'cuda']);
      const [a, b] = [here.create(), there.create()];
      const t = tokens([1]);
      const d = await t.to('cuda');
      expectThrow(() => here.append(a, t, d), 'ERR_ARGUMENT', /^v is on cuda but the cache is on cpu/);
      append(here, a, [1]);
      append(there, b, [1]);
      const q = draw(1, 1, 2, DIM);
      const dq = await q.to('cuda');
      const wrong = /^decodeAttention: q is on cuda but the cache is on cpu/;
      expectThrow(() => decodeAttentionSync(dq, here, { sequences: [a] }), 'ERR_ARGUMENT', wrong);
      await expectRejection(decodeAttention(dq, here, { sequences: [a] }), 'ERR_ARGUMENT', wrong);
      for (const backend of ['cpu', 'reference'] as const) {
        const run = () => decodeAttentionSync(q, there, { sequences: [b], backend });
        expectThrow(run, 'ERR_BACKEND', new RegExp(`the cache is on cuda, which backend ${backend} cannot`));
      }
      const out = { output: Tensor.zeros('float32', [1, 1, 2, DIM]) };
      const mixed = () => decodeAttentionSync(dq, there, { sequences: [b], out });
      expectThrow(mixed, 'ERR_ARGUMENT', /q is on cuda but out.output is on cpu/);
      d.dispose();
      expectThrow(() => there.append(b, d, t), 'ERR_DISPOSED', /^k/);
      dq.dispose();
      there.dispose();
      expectThrow(() => decodeAttentionSync(q, there, { sequences: [b] }), 'ERR_DISPOSED', /dispose/);
    }));
});

describe('KVCache on cuda, without the library', () => {
  it('says why', async () => {
    requireDist();
    const source = `
      const { KVCache } = await import(${JSON.stringify(`${root}/dist/attention/index.js`)});
      try { new KVCache({ keyHeads: 1, headDim: 8, pages: 1, device: 'cuda' }); }
      catch (e) { console.log(e.code + ' ' + e.message); }`;
    const result = await runCommand(process.execPath, ['--input-type=module', '-e', source], {
      env: { HEDDLE_CUDA_LIBRARY: '/nonexistent/libheddle_cuda.so' },
    });
    expect(result.stdout).toMatch(/^ERR_BACKEND backend cuda is not available: .*nonexistent/);
  });
});
