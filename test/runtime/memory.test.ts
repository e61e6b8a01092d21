import { beforeAll, describe, expect, it } from 'vitest';
import { requireDist, runProgram } from '../helpers/program.ts';

beforeAll(requireDist);

interface Peaks {
  skipped?: string;
  results?: { tokens: number; grown: number; limit: number }[];
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
