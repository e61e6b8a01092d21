import type { TypedArray } from '../../tensor.ts';

/** See native/nn/gather_rows.h. */
export function gatherRowsReference(
  x: TypedArray,
  _type: number,
  rows: number,
  width: number,
  index: Int32Array,
  count: number,
  fill: TypedArray | null,
  out: TypedArray,
): number {
  for (let r = 0; r < count; r++) {
    if (index[r] < -1 || index[r] >= rows) return r + 1;
  }
  for (let r = 0; r < count; r++) {
    for (let i = 0; i < width; i++) {
      const empty = fill === null ? 0 : fill[i];
      out[r * width + i] = index[r] < 0 ? empty : x[index[r] * width + i];
    }
  }
  return 0;
}
