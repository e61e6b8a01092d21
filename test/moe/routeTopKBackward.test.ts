import { describe, expect, it } from 'vitest';
import { Tensor } from '../../lib/index.ts';
import {
  type RouterOptions,
  routeTopKBackward,
  routeTopKBackwardSync,
  routeTopKSync,
} from '../../lib/moe/index.ts';
import { routerArguments } from '../../lib/moe/routerOptions.ts';
import { weightsOf } from '../../lib/reference/moe/router.ts';
import { routeTopKBackwardCases } from '../cases/moe/routeTopKBackward.ts';
import { Random } from '../cases/random.ts';
import { everyVariant } from '../helpers/backends.ts';
import { testCases } from '../helpers/cases.ts';
import { testRefusals } from '../helpers/errors.ts';
import { expectNear } from '../helpers/golden.ts';

testCases(routeTopKBackwardCases);

const floats = (rows: number[][]) =>
  new Tensor('float32', Float32Array.from(rows.flat()), [rows.length, rows[0].length]);
const ints = (rows: number[][]) =>
  new Tensor('int32', Int32Array.from(rows.flat()), [rows.length, rows[0].length]);

describe.each(everyVariant())('routeTopKBackward on $name', ({ options, use }) => {
  const backward = (g: number[][], l: number[][], ids: number[][], o: RouterOptions = {}) => {
    use();
    const r = routeTopKBackwardSync(floats(g), floats(l), { ...options, ...o, indices: ints(ids) });
    return Array.from(r.data);
  };

  it('worked by hand', () => {
    const ln = Math.log;
    const l = [[0, ln(2), 0]]; // softmax (1/4, 1/2, 1/4)
    // s_e (ds_e - sum ds s), ds = (0, 8, 0), sum = 4.
    expectNear(backward([[8]], l, [[1]]), [-1, 2, -1]);
    // Softmax of the selected (2/3, 1/3): w = 2/3, dw/dl = 2/9.
    expectNear(backward([[9, 0]], l, [[1, 0]], { normalize: true }), [-2, 2, 0]);
    expectNear(backward([[9, 0]], l, [[1, 0]], { softmaxOver: 'selected', scale: -1 }), [2, -2, 0]);
    // Sigmoid at ln 2: s = 2/3, s (1 - s) = 2/9.
    expectNear(backward([[9]], l, [[1]], { score: 'sigmoid' }), [0, 2, 0]);
    // A floor above the sum is a constant divisor: 8 / 2.
    expectNear(backward([[8]], l, [[1]], { normalize: true, normalizeFloor: 2 }), [-0.5, 1, -0.5]);
  });

  it('one normalised expert has a constant weight; -1 has none', () => {
    expect(backward([[3]], [[1, 2, 3]], [[0]], { normalize: true })).toEqual([0, 0, 0]);
    expect(backward([[3, 5]], [[1, 2, 3]], [[-1, -1]])).toEqual([0, 0, 0]);
    const withHole = backward([[3, 5]], [[1, 2, 3]], [[-1, 2]]);
    expectNear(withHole, backward([[5]], [[1, 2, 3]], [[2]]));
  });

  it('an expert named twice gets both gradients', () => {
    for (const o of [{}, { score: 'sigmoid' as const }]) {
      expectNear(backward([[3, 5]], [[1, 2, 3]], [[1, 1]], o), backward([[8]], [[1, 2, 3]], [[1]], o));
    }
  });

  it('non-finite logits give finite gradients', () => {
    const l = [
      [NaN, NaN, NaN, NaN],
      [Infinity, 0, Infinity, 1],
      [-Infinity, -Infinity, -Infinity, -Infinity],
      [1, NaN, -Infinity, 0],
      [1e4, -1e4, 0, 5],
    ];
    for (const score of ['softmax', 'sigmoid', 'sqrt-softplus'] as const) {
      for (const normalize of [false, true]) {
        const ids = new Array(5).fill([1, 2]);
        const g = backward(new Array(5).fill([1, -2]), l, ids, { score, normalize });
        for (const x of g) expect(Number.isFinite(x)).toBe(true);
      }
    }
  });

  it('a row is bitwise the same alone and in a batch', () => {
    use();
    const random = new Random(5);
    const [tokens, experts, k] = [21, 75, 4];
    const data = random.normals(tokens * experts, 2);
    const g = random.normals(tokens * k);
    const logits = new Tensor('float32', data, [tokens, experts]);
    const { indices } = routeTopKSync(logits, { k });
    const all = routeTopKBackwardSync(new Tensor('float32', g, [tokens, k]), logits, { ...options, indices });
    for (let t = 0; t < tokens; t++) {
      const row = new Tensor('float32', data.slice(t * experts, (t + 1) * experts), [1, experts]);
      const one = routeTopKBackwardSync(new Tensor('float32', g.slice(t * k, t * k + k), [1, k]), row, {
        ...options,
        indices: new Tensor('int32', indices.data.slice(t * k, t * k + k), [1, k]),
      });
      expect(one.data).toEqual(all.data.slice(t * experts, (t + 1) * experts));
    }
  });
});

describe('routeTopKBackward agrees with finite differences of the reference', () => {
  const random = new Random(31);
  const experts = 7;
  const l = Float64Array.from(random.normals(experts, 1.5));
  const all: RouterOptions[] = [
    {},
    { scale: 2.5 },
    { normalize: true },
    { normalize: true, normalizeEpsilon: 0.05, scale: 3 },
    { normalize: true, normalizeFloor: 0.9 },
    { normalize: true, normalizeFloor: 0.01 },
    { softmaxOver: 'selected', scale: 2 },
    { score: 'sigmoid' },
    { score: 'sigmoid', normalize: true, normalizeEpsilon: 0.1, scale: 2.5 },
    { score: 'sigmoid', normalize: true, normalizeFloor: 5 },
    { score: 'sqrt-softplus' },
    { score: 'sqrt-softplus', normalize: true },
  ];
  const rows = [
    [4, 1, 6],
    [2, -1, 0],
    [3, 5, 3],
  ];
  const cases = all.flatMap((o) => rows.map((ids) => ({ name: `${JSON.stringify(o)} of ${ids}`, o, ids })));
  it.each(cases)('$name', ({ o, ids }) => {
    const g = random.normals(3);
    // The reference's weights in float64, so that small steps are meaningful.
    const loss = (x: Float64Array) =>
      weightsOf(x, ids, ...routerArguments(o)).reduce((a, w, j) => a + (ids[j] < 0 ? 0 : w * g[j]), 0);
    const rounded = l.map(Math.fround);
    const numeric = Array.from(rounded, (x, i) => {
      const up = rounded.slice();
      const down = rounded.slice();
      up[i] = x + 1e-5;
      down[i] = x - 1e-5;
      return (loss(up) - loss(down)) / 2e-5;
    });
    const logits = new Tensor('float32', Float32Array.from(l), [1, experts]);
    const indices = new Tensor('int32', Int32Array.from(ids), [1, 3]);
    const gradient = routeTopKBackwardSync(new Tensor('float32', g, [1, 3]), logits, {
      ...o,
      indices,
      backend: 'reference',
    });
    expectNear(gradient.data, numeric, 1e-7);
  });
});

describe('routeTopKBackward refuses bad input', () => {
  const l = floats([[1, 2, 3]]);
  const g = floats([[1, 1]]);
  const indices = ints([[0, 1]]);
  testRefusals([
    ['no indices', (o) => routeTopKBackwardSync(g, l, { ...o } as never), 'ERR_ARGUMENT', /indices/],
    [
      'indices tokens',
      (o) => routeTopKBackwardSync(g, l, { ...o, indices: ints([[0], [1]]) }),
      'ERR_SHAPE',
      /indices/,
    ],
    [
      'k > E',
      (o) => routeTopKBackwardSync(g, l, { ...o, indices: ints([[0, 1, 2, 0]]) }),
      'ERR_SHAPE',
      /indices/,
    ],
    [
      'gradWeights',
      (o) => routeTopKBackwardSync(floats([[1]]), l, { ...o, indices }),
      'ERR_SHAPE',
      /gradWeights.*\[1, 2\]/,
    ],
    [
      'gradWeights type',
      (o) => routeTopKBackwardSync(indices, l, { ...o, indices }),
      'ERR_DTYPE',
      /gradWeights/,
    ],
    [
      'id',
      (o) => routeTopKBackwardSync(g, l, { ...o, indices: ints([[0, 3]]) }),
      'ERR_VALUE',
      /^indices\[0, 1\] is 3: expected -1 to 2$/,
    ],
    [
      'score',
      (o) => routeTopKBackwardSync(g, l, { ...o, indices, score: 'x' as never }),
      'ERR_OPTION',
      /score/,
    ],
    [
      'bias',
      (o) => routeTopKBackwardSync(g, l, { ...o, indices, selectionBias: 1 } as never),
      'ERR_OPTION',
      /selectionBias/,
    ],
    [
      'mask',
      (o) =>
        routeTopKBackwardSync(g, l, { ...o, indices, mask: new Tensor('uint8', new Uint8Array(2), [2]) }),
      'ERR_SHAPE',
      /mask/,
    ],
    ['out', (o) => routeTopKBackwardSync(g, l, { ...o, indices, out: g }), 'ERR_SHAPE', /out/],
    [
      'out overlaps',
      (o) => routeTopKBackwardSync(g, l, { ...o, indices, out: l }),
      'ERR_ARGUMENT',
      /out overlaps/,
    ],
  ]);

  it('an aborted signal rejects', async () => {
    await expect(routeTopKBackward(g, l, { indices, signal: AbortSignal.abort() })).rejects.toMatchObject({
      code: 'ERR_ABORTED',
    });
  });
});
