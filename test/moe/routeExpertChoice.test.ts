import { describe, expect, it } from 'vitest';
import { Tensor } from '../../lib/index.ts';
import { routeExpertChoice, routeExpertChoiceSync } from '../../lib/moe/index.ts';
import { routeExpertChoiceCases } from '../cases/moe/routeExpertChoice.ts';
import { everyVariant } from '../helpers/backends.ts';
import { testCases } from '../helpers/cases.ts';
import { testRefusals } from '../helpers/errors.ts';
import { expectNear } from '../helpers/golden.ts';

testCases(routeExpertChoiceCases);

const logitsOf = (rows: number[][]) =>
  new Tensor('float32', Float32Array.from(rows.flat()), [rows.length, rows[0].length]);

describe.each(everyVariant())('routeExpertChoice on $name', ({ options, use }) => {
  it('worked by hand', () => {
    use();
    // Softmax per token: (1/4, 3/4), (1/2, 1/2), (2/3, 1/3).
    const ln = Math.log;
    const logits = logitsOf([
      [0, ln(3)],
      [5, 5],
      [ln(2), 0],
    ]);
    const r = routeExpertChoiceSync(logits, { ...options, capacity: 2 });
    expect(r.indices.dims).toEqual([2, 2]);
    expect(Array.from(r.indices.data)).toEqual([2, 1, 0, 1]);
    expectNear(r.weights.data, [2 / 3, 1 / 2, 3 / 4, 1 / 2]);
  });

  it('ties go to the lower token; NaN and infinities give distinct tokens and finite weights', () => {
    use();
    const equal = routeExpertChoiceSync(logitsOf(new Array(9).fill([1, 1])), { ...options, capacity: 4 });
    expect(Array.from(equal.indices.data)).toEqual([0, 1, 2, 3, 0, 1, 2, 3]);
    const rows = [
      [NaN, NaN, NaN],
      [Infinity, 0, Infinity],
      [-Infinity, -Infinity, -Infinity],
      [1, NaN, -Infinity],
    ];
    const r = routeExpertChoiceSync(logitsOf(rows), { ...options, capacity: 4 });
    for (let e = 0; e < 3; e++) expect(new Set(r.indices.data.slice(4 * e, 4 * e + 4)).size).toBe(4);
    // Expert 0: 1 for token 3, 1/2 for token 1, 1/3 for tokens 0 and 2.
    expect(Array.from(r.indices.data.slice(0, 4))).toEqual([3, 1, 0, 2]);
    expectNear(r.weights.data.slice(0, 4), [1, 1 / 2, 1 / 3, 1 / 3]);
  });

  it('out is used', () => {
    use();
    const logits = logitsOf([[1, 2]]);
    const out = routeExpertChoiceSync(logits, { ...options, capacity: 1 });
    expect(routeExpertChoiceSync(logits, { ...options, capacity: 1, out }).weights.data).toBe(
      out.weights.data,
    );
  });
});

describe('routeExpertChoice refuses bad input', () => {
  const good = logitsOf([
    [1, 2],
    [3, 4],
  ]);
  const out = routeExpertChoiceSync(good, { capacity: 1 });
  testRefusals([
    ['no options', () => routeExpertChoiceSync(good, undefined as never), 'ERR_ARGUMENT', /capacity/],
    [
      'capacity > T',
      (o) => routeExpertChoiceSync(good, { ...o, capacity: 3 }),
      'ERR_OPTION',
      /capacity.*2, got 3/,
    ],
    ['capacity', (o) => routeExpertChoiceSync(good, { ...o } as never), 'ERR_OPTION', /capacity/],
    [
      'score',
      (o) => routeExpertChoiceSync(good, { ...o, capacity: 1, score: 'x' as never }),
      'ERR_OPTION',
      /score/,
    ],
    [
      'unknown option',
      (o) => routeExpertChoiceSync(good, { ...o, capacity: 1, k: 1 } as never),
      'ERR_OPTION',
      /'k'/,
    ],
    ['type', (o) => routeExpertChoiceSync(out.indices, { ...o, capacity: 1 }), 'ERR_DTYPE', /logits/],
    ['out', (o) => routeExpertChoiceSync(good, { ...o, capacity: 2, out }), 'ERR_SHAPE', /out.indices/],
  ]);

  it('an aborted signal rejects', async () => {
    await expect(routeExpertChoice(good, { capacity: 1, signal: AbortSignal.abort() })).rejects.toMatchObject(
      { code: 'ERR_ABORTED' },
    );
  });
});
