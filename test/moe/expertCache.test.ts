import fc from 'fast-check';
import { afterAll, afterEach, beforeAll, describe, expect, it } from 'vitest';
import { runAsync, runSync } from '../../lib/checkpoint/steps.ts';
import { HeddleError, setDefaults } from '../../lib/index.ts';
import type { ExpertCache } from '../../lib/moe/expertCache.ts';
import { expertsForwardSync, MoELayer } from '../../lib/moe/index.ts';
import { sameBits } from '../cases/case.ts';
import { nativeVariants } from '../helpers/backends.ts';
import { budgeted, checkAtRest, inner, inputOf, rows } from '../helpers/budget.ts';
import { golden } from '../helpers/checkpoints.ts';
import { expectRejection, expectThrow } from '../helpers/errors.ts';

const natives = nativeVariants();
const everywhere = [{ name: 'reference', options: { backend: 'reference' as const }, use() {} }, ...natives];
afterAll(() => {
  if (natives.length > 0) setDefaults({ isa: 'auto' });
});

/** What the documented policy does, forward after forward. */
class Model {
  hits = 0;
  misses = 0;
  evictions = 0;
  private order: number[] = [];
  constructor(private readonly slots: number) {}

  /** One group: experts that fit together. */
  run(ids: Iterable<number>) {
    const wanted = [...new Set(ids)];
    const packed = wanted.filter((e) => this.order.includes(e));
    this.hits += packed.length;
    this.order = [...this.order.filter((e) => !packed.includes(e)), ...packed];
    for (const e of wanted.filter((id) => !packed.includes(id))) {
      if (this.order.length === this.slots) {
        this.evictions++;
        this.order.shift();
      }
      this.order.push(e);
      this.misses++;
    }
  }
}

describe.each(everywhere)('random programs on $name', ({ options, use }) => {
  const name = 'qwen2_moe';
  const input = inputOf(name);
  let whole: MoELayer;
  let sourceBytes = 0;
  beforeAll(async () => {
    use();
    whole = await MoELayer.load(golden(name), { layer: 1, ...options });
    sourceBytes = 3 * 52 * 28 * 4;
  });
  afterAll(() => whole.dispose());
  const piece = fc
    .tuple(fc.integer({ min: 0, max: 37 }), fc.integer({ min: 1, max: 6 }))
    .map(([from, count]) => rows(input, from, Math.min(count, 38 - from)));

  it('one after the other: bits, hits, misses and evictions of an exact LRU', async () => {
    use();
    await fc.assert(
      fc.asyncProperty(
        fc.integer({ min: 6, max: 10 }),
        fc.array(fc.tuple(piece, fc.boolean()), { minLength: 1, maxLength: 8 }),
        async (slots, program) => {
          const { layer, bytes } = await budgeted(golden(name), slots, options);
          const model = new Model(slots);
          for (const [x, sync] of program) {
            const ids = layer.routeSync(x).indices.data as Int32Array;
            if (new Set(ids).size > slots) continue; // groups: other tests
            const y = sync ? layer.forwardSync(x) : await layer.forward(x);
            expect(sameBits([y], [whole.forwardSync(x)])).toBe(true);
            model.run(ids);
            const { hits, misses, evictions, bytesRead } = layer.cache!;
            expect([hits, misses, evictions]).toEqual([model.hits, model.misses, model.evictions]);
            expect(bytesRead).toBe(misses * sourceBytes);
            checkAtRest(layer, bytes);
          }
          layer.dispose();
        },
      ),
      { numRuns: 12, seed: 11 },
    );
  });

  it('all at once, some aborted at any moment: right bits or ERR_ABORTED, and nothing stays pinned', async () => {
    use();
    await fc.assert(
      fc.asyncProperty(
        fc.integer({ min: 1, max: 10 }),
        fc.array(fc.tuple(piece, fc.option(fc.integer({ min: 0, max: 12 }))), { minLength: 2, maxLength: 7 }),
        async (slots, program) => {
          const { layer, bytes } = await budgeted(golden(name), slots, options);
          let aborted = 0;
          await Promise.all(
            program.map(async ([x, abortAt]) => {
              const controller = new AbortController();
              const running = layer.forward(x, { signal: controller.signal });
              if (abortAt !== null) {
                void (async () => {
                  for (let i = 0; i < abortAt; i++) await new Promise((r) => setImmediate(r));
                  controller.abort(new Error('enough'));
                })();
              }
              try {
                expect(sameBits([await running], [whole.forwardSync(x)])).toBe(true);
              } catch (error) {
                if (!(error instanceof HeddleError) || abortAt === null) throw error;
                expect(error.code).toBe('ERR_ABORTED');
                aborted++;
              }
            }),
          );
          checkAtRest(layer, bytes);
          const distinct = program.reduce(
            (n, [x]) => n + new Set(layer.routeSync(x).indices.data as Int32Array).size,
            0,
          );
          const { hits, misses } = layer.cache!;
          if (aborted === 0) expect(hits + misses).toBe(distinct);
          else expect(hits + misses).toBeLessThanOrEqual(distinct);
          for (const [x] of program.slice(0, 2))
            expect(sameBits([await layer.forward(x)], [whole.forwardSync(x)])).toBe(true);
          layer.dispose();
        },
      ),
      { numRuns: 25, seed: 12 },
    );
  });

  it('ten concurrent forwards stay within a budget of two experts', async () => {
    use();
    const { layer, bytes } = await budgeted(golden(name), 2, options);
    const { experts } = inner(layer);
    let most = 0;
    const account = experts.accountAs;
    experts.accountAs = (now) => {
      most = Math.max(most, now);
      account.call(experts, now);
    };
    const xs = Array.from({ length: 10 }, (_, i) => rows(input, i * 3, 1 + (i % 4)));
    const ys = await Promise.all(xs.map((x) => layer.forward(x)));
    for (const [i, x] of xs.entries()) expect(sameBits([ys[i]], [whole.forwardSync(x)])).toBe(true);
    expect(most).toBe(2 * bytes);
    checkAtRest(layer, bytes);
    const { hits, misses } = layer.cache!;
    const needed = xs.map((x) => new Set(layer.routeSync(x).indices.data as Int32Array).size);
    expect(hits + misses).toBe(needed.reduce((a, b) => a + b));
    layer.dispose();
  });
});

it.each(natives)(
  'a route to an expert that is not packed is an error, not a crash, on $name',
  async ({ use }) => {
    use();
    const { layer } = await budgeted(golden('mixtral'), 2);
    const x = rows(inputOf('mixtral'), 0, 2);
    expectThrow(
      () => expertsForwardSync(x, layer.routeSync(x), inner(layer).experts),
      'ERR_INTERNAL',
      /native status -3/,
    );
    layer.dispose();
  },
);

describe('waiting for room', () => {
  let layer: MoELayer;
  let bytes = 0;
  let cache: ExpertCache;
  const take = (experts: number[], signal?: AbortSignal) =>
    runAsync(cache.acquire(new Set(experts), { signal }));
  const settled = async (p: Promise<unknown>) => {
    let done = false;
    const mark = () => {
      done = true;
    };
    p.then(mark, mark);
    for (let i = 0; i < 50; i++) await new Promise((r) => setTimeout(r, 1));
    return done;
  };
  const open = async (slots: number) => {
    ({ layer, bytes } = await budgeted(golden('mixtral'), slots));
    cache = inner(layer).cache;
  };
  afterEach(() => layer.dispose());

  it('lasts until pins are given back, and keeps to the order of arrival', async () => {
    await open(2);
    expect(await take([0, 1])).toEqual([0, 1]);
    const order: string[] = [];
    const noted = async (experts: number[], name: string) => {
      const taken = await take(experts);
      order.push(name);
      return taken;
    };
    const second = noted([2], 'second');
    const third = noted([3, 1], 'third');
    expect(await settled(second)).toBe(false);
    expect(await settled(third)).toBe(false);
    cache.release([0, 1]);
    expect(await second).toEqual([2]);
    expect(await settled(third)).toBe(false); // 1 is packed and pinned for it; 3 waits for the slot of 2
    expect(layer.cache!.bytes).toBe(2 * bytes);
    cache.release([2]);
    expect(await third).toEqual([1, 3]);
    cache.release([1, 3]);
    expect(order).toEqual(['second', 'third']);
    expect(layer.cache).toMatchObject({ hits: 1, misses: 4, evictions: 2 });
    checkAtRest(layer, bytes);
  });

  it('ends with ERR_ABORTED, in the queue and at its head', async () => {
    await open(2);
    await take([0, 1]);
    const [head, queued] = [new AbortController(), new AbortController()];
    const first = take([2], head.signal);
    const second = take([3], queued.signal);
    const third = take([4]);
    expect(await settled(Promise.race([first, second, third]))).toBe(false);
    queued.abort();
    await expectRejection(second, 'ERR_ABORTED', /waited for memory/);
    head.abort();
    await expectRejection(first, 'ERR_ABORTED', /abort/);
    expect(await settled(third)).toBe(false);
    cache.release([0, 1]);
    expect(await third).toEqual([4]);
    cache.release([4]);
    await expectRejection(take([5], head.signal), 'ERR_ABORTED', /abort/);
    checkAtRest(layer, bytes);
  });

  it('packed experts are not held up by another forward that reads, but do not pass one that waits', async () => {
    await open(2);
    cache.release(await take([0, 1]));
    const reading = take([2]); // evicts 0
    const hit = take([1]);
    const first = await Promise.race([reading.then(() => 'reading'), hit.then(() => 'hit')]);
    expect(first).toBe('hit');
    await reading;
    const waiting = take([3]); // both are pinned
    expect(await settled(waiting)).toBe(false);
    const behind = take([1]);
    expect(await settled(behind)).toBe(false);
    cache.release([2]);
    expect(await waiting).toEqual([3]);
    expect(await behind).toEqual([1]);
    cache.release([1, 1, 3]);
    checkAtRest(layer, bytes);
  });

  it('forwardSync does not wait', async () => {
    await open(2);
    await take([0, 1]);
    expectThrow(() => runSync(cache.acquire(new Set([2]), {})), 'ERR_MEMORY', /forwardSync cannot wait/);
    expect(runSync(cache.acquire(new Set([1]), {}))).toEqual([1]);
    cache.release([1]);
    const queued = take([3]);
    await settled(queued);
    expectThrow(() => runSync(cache.acquire(new Set([4]), {})), 'ERR_MEMORY', /await them first/);
    cache.release([0, 1]);
    cache.release(await queued);
    checkAtRest(layer, bytes);
  });
});
