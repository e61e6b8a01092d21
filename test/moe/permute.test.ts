import fc from 'fast-check';
import { describe, expect, it } from 'vitest';
import { Tensor } from '../../lib/index.ts';
import { combineSync, permute, permuteSync, planDispatchSync } from '../../lib/moe/index.ts';
import { combineCases } from '../cases/moe/combine.ts';
import { permuteCases } from '../cases/moe/permute.ts';
import { Random } from '../cases/random.ts';
import { everyVariant } from '../helpers/backends.ts';
import { testCases } from '../helpers/cases.ts';
import { testRefusals } from '../helpers/errors.ts';

testCases(permuteCases);
testCases(combineCases);

const floats = (rows: number[][]) =>
  new Tensor('float32', Float32Array.from(rows.flat()), [rows.length, rows[0].length]);
const indices = new Tensor('int32', Int32Array.from([1, 0, -1, 1, 0, 0]), [3, 2]);
const plan = planDispatchSync(indices, { numExperts: 2 });
const dropping = planDispatchSync(indices, { numExperts: 2, capacity: 1 });

describe.each(everyVariant())('permute and combine on $name', ({ options, use }) => {
  it('worked by hand', () => {
    use();
    const x = floats([
      [1, 2],
      [3, 4],
      [5, 6],
    ]);
    // order = routes 1, 4, 5 (expert 0), 0, 3 (expert 1).
    expect(Array.from(permuteSync(x, plan, options).data)).toEqual([1, 2, 5, 6, 5, 6, 1, 2, 3, 4]);
    expect(Array.from(permuteSync(x, dropping, options).data)).toEqual([1, 2, 1, 2]);

    const y = floats([[10], [20], [30], [40], [50]]);
    const weights = floats([
      [0.5, 2],
      [100, 3],
      [1, -1],
    ]);
    expect(Array.from(combineSync(y, plan, weights, options).data)).toEqual([40, 150, -10]);
    expect(Array.from(combineSync(y, plan, undefined, options).data)).toEqual([50, 50, 50]);
    expect(Array.from(combineSync(floats([[10], [40]]), dropping, weights, options).data)).toEqual([
      40, 0, 0,
    ]);
  });

  it('property: combining what was permuted with weights that sum to 1 gives the tokens back', () => {
    use();
    fc.assert(
      fc.property(fc.integer({ min: 0, max: 2 ** 30 }), (seed) => {
        const random = new Random(seed);
        const [tokens, k, width] = [random.integer(1, 20), random.integer(1, 4), random.integer(1, 70)];
        const ids = Int32Array.from({ length: tokens * k }, () => random.integer(0, 6));
        const p = planDispatchSync(new Tensor('int32', ids, [tokens, k]), { ...options, numExperts: 7 });
        const x = new Tensor('float32', random.normals(tokens * width), [tokens, width]);
        const weights = new Tensor('float32', new Float32Array(tokens * k).fill(1 / k), [tokens, k]);
        const back = combineSync(permuteSync(x, p, options), p, weights, options);
        back.data.forEach((v, i) => {
          expect(v).toBeCloseTo(x.data[i], 5);
        });
      }),
      { numRuns: 30 },
    );
  });

  it('a token is bitwise the same alone and in a batch', () => {
    use();
    const random = new Random(3);
    const [tokens, k, width] = [9, 3, 45];
    const ids = Int32Array.from({ length: tokens * k }, () => random.integer(0, 4));
    const p = planDispatchSync(new Tensor('int32', ids, [tokens, k]), { numExperts: 5 });
    const y = new Tensor('float32', random.normals(tokens * k * width), [tokens * k, width]);
    const weights = random.normals(tokens * k);
    const all = combineSync(y, p, new Tensor('float32', weights, [tokens, k]), options);
    for (let t = 0; t < tokens; t++) {
      const mine = ids.slice(t * k, t * k + k);
      const one = planDispatchSync(new Tensor('int32', mine, [1, k]), { numExperts: 5 });
      const rows = new Float32Array(k * width);
      for (let j = 0; j < k; j++) {
        const from = p.inverse.data[t * k + j] * width;
        rows.set(y.data.subarray(from, from + width), one.inverse.data[j] * width);
      }
      const w = new Tensor('float32', weights.slice(t * k, t * k + k), [1, k]);
      const alone = combineSync(new Tensor('float32', rows, [k, width]), one, w, options);
      expect(alone.data).toEqual(all.data.slice(t * width, (t + 1) * width));
    }
  });

  it('half types: one rounding at the end, NaN only in the tokens that use it', () => {
    use();
    // 1 + 2^-8 + 2^-8 = 1 + 2^-7 in bfloat16; rounding after each addition would stay at 1.
    const [one, small, nan] = [0x3f80, 0x3b80, 0x7fc0];
    const ids = new Tensor('int32', Int32Array.from([0, 0, 0, 0, 0, -1]), [2, 3]);
    const p = planDispatchSync(ids, { numExperts: 1 });
    const y = new Tensor('bfloat16', Uint16Array.from([one, small, small, nan, one]), [5, 1]);
    const out = combineSync(y, p, undefined, options);
    expect(out.type).toBe('bfloat16');
    expect(out.data[0]).toBe(0x3f81);
    expect(Number.isNaN(combineSync(y, p, undefined, { ...options, outType: 'float32' }).data[1])).toBe(true);
  });

  it('out is used, and a damaged plan is refused, never followed', () => {
    use();
    const x = floats([[1], [3], [5]]);
    const out = new Tensor('float32', new Float32Array(5), [5, 1]);
    expect(permuteSync(x, plan, { ...options, out }).data).toBe(out.data);
    const order = new Tensor('int32', Int32Array.from([0, 1, 6, 2, 3]), [5]);
    expect(() => permuteSync(x, { ...plan, order }, options)).toThrow(
      expect.objectContaining({ code: 'ERR_VALUE', message: 'plan.order[2] is 6: expected 0 to 5' }),
    );
    const inverse = new Tensor('int32', Int32Array.from([0, 1, 2, 3, 5, -1]), [3, 2]);
    expect(() => combineSync(out, { ...plan, inverse }, undefined, options)).toThrow(
      expect.objectContaining({ code: 'ERR_VALUE', message: 'plan.inverse[2, 0] is 5: expected -1 to 4' }),
    );
  });
});

describe('permute and combine refuse bad input', () => {
  const x = floats([[1], [2], [3]]);
  const y = floats([[1], [2], [3], [4], [5]]);
  const half = new Tensor('bfloat16', new Uint16Array(5), [5, 1]);
  testRefusals([
    ['no plan', (o) => permuteSync(x, null as never, o), 'ERR_ARGUMENT', /plan/],
    ['not a plan', (o) => permuteSync(x, {} as never, o), 'ERR_ARGUMENT', /plan/],
    ['tokens', (o) => permuteSync(y, plan, o), 'ERR_SHAPE', /x: expected 3 tokens.*got 5/],
    ['type', (o) => permuteSync(indices, plan, o), 'ERR_DTYPE', /x/],
    [
      'inverse shape',
      (o) => permuteSync(x, { ...plan, inverse: plan.order as never }, o),
      'ERR_SHAPE',
      /plan.inverse/,
    ],
    ['k', (o) => permuteSync(x, { ...plan, k: 0 }, o), 'ERR_OPTION', /plan.k/],
    ['out shape', (o) => permuteSync(x, plan, { ...o, out: x }), 'ERR_SHAPE', /out/],
    ['out type', (o) => permuteSync(x, plan, { ...o, out: half }), 'ERR_DTYPE', /out/],
    [
      'unknown option',
      (o) => permuteSync(x, plan, { ...o, outType: 'float32' } as never),
      'ERR_OPTION',
      /outType/,
    ],
    ['combine rows', (o) => combineSync(x, plan, undefined, o), 'ERR_SHAPE', /y: expected 5 rows.*got 3/],
    ['combine weights', (o) => combineSync(y, plan, x, o), 'ERR_SHAPE', /weights/],
    [
      'combine outType',
      (o) => combineSync(y, plan, undefined, { ...o, outType: 'float16' }),
      'ERR_OPTION',
      /outType/,
    ],
    [
      'combine out type',
      (o) => combineSync(half, plan, undefined, { ...o, outType: 'float32', out: half }),
      'ERR_DTYPE',
      /out/,
    ],
    [
      'combine overlap',
      (o) =>
        combineSync(y, plan, undefined, { ...o, out: new Tensor('float32', y.data.subarray(1, 4), [3, 1]) }),
      'ERR_ARGUMENT',
      /out overlaps/,
    ],
  ]);

  it('an aborted signal rejects', async () => {
    await expect(permute(x, plan, { signal: AbortSignal.abort() })).rejects.toMatchObject({
      code: 'ERR_ABORTED',
    });
  });
});
