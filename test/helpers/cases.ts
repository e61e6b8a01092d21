import { afterAll, describe, expect, it } from 'vitest';
import { setDefaults } from '../../lib/backend.ts';
import { compareOutputs, type OpCase, passes, sameBits } from '../cases/case.ts';
import { Random } from '../cases/random.ts';
import { nativeVariants } from './backends.ts';

/**
 * The standard tests of an op's table: every case on every backend and instruction set against the reference,
 * sync and async alike, bitwise equal for 1, 2 and 4 threads.
 */
export function testCases(cases: OpCase[]): void {
  const variants = nativeVariants();
  afterAll(() => {
    if (variants.length > 0) setDefaults({ isa: 'auto' });
  });
  const small = cases.filter((c) => !c.bench && c.verify !== false);
  for (const [index, c] of small.entries()) {
    describe(`${c.op}: ${c.name}`, () => {
      const prepared = c.prepare(new Random(1000 + index));
      const compare = prepared.compare ?? compareOutputs;
      const expected = prepared.run({ backend: 'reference' });

      it('reference, asynchronously', async () => {
        expect(sameBits(await prepared.runAsync({ backend: 'reference' }), expected)).toBe(true);
      });

      for (const variant of variants) {
        it(variant.name, async () => {
          variant.use();
          const actual = prepared.run({ ...variant.options, threads: 1 });
          const c1 = compare(actual, expected);
          expect(c1.detail).toBeUndefined();
          expect(c1.relative).toBeLessThanOrEqual(c.tolerance);
          expect(passes(c1, c.tolerance)).toBe(true);
          for (const threads of [2, 4]) {
            expect(sameBits(prepared.run({ ...variant.options, threads }), actual)).toBe(true);
            expect(sameBits(await prepared.runAsync({ ...variant.options, threads }), actual)).toBe(true);
          }
        });
      }
    });
  }
}
