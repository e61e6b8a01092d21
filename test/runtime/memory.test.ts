import { beforeAll, describe, expect, it } from 'vitest';
import { requireDist, runProgram } from '../helpers/program.ts';

beforeAll(requireDist);

interface Peaks {
  skipped?: string;
  results?: { grown: number; limit: number }[];
}

describe('peak memory of an expert forward beyond its weights', () => {
  // k T (f + d) floats of routes, and 64 MiB.
  it.each(['float32', 'bfloat16', 'int8', 'int4', 'mxfp4'])('%s', async (type) => {
    const { skipped, results } = await runProgram<Peaks>('expertsMemory.mjs', [type], {
      nodeArgs: ['--expose-gc'],
    });
    if (skipped !== undefined) {
      console.log(`skipped: ${skipped}`);
      return;
    }
    expect(results).toHaveLength(3);
    for (const { grown, limit } of results!) expect(grown).toBeLessThan(limit);
  });
});

describe('peak memory of a private step beyond its tensors', () => {
  it('does not grow with the batch times the parameters', async () => {
    const { skipped, results } = await runProgram<Peaks>('privateStepMemory.mjs', [], {
      nodeArgs: ['--expose-gc'],
    });
    if (skipped !== undefined) {
      console.log(`skipped: ${skipped}`);
      return;
    }
    expect(results).toHaveLength(6);
    for (const { grown, limit } of results!) expect(grown).toBeLessThan(limit);
  });
});

it('full attention over 65,536 keys takes less than 32 MiB beyond its tensors', async () => {
  const { skipped, grown, finite } = await runProgram<{ skipped?: string; grown?: number; finite?: boolean }>(
    'attentionMemory.mjs',
    [],
    { nodeArgs: ['--expose-gc'] },
  );
  if (skipped !== undefined) {
    console.log(`skipped: ${skipped}`);
    return;
  }
  expect(finite).toBe(true);
  expect(grown).toBeLessThan(32 * 2 ** 20);
});
