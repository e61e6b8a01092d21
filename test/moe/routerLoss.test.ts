import { describe, expect, it } from 'vitest';
import { Tensor } from '../../lib/index.ts';
import {
  importanceLossSync,
  type LossScoreOptions,
  loadBalancingLoss,
  loadBalancingLossSync,
  loadLossSync,
  type RouterLoss,
  routerZLossSync,
} from '../../lib/moe/index.ts';
import { routerLossCases } from '../cases/moe/routerLoss.ts';
import { Random } from '../cases/random.ts';
import { everyVariant } from '../helpers/backends.ts';
import { testCases } from '../helpers/cases.ts';
import { testRefusals } from '../helpers/errors.ts';
import { expectNear } from '../helpers/golden.ts';

testCases(routerLossCases);

const floats = (rows: number[][]) =>
  new Tensor('float32', Float32Array.from(rows.flat()), [rows.length, rows[0].length]);
const ints = (rows: number[][]) =>
  new Tensor('int32', Int32Array.from(rows.flat()), [rows.length, rows[0].length]);
const bytes = (values: number[]) => new Tensor('uint8', Uint8Array.from(values), [values.length]);

describe.each(everyVariant())('router losses on $name', ({ options, use }) => {
  it('worked by hand', () => {
    use();
    const ln = Math.log;
    // Probabilities (3/4, 1/4) and (1/2, 1/2); both tokens chose expert 0.
    const logits = floats([
      [ln(3), 0],
      [0, 0],
    ]);
    const indices = ints([[0], [0]]);
    // E sum f P = 2 * (1 * 5/8).
    expectNear([loadBalancingLossSync(logits, indices, options).value], [1.25]);
    expectNear([loadBalancingLossSync(logits, indices, { ...options, coefficient: 0.5 }).value], [0.625]);
    expectNear([routerZLossSync(logits, options).value], [(ln(4) ** 2 + ln(2) ** 2) / 2]);
    // Importance (5/4, 3/4): mean 1, variance 1/16.
    expectNear([importanceLossSync(logits, options).value], [1 / 16]);
    // Counts (2, 0): mean 1, variance 1.
    expect(loadLossSync(indices, { ...options, numExperts: 2 }).value).toBe(1);
  });

  it('a uniform load gives 1 per routes and k per tokens', () => {
    use();
    const logits = floats(new Array(4).fill([0, 0, 0, 0]));
    const indices = ints([
      [0, 1],
      [2, 3],
      [0, 1],
      [2, 3],
    ]);
    expect(loadBalancingLossSync(logits, indices, options).value).toBeCloseTo(1, 6);
    const perToken = loadBalancingLossSync(logits, indices, { ...options, normalization: 'tokens' });
    expect(perToken.value).toBeCloseTo(2, 6);
    expect(importanceLossSync(logits, options).value).toBe(0);
    expect(loadLossSync(indices, { ...options, numExperts: 4 }).value).toBe(0);
  });

  it('padding counts for nothing: the same as leaving the tokens out', () => {
    use();
    const random = new Random(3);
    const [tokens, experts] = [90, 10];
    const data = random.normals(tokens * experts, 2);
    const ids = Int32Array.from({ length: tokens * 2 }, () => random.integer(-1, experts - 1));
    const keep = Array.from({ length: tokens }, (_, t) => (t % 3 === 1 ? 0 : 1));
    const kept = keep.flatMap((m, t) => (m ? [t] : []));
    const logits = new Tensor('float32', data, [tokens, experts]);
    const indices = new Tensor('int32', ids, [tokens, 2]);
    const fewLogits = floats(kept.map((t) => Array.from(data.slice(t * experts, (t + 1) * experts))));
    const fewIndices = ints(kept.map((t) => Array.from(ids.slice(2 * t, 2 * t + 2))));
    const o = { ...options, gradient: true };
    const m = { ...o, mask: bytes(keep) };
    const same = (a: RouterLoss, b: RouterLoss) => {
      expectNear([a.value], [b.value], 1e-6);
      kept.forEach((t, i) => {
        expectNear(
          a.gradient!.data.slice(t * experts, (t + 1) * experts),
          b.gradient!.data.slice(i * experts, (i + 1) * experts),
          2e-6,
        );
      });
      keep.forEach((bit, t) => {
        const row = a.gradient!.data.slice(t * experts, (t + 1) * experts);
        if (bit === 0) expect(row.every((x) => x === 0)).toBe(true);
      });
    };
    same(loadBalancingLossSync(logits, indices, m), loadBalancingLossSync(fewLogits, fewIndices, o));
    same(routerZLossSync(logits, m), routerZLossSync(fewLogits, o));
    same(importanceLossSync(logits, m), importanceLossSync(fewLogits, o));
    expect(loadLossSync(indices, { ...options, mask: bytes(keep), numExperts: experts }).value).toBe(
      loadLossSync(fewIndices, { ...options, numExperts: experts }).value,
    );
    const nothing = { ...o, mask: bytes(new Array(tokens).fill(0)) };
    for (const r of [
      loadBalancingLossSync(logits, indices, nothing),
      routerZLossSync(logits, nothing),
      importanceLossSync(logits, nothing),
    ]) {
      expect(r.value).toBe(0);
      expect(r.gradient!.data.every((x) => x === 0)).toBe(true);
    }
  });

  it('non-finite logits give finite losses and gradients', () => {
    use();
    const logits = floats([
      [NaN, 1, 2],
      [NaN, NaN, NaN],
      [Infinity, 0, Infinity],
      [-Infinity, -Infinity, -Infinity],
      [1e4, -1e4, 0],
    ]);
    const indices = ints([[2], [0], [0], [1], [-1]]);
    const o = { ...options, gradient: true };
    for (const score of ['softmax', 'sigmoid', 'sqrt-softplus'] as const) {
      for (const normalize of [false, true]) {
        for (const r of [
          loadBalancingLossSync(logits, indices, { ...o, score, normalize }),
          importanceLossSync(logits, { ...o, score, normalize }),
          routerZLossSync(logits, o),
        ]) {
          expect(Number.isFinite(r.value)).toBe(true);
          for (const g of r.gradient!.data) expect(Number.isFinite(g)).toBe(true);
        }
      }
    }
  });

  it('out receives the gradient, and without `gradient` there is none', () => {
    use();
    const logits = floats([[1, 2]]);
    const out = floats([[9, 9]]);
    const r = routerZLossSync(logits, { ...options, gradient: true, out });
    expect(r.gradient!.data).toBe(out.data);
    expect(out.data[0]).not.toBe(9);
    expect(routerZLossSync(logits, options)).not.toHaveProperty('gradient');
  });
});

describe('gradients of the losses agree with finite differences of the reference', () => {
  const random = new Random(12);
  const [tokens, experts, k] = [5, 6, 2];
  const data = random.normals(tokens * experts, 1.5);
  const ids = Int32Array.from({ length: tokens * k }, () => random.integer(-1, experts - 1));
  const indices = new Tensor('int32', ids, [tokens, k]);
  const o = { backend: 'reference', coefficient: 0.7, mask: bytes([1, 1, 0, 1, 1]) } as const;

  const check = (loss: (logits: Tensor, gradient: boolean) => RouterLoss, values = data) => {
    const at = (v: Float32Array) => new Tensor('float32', v, [tokens, experts]) as Tensor;
    const analytic = loss(at(values), true).gradient!.data;
    const numeric = Array.from(values, (x, i) => {
      const up = values.slice();
      const down = values.slice();
      up[i] = x + 1e-3;
      down[i] = x - 1e-3;
      // Divide by the step that float32 really made.
      return (loss(at(up), false).value - loss(at(down), false).value) / (up[i] - down[i]);
    });
    expectNear(analytic, numeric, 1e-5);
  };

  const scores: LossScoreOptions[] = [
    { score: 'softmax' },
    { score: 'sigmoid' },
    { score: 'sigmoid', normalize: true },
    { score: 'sqrt-softplus' },
    { score: 'sqrt-softplus', normalize: true },
    { score: 'none' },
    { score: 'none', normalize: true },
  ];
  it.each(scores)('$score, normalize $normalize', (s) => {
    const values = s.score === 'none' ? data.map((x) => Math.abs(x) + 0.1) : data;
    check((l, gradient) => loadBalancingLossSync(l, indices, { ...o, ...s, gradient }), values);
    check((l, gradient) => importanceLossSync(l, { ...o, ...s, gradient }), values);
  });
  it('z-loss', () => check((l, gradient) => routerZLossSync(l, { ...o, gradient })));
});

describe('router losses refuse bad input', () => {
  const logits = floats([[1, 2]]);
  const ids = ints([[0]]);
  const out = floats([[0, 0]]);
  testRefusals([
    ['no logits', (o) => routerZLossSync(undefined as never, o), 'ERR_ARGUMENT', /logits/],
    ['no indices', (o) => loadBalancingLossSync(logits, undefined as never, o), 'ERR_ARGUMENT', /indices/],
    [
      'indices tokens',
      (o) => loadBalancingLossSync(logits, ints([[0], [1]]), o),
      'ERR_SHAPE',
      /indices: expected 1/,
    ],
    [
      'id',
      (o) => loadBalancingLossSync(logits, ints([[0, 2]]), o),
      'ERR_VALUE',
      /^indices\[0, 1\] is 2: expected -1 to 1$/,
    ],
    [
      'id of load',
      (o) => loadLossSync(ints([[0, -2]]), { ...o, numExperts: 2 }),
      'ERR_VALUE',
      /^indices\[0, 1\] is -2/,
    ],
    [
      'normalization',
      (o) => loadBalancingLossSync(logits, ids, { ...o, normalization: 'x' as never }),
      'ERR_OPTION',
      /normalization/,
    ],
    ['score', (o) => importanceLossSync(logits, { ...o, score: 'x' as never }), 'ERR_OPTION', /score.*none/],
    [
      'score of z',
      (o) => routerZLossSync(logits, { ...o, score: 'softmax' } as never),
      'ERR_OPTION',
      /score/,
    ],
    [
      'normalize',
      (o) => importanceLossSync(logits, { ...o, normalize: 1 as never }),
      'ERR_OPTION',
      /normalize/,
    ],
    [
      'gradient',
      (o) => routerZLossSync(logits, { ...o, gradient: 'yes' as never }),
      'ERR_OPTION',
      /gradient/,
    ],
    [
      'gradient of load',
      (o) => loadLossSync(ids, { ...o, numExperts: 2, gradient: true } as never),
      'ERR_OPTION',
      /gradient/,
    ],
    ['coefficient', (o) => routerZLossSync(logits, { ...o, coefficient: NaN }), 'ERR_OPTION', /coefficient/],
    [
      'mask size',
      (o) => routerZLossSync(logits, { ...o, mask: bytes([1, 1]) }),
      'ERR_SHAPE',
      /mask: expected \[1\]/,
    ],
    [
      'out without gradient',
      (o) => routerZLossSync(logits, { ...o, out }),
      'ERR_OPTION',
      /out.*gradient: true/,
    ],
    [
      'out overlaps',
      (o) => routerZLossSync(logits, { ...o, gradient: true, out: logits }),
      'ERR_ARGUMENT',
      /out overlaps/,
    ],
    ['numExperts', (o) => loadLossSync(ids, { ...o } as never), 'ERR_OPTION', /numExperts/],
    ['no options of load', () => loadLossSync(ids, undefined as never), 'ERR_ARGUMENT', /numExperts/],
  ]);

  it('an aborted signal rejects', async () => {
    await expect(loadBalancingLoss(logits, ids, { signal: AbortSignal.abort() })).rejects.toMatchObject({
      code: 'ERR_ABORTED',
    });
  });
});
