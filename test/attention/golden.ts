import { readFileSync } from 'node:fs';
import type { AttentionForwardOptions } from '../../lib/attention/index.ts';
import { Tensor } from '../../lib/index.ts';
import { floatTensor } from '../helpers/golden.ts';

interface Numbers {
  dims: number[];
  data: number[];
}

/** One case of test/golden/attention/attention.json. */
export interface GoldenCase {
  name: string;
  options: Record<string, unknown> & { blockIds?: { query: number[]; key: number[] } };
  q: Numbers;
  k: Numbers;
  v: Numbers;
  gradOutput: Numbers;
  output: Numbers;
  /** null stands for -Infinity. */
  logSumExp: (number | null)[];
  mask?: Numbers;
  bias?: Numbers;
  alibiSlopes?: number[];
  sinks?: number[];
  gradients: { query: Numbers; key: Numbers; value: Numbers; bias?: Numbers };
}

const file = new URL('../golden/attention/attention.json', import.meta.url);
export const goldenCases: GoldenCase[] = JSON.parse(readFileSync(file, 'utf8'));

export function goldenOptions(c: GoldenCase): Omit<AttentionForwardOptions, 'out'> {
  const options: Omit<AttentionForwardOptions, 'out'> = { ...c.options, blockIds: undefined };
  const ids = c.options.blockIds;
  if (ids) options.blockIds = { query: Int32Array.from(ids.query), key: Int32Array.from(ids.key) };
  if (c.mask) options.mask = new Tensor('uint8', Uint8Array.from(c.mask.data), c.mask.dims);
  if (c.bias) options.bias = floatTensor(c.bias);
  if (c.alibiSlopes) options.alibiSlopes = Float32Array.from(c.alibiSlopes);
  if (c.sinks) options.sinks = Float32Array.from(c.sinks);
  return options;
}
