import { expect } from 'vitest';
import { Tensor } from '../../lib/index.ts';
import type { ExpertCache } from '../../lib/moe/expertCache.ts';
import type { ExpertWeights } from '../../lib/moe/experts.ts';
import { MoELayer, type MoELayerOptions } from '../../lib/moe/index.ts';
import { goldenIo } from './checkpoints.ts';

export type Options = Omit<MoELayerOptions, 'layer' | 'memoryBudget'>;

/** What a packed expert takes, from the refusal of a budget that is too small. */
export async function expertBytes(directory: string, options: Options): Promise<number> {
  try {
    await MoELayer.load(directory, { layer: 1, memoryBudget: 1, ...options });
  } catch (error) {
    const found = /memoryBudget of 1 bytes holds no expert: one takes (\d+) bytes/.exec(`${error}`);
    if (found) return Number(found[1]);
    throw error;
  }
  throw new Error('a budget of one byte was accepted');
}

/** A layer whose budget holds `slots` experts, and not a byte less than one more. */
export async function budgeted(directory: string, slots: number, options: Options = {}) {
  const bytes = await expertBytes(directory, options);
  const memoryBudget = (slots + 1) * bytes - 1;
  return { layer: await MoELayer.load(directory, { layer: 1, memoryBudget, ...options }), bytes };
}

/** Private parts, for tests of the cache alone. */
export const inner = (layer: MoELayer) =>
  (layer as never as { parts: { experts: ExpertWeights; cache: ExpertCache } }).parts;
export const pinsOf = (layer: MoELayer) =>
  (inner(layer).cache as never as { pins: Map<number, number> }).pins;
/** The golden input as `[38, hidden]`. */
export const inputOf = (name: string) => {
  const { input } = goldenIo(name);
  return input.reshape([38, input.dims[2]]) as Tensor<'float32'>;
};
export const rows = (x: Tensor<'float32'>, from: number, count: number) =>
  new Tensor('float32', x.data.slice(from * x.dims[1], (from + count) * x.dims[1]), [count, x.dims[1]]);

/** Counters that must hold whenever no forward runs. */
export function checkAtRest(layer: MoELayer, bytes: number) {
  const c = layer.cache!;
  expect([...pinsOf(layer).values()].every((n) => n === 0)).toBe(true);
  expect(c.bytes).toBe(pinsOf(layer).size * bytes);
  expect(c.misses - c.evictions).toBe(pinsOf(layer).size);
  expect(c.bytes).toBeLessThanOrEqual(c.budget);
  const { experts } = inner(layer);
  expect(experts.bytes).toBe(c.bytes);
  if (layer.backend === 'cpu') {
    experts.account(); // what is really packed
    expect(experts.bytes).toBe(c.bytes);
  }
}
