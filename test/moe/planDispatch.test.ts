import fc from 'fast-check';
import { describe, expect, it } from 'vitest';
import { Tensor } from '../../lib/index.ts';
import {
  type DispatchPlan,
  expertCapacity,
  type PlanDispatchOptions,
  planDispatch,
  planDispatchSync,
} from '../../lib/moe/index.ts';
import { planDispatchCases } from '../cases/moe/planDispatch.ts';
import { Random } from '../cases/random.ts';
import { everyVariant } from '../helpers/backends.ts';
import { testCases } from '../helpers/cases.ts';
import { testRefusals } from '../helpers/errors.ts';

testCases(planDispatchCases);

const ids = (rows: number[][]) =>
  new Tensor('int32', Int32Array.from(rows.flat()), [rows.length, rows[0].length]);
const floats = (rows: number[][]) =>
  new Tensor('float32', Float32Array.from(rows.flat()), [rows.length, rows[0].length]);
const plain = (p: DispatchPlan) => ({
  order: Array.from(p.order.data),
  offsets: Array.from(p.offsets.data),
  inverse: Array.from(p.inverse.data),
  dropped: Array.from(p.dropped.data),
});

describe.each(everyVariant())('planDispatch on $name', ({ options, use }) => {
  const plan = (rows: number[][], o: PlanDispatchOptions) => {
    use();
    return planDispatchSync(ids(rows), { ...options, ...o });
  };

  it('worked by hand', () => {
    const p = plan(
      [
        [2, 0],
        [-1, 2],
        [0, 2],
      ],
      { numExperts: 4 },
    );
    expect(plain(p)).toEqual({
      order: [1, 4, 0, 3, 5],
      offsets: [0, 2, 2, 5, 5],
      inverse: [2, 0, -1, 3, 1, 4],
      dropped: [],
    });
    expect([p.numExperts, p.numTokens, p.k, p.capacity]).toEqual([4, 3, 2, null]);
    expect(p.order.dims).toEqual([5]);
    expect(p.inverse.dims).toEqual([3, 2]);
  });

  it('every drop rule, worked by hand', () => {
    // Expert 0 is chosen by routes 1 (token 0, second), 2 (token 1, first), 5 (token 2, second), 6 (token 3, first).
    const rows = [
      [1, 0],
      [0, 2],
      [1, 0],
      [0, 2],
    ];
    const weights = floats([
      [0.1, 0.4],
      [0.3, 0.1],
      [0.9, 0.2],
      [0.4, 0.1],
    ]);
    const kept = (o: Partial<PlanDispatchOptions>) => {
      const p = plan(rows, { numExperts: 3, capacity: 1, ...o });
      expect(p.capacity).toBe(1);
      return [p.order.data[0], Array.from(p.dropped.data)];
    };
    expect(kept({})).toEqual([1, [2, 4, 5, 6, 7]]);
    expect(kept({ drop: 'position' })).toEqual([1, [2, 4, 5, 6, 7]]);
    expect(kept({ drop: 'slot' })).toEqual([2, [1, 4, 5, 6, 7]]);
    // Routes 1 and 6 tie at 0.4: the lower one stays.
    expect(kept({ drop: 'weight', weights })).toEqual([1, [0, 2, 5, 6, 7]]);
    // First choices of expert 0: tokens 1 (largest weight 0.3) and 3 (0.4).
    expect(kept({ drop: 'batch-priority', weights })).toEqual([6, [0, 1, 2, 3, 5]]);
  });

  it('an expert map leaves the routes of remote experts out', () => {
    const p = plan([[3, 1, 2, 0]], { numExperts: 2, expertMap: Int32Array.from([-1, 1, -1, 0]) });
    expect(plain(p)).toEqual({ order: [0, 1], offsets: [0, 1, 2], inverse: [0, 1, -1, -1], dropped: [] });
  });

  it('a token may name an expert twice', () => {
    expect(plain(plan([[1, 1, 0]], { numExperts: 2 })).order).toEqual([2, 0, 1]);
  });

  it('property: offsets, order, inverse and dropped describe one partition of the routes', () => {
    fc.assert(
      fc.property(
        fc.integer({ min: 0, max: 2 ** 30 }),
        fc.constantFrom('position', 'slot', 'weight', 'batch-priority'),
        (seed, drop) => {
          const random = new Random(seed);
          const [tokens, k, experts] = [random.integer(1, 40), random.integer(1, 5), random.integer(1, 9)];
          const rows = Array.from({ length: tokens }, () =>
            Array.from({ length: k }, () => random.integer(-1, experts - 1)),
          );
          const weights = new Tensor('float32', random.normals(tokens * k), [tokens, k]);
          const capacity = random.integer(0, 12);
          const weighted = drop === 'weight' || drop === 'batch-priority';
          const p = plan(rows, { numExperts: experts, capacity, drop, ...(weighted ? { weights } : {}) });
          const flat = rows.flat();
          for (let e = 0; e < experts; e++) {
            const mine = Array.from(p.order.data.slice(p.offsets.data[e], p.offsets.data[e + 1]));
            const total = flat.filter((id) => id === e).length;
            expect(mine.length).toBe(Math.min(total, capacity));
            expect(mine.every((i) => flat[i] === e)).toBe(true);
            expect(mine).toEqual(mine.slice().sort((a, b) => a - b));
          }
          const masked = flat.flatMap((id, i) => (id < 0 ? [i] : []));
          const all = [...p.order.data, ...p.dropped.data, ...masked].sort((a, b) => a - b);
          expect(all).toEqual(flat.map((_, i) => i));
          p.inverse.data.forEach((at, i) => {
            if (at >= 0) expect(p.order.data[at]).toBe(i);
            else expect(p.order.data.includes(i)).toBe(false);
          });
        },
      ),
      { numRuns: 60 },
    );
  });

  it('an id out of range is refused with its position, from a later chunk too', () => {
    use();
    const message = 'indices[4500, 1] is 8: expected -1 to 7';
    const data = new Int32Array(10000);
    data[9001] = 8;
    data[9500] = -2;
    expect(() =>
      planDispatchSync(new Tensor('int32', data, [5000, 2]), { ...options, numExperts: 8 }),
    ).toThrow(expect.objectContaining({ code: 'ERR_VALUE', message }));
  });
});

describe('expertCapacity', () => {
  const size = { tokens: 10, k: 2, numExperts: 8 };
  it('worked by hand: each style rounds its own way', () => {
    expect(expertCapacity({ ...size, factor: 1.25, style: 'megablocks' })).toBe(3); // 3.125
    expect(expertCapacity({ ...size, factor: 1.25, style: 'megatron' })).toBe(4);
    expect(expertCapacity({ ...size, factor: 1.25, style: 'tutel' })).toBe(4); // 2 * floor(1.25 * 2)
    expect(expertCapacity({ ...size, factor: 2.5, style: 'vmoe' })).toBe(8); // 6.25
    expect(expertCapacity({ ...size, tokens: 0, factor: 1, style: 'tutel' })).toBe(0);
  });
  testRefusals([
    ['no style', () => expertCapacity({ ...size, factor: 1 } as never), 'ERR_OPTION', /style/],
    ['no factor', () => expertCapacity({ ...size, style: 'tutel' } as never), 'ERR_OPTION', /factor/],
    ['bad factor', () => expertCapacity({ ...size, factor: -1, style: 'tutel' }), 'ERR_OPTION', /factor/],
    [
      'no experts',
      () => expertCapacity({ ...size, numExperts: 0, factor: 1, style: 'tutel' }),
      'ERR_OPTION',
      /numExperts/,
    ],
    ['style', () => expertCapacity({ ...size, factor: 1, style: 'x' as never }), 'ERR_OPTION', /style/],
  ]);
});

describe('planDispatch refuses bad input', () => {
  const good = ids([[0, 1]]);
  const weights = floats([[1, 2]]);
  testRefusals([
    ['no options', () => planDispatchSync(good, undefined as never), 'ERR_ARGUMENT', /numExperts/],
    ['type', (o) => planDispatchSync(weights, { ...o, numExperts: 2 }), 'ERR_DTYPE', /indices/],
    [
      'k = 0',
      (o) => planDispatchSync(new Tensor('int32', new Int32Array(0), [2, 0]), { ...o, numExperts: 2 }),
      'ERR_SHAPE',
      /indices/,
    ],
    [
      'rank',
      (o) => planDispatchSync(new Tensor('int32', new Int32Array(2), [2]), { ...o, numExperts: 2 }),
      'ERR_SHAPE',
      /indices/,
    ],
    [
      'numExperts',
      (o) => planDispatchSync(good, { ...o, numExperts: 4097 }),
      'ERR_OPTION',
      /numExperts.*4097/,
    ],
    [
      'unknown option',
      (o) => planDispatchSync(good, { ...o, numExperts: 2, out: 1 } as never),
      'ERR_OPTION',
      /out/,
    ],
    [
      'id',
      (o) => planDispatchSync(good, { ...o, numExperts: 1 }),
      'ERR_VALUE',
      /^indices\[0, 1\] is 1: expected -1 to 0$/,
    ],
    [
      'id below -1',
      (o) => planDispatchSync(ids([[-2]]), { ...o, numExperts: 1 }),
      'ERR_VALUE',
      /^indices\[0, 0\] is -2/,
    ],
    [
      'capacity',
      (o) => planDispatchSync(good, { ...o, numExperts: 2, capacity: 1.5 }),
      'ERR_OPTION',
      /capacity/,
    ],
    [
      'drop without capacity',
      (o) => planDispatchSync(good, { ...o, numExperts: 2, drop: 'slot' }),
      'ERR_OPTION',
      /capacity/,
    ],
    [
      'drop',
      (o) => planDispatchSync(good, { ...o, numExperts: 2, capacity: 1, drop: 'x' as never }),
      'ERR_OPTION',
      /drop/,
    ],
    [
      'no weights',
      (o) => planDispatchSync(good, { ...o, numExperts: 2, capacity: 1, drop: 'weight' }),
      'ERR_OPTION',
      /weights/,
    ],
    [
      'unused weights',
      (o) => planDispatchSync(good, { ...o, numExperts: 2, capacity: 1, weights }),
      'ERR_OPTION',
      /weights/,
    ],
    [
      'weights shape',
      (o) =>
        planDispatchSync(good, {
          ...o,
          numExperts: 2,
          capacity: 1,
          drop: 'weight',
          weights: floats([[1], [2]]),
        }),
      'ERR_SHAPE',
      /weights/,
    ],
    [
      'map entry',
      (o) => planDispatchSync(good, { ...o, numExperts: 2, expertMap: Int32Array.from([0, 2]) }),
      'ERR_VALUE',
      /expertMap\[1\] is 2/,
    ],
    [
      'map type',
      (o) => planDispatchSync(good, { ...o, numExperts: 2, expertMap: weights }),
      'ERR_DTYPE',
      /expertMap/,
    ],
    [
      'id beyond the map',
      (o) => planDispatchSync(good, { ...o, numExperts: 2, expertMap: Int32Array.from([1]) }),
      'ERR_VALUE',
      /indices\[0, 1\]/,
    ],
  ]);

  it('an aborted signal rejects', async () => {
    await expect(planDispatch(good, { numExperts: 2, signal: AbortSignal.abort() })).rejects.toMatchObject({
      code: 'ERR_ABORTED',
    });
  });
});
