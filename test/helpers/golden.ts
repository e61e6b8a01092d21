import { readFileSync } from 'node:fs';
import { fileURLToPath } from 'node:url';
import { expect } from 'vitest';
import { Tensor } from '../../lib/tensor.ts';

/** A tensor as golden files write it. */
export interface GoldenTensor {
  dims: number[];
  data: number[];
}

/** Reads a JSON file below test/golden. */
export function readGolden<T>(path: string): T {
  return JSON.parse(readFileSync(fileURLToPath(new URL(`../golden/${path}`, import.meta.url)), 'utf8'));
}

export const floatTensor = (t: GoldenTensor) => new Tensor('float32', Float32Array.from(t.data), t.dims);
export const intTensor = (t: GoldenTensor) => new Tensor('int32', Int32Array.from(t.data), t.dims);

/** ‖actual − expected‖ ≤ tolerance ‖expected‖, with equal lengths. */
export function expectNear(actual: ArrayLike<number>, expected: ArrayLike<number>, tolerance = 1e-6): void {
  expect(actual.length).toBe(expected.length);
  let difference = 0;
  let norm = 0;
  for (let i = 0; i < expected.length; i++) {
    difference += (actual[i] - expected[i]) ** 2;
    norm += expected[i] ** 2;
  }
  expect(Math.sqrt(difference)).toBeLessThanOrEqual(tolerance * Math.sqrt(norm));
}

/** ‖actual − expected‖ / ‖expected‖. */
export function relativeError(actual: ArrayLike<number>, expected: ArrayLike<number>): number {
  if (actual.length !== expected.length) return Infinity;
  let difference = 0;
  let norm = 0;
  for (let i = 0; i < actual.length; i++) {
    if (actual[i] === expected[i]) {
      if (Number.isFinite(expected[i])) norm += expected[i] ** 2;
      continue;
    }
    difference += (actual[i] - expected[i]) ** 2;
    norm += expected[i] ** 2;
  }
  return difference === 0 ? 0 : Math.sqrt(difference / norm);
}
