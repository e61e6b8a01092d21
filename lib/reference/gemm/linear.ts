import { readFloat, writeFloat } from '../../dtype.ts';
import type { TypedArray } from '../../tensor.ts';
import { gatedActivation } from './activation.ts';
import { quantizedActivations, type WeightType } from './quantize.ts';

/** A weight matrix of the reference backend: rows as their packed type represents them. */
export interface ReferenceMatrix {
  type: WeightType;
  group: number;
  n: number;
  k: number;
  rows: Float32Array[];
}

export const LINEAR_ACTIVATIONS = [
  'none',
  'silu',
  'gelu-tanh',
  'gelu',
  'relu',
  'relu-squared',
  'sigmoid',
  'tanh',
] as const;
export type LinearActivation = (typeof LINEAR_ACTIVATIONS)[number];

/** Inner product in float64. */
export function dot(a: ArrayLike<number>, b: ArrayLike<number>): number {
  let sum = 0;
  for (let i = 0; i < a.length; i++) sum += a[i] * b[i];
  return sum;
}

export function linearReference(
  weight: ReferenceMatrix,
  x: TypedArray,
  type: number,
  rows: number,
  bias: Float32Array | null,
  activation: number,
  out: TypedArray,
  outType: number,
): number {
  const kind = LINEAR_ACTIVATIONS[activation];
  for (let m = 0; m < rows; m++) {
    const row = Float64Array.from({ length: weight.k }, (_, i) => readFloat(x, type, m * weight.k + i));
    const a = quantizedActivations(row, weight.type, weight.group);
    for (let n = 0; n < weight.n; n++) {
      const v = dot(weight.rows[n], a) + (bias === null ? 0 : bias[n]);
      let y = v;
      if (kind === 'sigmoid') y = 1 / (1 + Math.exp(-v));
      else if (kind === 'tanh') y = Math.tanh(v);
      else if (kind !== 'none') y = gatedActivation(kind, v, 1, 0, 0);
      writeFloat(out, outType, m * weight.n + n, y);
    }
  }
  return 0;
}
