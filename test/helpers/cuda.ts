import { describe, expect, it } from 'vitest';
import { cudaDevice, info } from '../../lib/backend.ts';
import { cudaMemory } from '../../lib/device.ts';
import { compareOutputs, type OpCase, passes, sameBits } from '../cases/case.ts';
import { allCases } from '../cases/index.ts';
import { Random } from '../cases/random.ts';

/**
 * Whether backend cuda runs here: on a GPU, or on the host shim when HEDDLE_CUDA_LIBRARY names its library (as
 * `npm test` does in the part "CUDA kernels on the host shim"). Says why when it does not.
 */
export function hasCuda(): boolean {
  const { cuda } = info().backends;
  if (!cuda.available && process.env['HEDDLE_TEST_CUDA'] === 'required') throw new Error(cuda.reason);
  if (!cuda.available) console.log(`cuda tests skipped: ${cuda.reason}`);
  return cuda.available;
}

/** Names of the ops that the loaded library has. */
export function cudaOps(): string[] {
  return Object.keys(cudaDevice().ops).filter((name) => name !== 'upload' && name !== 'download');
}

/**
 * Every case of a family's tables whose op has a CUDA kernel against the reference: sync and async, and bitwise equal
 * between runs (on the host shim each run takes another order of threads, so this is what finds missing barriers).
 * @param ops the ops of this family that must have one
 * @param some kernels: names, where they are not those of the ops; serve: the cases that run here (default: all)
 */
export function testCudaCases(
  family: string,
  ops: readonly string[],
  some?: { kernels?: readonly string[]; serve?: (c: OpCase) => boolean },
): void {
  describe.skipIf(!hasCuda())(`cuda, ${family}`, () => {
    it('has the kernels it should', () => {
      if (some?.kernels) {
        expect(cudaOps()).toEqual(expect.arrayContaining([...some.kernels]));
        return;
      }
      const inTables = new Set(allCases.filter((c) => c.family === family).map((c) => c.op));
      expect(cudaOps().filter((op) => inTables.has(op))).toEqual([...ops]);
    });
    const small = allCases.filter(
      (c) =>
        c.family === family &&
        ops.includes(c.op) &&
        !c.bench &&
        c.verify !== false &&
        c.cuda !== false &&
        (some?.serve?.(c) ?? true),
    );
    for (const [index, c] of small.entries()) {
      it(`${c.op}: ${c.name}`, () => testCase(c, index), 120_000);
    }
  });
}

async function testCase(c: OpCase, index: number): Promise<void> {
  const prepared = c.prepare(new Random(1000 + index));
  const before = cudaMemory();
  try {
    const expected = prepared.run({ backend: 'reference' });
    const actual = prepared.run({ backend: 'cuda' });
    const compared = (prepared.compare ?? compareOutputs)(actual, expected);
    expect(compared.detail).toBeUndefined();
    expect(compared.relative).toBeLessThanOrEqual(c.tolerance);
    expect(passes(compared, c.tolerance)).toBe(true);
    expect(sameBits(prepared.run({ backend: 'cuda' }), actual)).toBe(true);
    expect(sameBits(await prepared.runAsync({ backend: 'cuda' }), actual)).toBe(true);
  } finally {
    prepared.dispose?.();
  }
  const after = cudaMemory();
  expect({ live: after.live, jobs: after.jobs }).toEqual({ live: before.live, jobs: before.jobs });
}
