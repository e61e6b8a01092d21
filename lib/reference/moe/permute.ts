import type { TypedArray } from '../../tensor.ts';

/** See native/moe/permute.h: out[r] = x[order[r] / k]. */
export function permuteReference(
  x: TypedArray,
  _type: number,
  tokens: number,
  width: number,
  k: number,
  order: Int32Array,
  routes: number,
  out: TypedArray,
): number {
  for (let r = 0; r < routes; r++) {
    if (order[r] < 0 || order[r] >= tokens * k) return r + 1;
  }
  for (let r = 0; r < routes; r++) {
    const token = Math.floor(order[r] / k);
    for (let i = 0; i < width; i++) out[r * width + i] = x[token * width + i];
  }
  return 0;
}
