import { describe, expect, it } from 'vitest';
import { Tensor } from '../../lib/index.ts';
import { routeSinkhorn, routeSinkhornSync, routeTopKSync } from '../../lib/moe/index.ts';
import { routeSinkhornCases } from '../cases/moe/routeSinkhorn.ts';
import { Random } from '../cases/random.ts';
import { everyVariant } from '../helpers/backends.ts';
import { testCases } from '../helpers/cases.ts';
import { testRefusals } from '../helpers/errors.ts';
import { expectNear } from '../helpers/golden.ts';

testCases(routeSinkhornCases);

const logitsOf = (rows: number[][]) =>
  new Tensor('float32', Float32Array.from(rows.flat()), [rows.length, rows[0].length]);

describe.each(everyVariant())('routeSinkhorn on $name', ({ options, use }) => {
  it('worked by hand: a row that prefers an expert less gives it up', () => {
    use();
    // Both prefer expert 0, so expert 1 goes to the token that wants it more: exp is [[4, 1], [2, 1]].
    const ln = Math.log;
    const logits = logitsOf([
      [ln(4), 0],
      [ln(2), 0],
    ]);
    const r = routeSinkhornSync(logits, { ...options, k: 1 });
    expect(Array.from(r.indices.data)).toEqual([0, 1]);
    expectNear(r.weights.data, [4 / 5, 1 / 2]);
    expect(r.converged).toBe(true);
    const plain = routeSinkhornSync(logits, { ...options, k: 1, training: false });
    expect(Array.from(plain.indices.data)).toEqual([0, 0]);
    expect([plain.iterations, plain.converged]).toEqual([0, true]);
  });

  it('evaluation is routeTopK with the same score', () => {
    use();
    const logits = new Tensor('float32', new Random(4).normals(30 * 20, 2), [30, 20]);
    for (const k of [1, 4]) {
      const a = routeSinkhornSync(logits, { ...options, k, training: false });
      const b = routeTopKSync(logits, { ...options, k, score: k === 1 ? 'sigmoid' : 'softmax' });
      expect(a.indices.data).toEqual(b.indices.data);
      expect(a.weights.data).toEqual(b.weights.data);
    }
  });

  it('a constant added to a row changes nothing, and logits of ±10,000 do not overflow', () => {
    use();
    const random = new Random(6);
    const [tokens, experts] = [64, 8];
    const rows = Array.from({ length: tokens }, () =>
      Array.from({ length: experts }, () => Math.round(random.normal() * 64) / 64),
    );
    // Multiples of 1/64 are exact beside 10,000 in float32, so the shifted logits are the same numbers.
    const shifts = [0, 10000, -10000, 50, -50];
    const shifted = rows.map((row, t) => row.map((x) => x + shifts[t % 5]));
    const a = routeSinkhornSync(logitsOf(rows), { ...options, k: 2 });
    const b = routeSinkhornSync(logitsOf(shifted), { ...options, k: 2 });
    expect(b.indices.data).toEqual(a.indices.data);
    expect(b.weights.data).toEqual(a.weights.data);
    expect(b.iterations).toBe(a.iterations);
    const extreme = new Tensor('float32', random.normals(tokens * experts, 10000), [tokens, experts]);
    const r = routeSinkhornSync(extreme, { ...options, k: 2 });
    for (const w of r.weights.data) expect(Number.isFinite(w)).toBe(true);
  });

  it('balances: no expert of a skewed batch stays without tokens', () => {
    use();
    const random = new Random(8);
    const [tokens, experts] = [400, 8];
    const data = random.normals(tokens * experts).map((x, i) => x + (i % experts) * 0.8);
    const logits = new Tensor('float32', data, [tokens, experts]);
    const counts = (training: boolean) => {
      const c = new Array(experts).fill(0);
      for (const id of routeSinkhornSync(logits, { ...options, k: 1, training }).indices.data) c[id]++;
      return c;
    };
    expect(Math.min(...counts(true))).toBeGreaterThan(tokens / experts / 2);
    expect(Math.min(...counts(false))).toBeLessThan(tokens / experts / 8);
  });

  it('says when it did not converge', () => {
    use();
    const logits = new Tensor('float32', new Random(2).normals(40 * 9, 2), [40, 9]);
    const r = routeSinkhornSync(logits, { ...options, k: 2, maxIterations: 2 });
    expect([r.iterations, r.converged]).toEqual([2, false]);
  });

  it('NaN, infinities and one token give k distinct valid ids and finite weights', () => {
    use();
    const rows = [
      new Array(12).fill(NaN),
      new Array(12).fill(Infinity),
      new Array(12).fill(-Infinity),
      Array.from({ length: 12 }, (_, i) => (i % 3 === 0 ? NaN : i % 3 === 1 ? Infinity : -Infinity)),
    ];
    for (const batch of [rows, [rows[0]], [rows[3]]]) {
      const r = routeSinkhornSync(logitsOf(batch), { ...options, k: 6 });
      for (let t = 0; t < batch.length; t++) {
        const ids = r.indices.data.slice(6 * t, 6 * t + 6);
        expect(new Set(ids).size).toBe(6);
        for (const id of ids) expect(id >= 0 && id < 12).toBe(true);
      }
      for (const w of r.weights.data) expect(Number.isFinite(w)).toBe(true);
    }
  });
});

describe('routeSinkhorn refuses bad input', () => {
  const good = logitsOf([[1, 2, 3]]);
  testRefusals([
    ['no options', () => routeSinkhornSync(good, undefined as never), 'ERR_ARGUMENT', /k/],
    ['k', (o) => routeSinkhornSync(good, { ...o, k: 4 }), 'ERR_OPTION', /^k .*got 4/],
    ['tolerance', (o) => routeSinkhornSync(good, { ...o, k: 1, tolerance: -1 }), 'ERR_OPTION', /tolerance/],
    ['epsilon', (o) => routeSinkhornSync(good, { ...o, k: 1, epsilon: 0 }), 'ERR_OPTION', /epsilon/],
    [
      'maxIterations',
      (o) => routeSinkhornSync(good, { ...o, k: 1, maxIterations: 0 }),
      'ERR_OPTION',
      /maxIterations/,
    ],
    [
      'training',
      (o) => routeSinkhornSync(good, { ...o, k: 1, training: 1 as never }),
      'ERR_OPTION',
      /training/,
    ],
    ['score', (o) => routeSinkhornSync(good, { ...o, k: 1, score: 'x' as never }), 'ERR_OPTION', /score/],
    [
      'unknown option',
      (o) => routeSinkhornSync(good, { ...o, k: 1, normalize: true } as never),
      'ERR_OPTION',
      /normalize/,
    ],
    [
      'out',
      (o) => routeSinkhornSync(good, { ...o, k: 1, out: routeTopKSync(good, { k: 2 }) }),
      'ERR_SHAPE',
      /out.indices/,
    ],
  ]);

  it('an aborted signal rejects', async () => {
    await expect(routeSinkhorn(good, { k: 1, signal: AbortSignal.abort() })).rejects.toMatchObject({
      code: 'ERR_ABORTED',
    });
  });
});
