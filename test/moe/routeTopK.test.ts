import fc from 'fast-check';
import { describe, expect, it } from 'vitest';
import { HeddleError, Tensor } from '../../lib/index.ts';
import {
  type RouteTopKOptions,
  routeTopK,
  routeTopKSync,
  routeWith,
  routeWithSync,
} from '../../lib/moe/index.ts';
import { routeTopKCases } from '../cases/moe/routeTopK.ts';
import { Random } from '../cases/random.ts';
import { nativeVariants } from '../helpers/backends.ts';
import { testCases } from '../helpers/cases.ts';

testCases(routeTopKCases);

const variants = nativeVariants();
const everywhere = [{ name: 'reference', options: { backend: 'reference' as const }, use() {} }, ...variants];

function logitsOf(rows: number[][]): Tensor<'float32'> {
  return new Tensor('float32', Float32Array.from(rows.flat()), [rows.length, rows[0].length]);
}

describe.each(everywhere)('routeTopK on $name', ({ options, use }) => {
  const route = (rows: number[][], o: RouteTopKOptions) => {
    use();
    const r = routeTopKSync(logitsOf(rows), { ...options, ...o });
    return { ids: Array.from(r.indices.data), weights: Array.from(r.weights.data) };
  };

  it('worked by hand', () => {
    const ln = Math.log;
    const { ids, weights } = route([[ln(1), ln(4), ln(2), ln(3)]], { k: 2 });
    expect(ids).toEqual([1, 3]);
    expect(weights[0]).toBeCloseTo(0.4, 6);
    expect(weights[1]).toBeCloseTo(0.3, 6);
    const n = route([[ln(1), ln(4), ln(2), ln(3)]], { k: 2, normalize: true, scale: 2 });
    expect(n.weights[0]).toBeCloseTo(8 / 7, 6);
    expect(n.weights[1]).toBeCloseTo(6 / 7, 6);
  });

  it('ties go to the lower id, at every size', () => {
    for (const experts of [2, 7, 16, 17, 33, 64, 65, 100, 257]) {
      const k = Math.min(experts, 9);
      const { ids, weights } = route([new Array(experts).fill(1.5)], { k, normalize: true });
      expect(ids).toEqual(Array.from({ length: k }, (_, i) => i));
      for (const w of weights) expect(w).toBeCloseTo(1 / k, 6);
    }
    expect(route([[-0, 0, -0, 0]], { k: 4 }).ids).toEqual([0, 1, 2, 3]);
  });

  it('NaN and infinities give k distinct valid ids and finite weights', () => {
    const rows = [
      new Array(40).fill(NaN),
      new Array(40).fill(Infinity),
      new Array(40).fill(-Infinity),
      Array.from({ length: 40 }, (_, i) => (i % 3 === 0 ? NaN : i % 3 === 1 ? Infinity : -Infinity)),
      Array.from({ length: 40 }, (_, i) => (i === 17 ? NaN : i)),
    ];
    for (const normalize of [true, false]) {
      for (const score of ['softmax', 'sigmoid', 'sqrt-softplus'] as const) {
        const { ids, weights } = route(rows, { k: 6, normalize, score });
        for (let r = 0; r < rows.length; r++) {
          const row = ids.slice(r * 6, r * 6 + 6);
          expect(new Set(row).size).toBe(6);
          for (const id of row) expect(id >= 0 && id < 40).toBe(true);
        }
        for (const w of weights) expect(Number.isFinite(w)).toBe(true);
      }
    }
    const uniform = route([rows[1]], { k: 4 });
    for (const w of uniform.weights) expect(w).toBeCloseTo(1 / 40, 7);
    expect(route([rows[4]], { k: 40 }).ids[39]).toBe(17);
  });

  it('normalised scores that underflow keep their ratios', () => {
    for (const score of ['sigmoid', 'sqrt-softplus'] as const) {
      const half = score === 'sigmoid' ? 1 : 0.5;
      for (const k of [2, 20]) {
        const row = Array.from({ length: 24 }, (_, i) => (i === 3 ? -190 : i === 7 ? -191 : -400));
        const { ids, weights } = route([row], { k, score, normalize: true });
        expect(ids.slice(0, 2)).toEqual([3, 7]);
        expect(weights[0]).toBeCloseTo(1 / (1 + Math.exp(-half)), 5);
        expect(weights[1]).toBeCloseTo(1 / (1 + Math.exp(half)), 5);
      }
    }
  });

  it('a masked-out expert is never selected; surplus routes are -1 with weight 0', () => {
    use();
    const mask = new Tensor('uint8', Uint8Array.from([0, 1, 0, 1]), [4]);
    const r = routeTopKSync(logitsOf([[9, 1, 8, 2]]), { ...options, k: 3, mask });
    expect(Array.from(r.indices.data)).toEqual([3, 1, -1]);
    expect(r.weights.data[2]).toBe(0);
    expect(r.weights.data[0] + r.weights.data[1]).toBeCloseTo(1, 6);
  });

  it('groups outside the best are excluded, not zeroed', () => {
    // All scores of the kept group are negative after the bias: masking with 0 would select outside it.
    const r = route([[3, 2, 1, 0]], {
      k: 2,
      score: 'sigmoid',
      selectionBias: Float32Array.from([-5, -5, -6, -6]),
      groups: { count: 2, keep: 1, score: 'top2' },
    });
    expect(r.ids).toEqual([0, 1]);
  });

  it('a row is bitwise the same alone and in a batch', () => {
    use();
    const random = new Random(5);
    const [tokens, experts] = [37, 75];
    const data = random.normals(tokens * experts, 3);
    for (const o of [
      { k: 5 },
      { k: 5, normalize: true },
      { k: 3, score: 'sigmoid' as const, scale: 2.5, normalize: true },
    ]) {
      const all = routeTopKSync(new Tensor('float32', data, [tokens, experts]), { ...options, ...o });
      for (let t = 0; t < tokens; t++) {
        const row = new Tensor('float32', data.slice(t * experts, (t + 1) * experts), [1, experts]);
        const one = routeTopKSync(row, { ...options, ...o });
        expect(one.indices.data).toEqual(all.indices.data.slice(t * o.k, (t + 1) * o.k));
        expect(one.weights.data).toEqual(all.weights.data.slice(t * o.k, (t + 1) * o.k));
      }
    }
  });

  it('property: weights of a normalised row sum to the scale, ids are distinct and sorted by logit', () => {
    use();
    fc.assert(
      fc.property(
        fc.integer({ min: 1, max: 90 }),
        fc.integer({ min: 0, max: 2 ** 30 }),
        fc.constantFrom('softmax' as const, 'sigmoid' as const, 'sqrt-softplus' as const),
        (experts, seed, score) => {
          const random = new Random(seed);
          const k = random.integer(1, experts);
          const values = Array.from(random.normals(experts, 2));
          const { ids, weights } = route([values], { k, score, normalize: true, scale: 2 });
          expect(new Set(ids).size).toBe(k);
          for (let j = 1; j < k; j++)
            expect(Math.fround(values[ids[j - 1]])).toBeGreaterThanOrEqual(Math.fround(values[ids[j]]));
          expect(weights.reduce((a, b) => a + b, 0)).toBeCloseTo(2, 4);
        },
      ),
      { numRuns: 60 },
    );
  });

  it('routeWith recomputes the weights of routeTopK', async () => {
    use();
    const logits = new Tensor('float32', new Random(9).normals(20 * 30, 2), [20, 30]);
    for (const o of [
      { normalize: true },
      { softmaxOver: 'selected' as const },
      { score: 'sigmoid' as const, scale: 3 },
    ]) {
      const routed = routeTopKSync(logits, { ...options, ...o, k: 4 });
      const again = routeWithSync(routed.indices, logits, { ...options, ...o });
      expect(again.weights.data).toEqual(routed.weights.data);
      expect((await routeWith(routed.indices, logits, { ...options, ...o })).weights.data).toEqual(
        routed.weights.data,
      );
    }
    const partial = routeWithSync(
      new Tensor('int32', Int32Array.from([-1, 2]), [1, 2]),
      logitsOf([[1, 2, 3]]),
      {
        ...options,
        normalize: true,
      },
    );
    expect(Array.from(partial.weights.data)).toEqual([0, 1]);
  });

  it('ids out of range are refused with their position', () => {
    use();
    const ids = new Tensor('int32', Int32Array.from([0, 1, 7, 0]), [2, 2]);
    const logits = logitsOf([
      [1, 2, 3],
      [1, 2, 3],
    ]);
    expect(() => routeWithSync(ids, logits, options)).toThrow(
      expect.objectContaining({ code: 'ERR_VALUE', message: 'indices[1, 0] is 7: expected -1 to 2' }),
    );
  });
});

describe('routeTopK refuses bad input with a code and the name of the argument', () => {
  const good = logitsOf([[1, 2, 3, 4]]);
  const cases: [string, () => unknown, string, RegExp][] = [
    ['no tensor', () => routeTopKSync(5 as never, { k: 1 }), 'ERR_ARGUMENT', /logits/],
    ['no options', () => routeTopKSync(good, undefined as never), 'ERR_ARGUMENT', /options/],
    [
      'rank',
      () => routeTopKSync(new Tensor('float32', new Float32Array(4), [4]), { k: 1 }),
      'ERR_SHAPE',
      /logits/,
    ],
    [
      'dtype',
      () => routeTopKSync(new Tensor('int32', new Int32Array(4), [1, 4]), { k: 1 }),
      'ERR_DTYPE',
      /logits.*int32/,
    ],
    [
      'no experts',
      () => routeTopKSync(new Tensor('float32', new Float32Array(0), [3, 0]), { k: 1 }),
      'ERR_SHAPE',
      /4096 experts/,
    ],
    [
      'too many experts',
      () => routeTopKSync(new Tensor('float32', new Float32Array(4097), [1, 4097]), { k: 1 }),
      'ERR_SHAPE',
      /4096/,
    ],
    ['k = 0', () => routeTopKSync(good, { k: 0 }), 'ERR_OPTION', /^k /],
    ['k > E', () => routeTopKSync(good, { k: 5 }), 'ERR_OPTION', /^k .*got 5/],
    [
      'unknown option',
      () => routeTopKSync(good, { k: 1, normalise: true } as never),
      'ERR_OPTION',
      /normalise/,
    ],
    ['score', () => routeTopKSync(good, { k: 1, score: 'tanh' as never }), 'ERR_OPTION', /score.*softmax/],
    [
      'selected sigmoid',
      () => routeTopKSync(good, { k: 1, score: 'sigmoid', softmaxOver: 'selected' }),
      'ERR_OPTION',
      /softmaxOver/,
    ],
    ['scale', () => routeTopKSync(good, { k: 1, scale: NaN }), 'ERR_OPTION', /scale/],
    ['epsilon', () => routeTopKSync(good, { k: 1, normalizeEpsilon: -1 }), 'ERR_OPTION', /normalizeEpsilon/],
    [
      'bias size',
      () => routeTopKSync(good, { k: 1, selectionBias: new Float32Array(3) }),
      'ERR_SHAPE',
      /selectionBias/,
    ],
    [
      'mask size',
      () => routeTopKSync(good, { k: 1, mask: new Tensor('uint8', new Uint8Array(3), [3]) }),
      'ERR_SHAPE',
      /mask/,
    ],
    [
      'groups do not divide',
      () => routeTopKSync(good, { k: 1, groups: { count: 3, keep: 1, score: 'max' } }),
      'ERR_OPTION',
      /groups.count/,
    ],
    [
      'groups keep too few',
      () => routeTopKSync(good, { k: 3, groups: { count: 2, keep: 1, score: 'max' } }),
      'ERR_OPTION',
      /k must be at most/,
    ],
    [
      'top2 of one',
      () => routeTopKSync(good, { k: 1, groups: { count: 4, keep: 1, score: 'top2' } }),
      'ERR_OPTION',
      /top2/,
    ],
    ['threads', () => routeTopKSync(good, { k: 1, threads: 0 }), 'ERR_OPTION', /threads/],
    ['backend', () => routeTopKSync(good, { k: 1, backend: 'tpu' as never }), 'ERR_OPTION', /backend/],
    [
      'location',
      () =>
        routeTopKSync({ type: 'float32', data: good.data, dims: [1, 4], location: 'gpu-buffer' }, { k: 1 }),
      'ERR_ARGUMENT',
      /location/,
    ],
    [
      'out shape',
      () => routeTopKSync(good, { k: 2, out: routeTopKSync(good, { k: 1 }) }),
      'ERR_SHAPE',
      /out.indices/,
    ],
    [
      'out overlaps',
      () =>
        routeTopKSync(good, {
          k: 4,
          out: {
            indices: new Tensor('int32', new Int32Array(4), [1, 4]),
            weights: new Tensor('float32', good.data, [1, 4]),
          },
        }),
      'ERR_ARGUMENT',
      /out.weights overlaps/,
    ],
  ];
  it.each(cases)('%s', async (_, run, code, message) => {
    let error: unknown;
    try {
      run();
    } catch (e) {
      error = e;
    }
    expect(error).toBeInstanceOf(HeddleError);
    expect((error as HeddleError).code).toBe(code);
    expect((error as HeddleError).message).toMatch(message);
  });

  it('a detached buffer', () => {
    const t = logitsOf([[1, 2, 3, 4]]);
    structuredClone(t.data.buffer, { transfer: [t.data.buffer as ArrayBuffer] });
    expect(() => routeTopKSync(t, { k: 1 })).toThrow(expect.objectContaining({ code: 'ERR_SHAPE' }));
  });

  it('an aborted signal rejects with ERR_ABORTED and its reason', async () => {
    const reason = new Error('no longer needed');
    await expect(routeTopK(good, { k: 1, signal: AbortSignal.abort(reason) })).rejects.toMatchObject({
      code: 'ERR_ABORTED',
      cause: reason,
    });
  });

  it('accepts a structural tensor and out', () => {
    const out = routeTopKSync(good, { k: 2 });
    const again = routeTopKSync(
      { type: 'float32', data: good.data, dims: [1, 4], location: 'cpu' },
      { k: 2, out },
    );
    expect(again.indices.data).toBe(out.indices.data);
    expect(Array.from(again.indices.data)).toEqual([3, 2]);
  });
});
