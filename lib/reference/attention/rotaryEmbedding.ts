import { readFloat, writeFloat } from '../../dtype.ts';
import type { TypedArray } from '../../tensor.ts';

/** See native/attention/rotary_embedding.h for the definition; this is the same function in float64. */
export function rotaryEmbeddingReference(
  x: TypedArray,
  type: number,
  batch: number,
  length: number,
  heads: number,
  dim: number,
  positions: Int32Array | null,
  axisStride: number,
  batchStride: number,
  offset: number,
  frequency: Float64Array,
  axis: Int32Array,
  _count: number,
  angle: Int32Array,
  partner: Int32Array,
  factor: number,
  out: TypedArray,
): number {
  for (let b = 0; b < batch; b++) {
    for (let s = 0; s < length; s++) {
      const angles = Array.from(frequency, (f, i) => {
        const p = positions === null ? offset + s : positions[axis[i] * axisStride + b * batchStride + s];
        return p * f;
      });
      for (let h = 0; h < heads; h++) {
        const base = ((b * length + s) * heads + h) * dim;
        for (let e = 0; e < dim; e++) {
          let y = readFloat(x, type, base + e);
          if (partner[e] >= 0) {
            const other = readFloat(x, type, base + partner[e]);
            const a = angles[angle[e]];
            // The first of a pair loses what the second gains.
            y = factor * (y * Math.cos(a) + (partner[e] > e ? -other : other) * Math.sin(a));
          }
          writeFloat(out, type, base + e, y);
        }
      }
    }
  }
  return 0;
}
