import { readFloat, writeFloat } from '../../dtype.ts';
import type { TypedArray } from '../../tensor.ts';

/** See native/moe/combine.h: out[t] = sum over j of weights[t, j] * y[inverse[t, j]], in float64. */
export function combineReference(
  y: TypedArray,
  type: number,
  routes: number,
  tokens: number,
  width: number,
  k: number,
  inverse: Int32Array,
  weights: Float32Array | null,
  out: TypedArray,
  outType: number,
): number {
  for (let i = 0; i < tokens * k; i++) {
    if (inverse[i] < -1 || inverse[i] >= routes) return i + 1;
  }
  for (let t = 0; t < tokens; t++) {
    for (let i = 0; i < width; i++) {
      let sum = 0;
      for (let j = 0; j < k; j++) {
        const row = inverse[t * k + j];
        if (row < 0) continue;
        const weight = weights === null ? 1 : weights[t * k + j];
        sum += weight * readFloat(y, type, row * width + i);
      }
      writeFloat(out, outType, t * width + i, sum);
    }
  }
  return 0;
}
