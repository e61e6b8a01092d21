import { readFloat } from '../../dtype.ts';
import type { TypedArray } from '../../tensor.ts';
import { sigmoid } from '../gemm/activation.ts';

const SOFTMAX = 0;
const SIGMOID = 1;

/** One row of logits as numbers: NaN and masked become -Infinity; a row without a finite maximum, its limit. */
export function readRow(
  logits: TypedArray,
  type: number,
  row: number,
  experts: number,
  exists: (expert: number) => boolean,
): Float64Array {
  const l = new Float64Array(experts);
  for (let e = 0; e < experts; e++) {
    const x = readFloat(logits, type, row * experts + e);
    l[e] = Number.isNaN(x) || !exists(e) ? -Infinity : x;
  }
  const top = l.reduce((a, b) => Math.max(a, b), -Infinity);
  if (!Number.isFinite(top)) {
    for (let e = 0; e < experts; e++) l[e] = l[e] === top && exists(e) ? 0 : -Infinity;
  }
  return l;
}

/** softmax; all -Infinity gives zeros. */
export function softmax(x: ArrayLike<number>): Float64Array {
  const values = Float64Array.from(x);
  const top = values.reduce((a, b) => Math.max(a, b), -Infinity);
  if (top === -Infinity) return new Float64Array(values.length);
  const e = values.map((v) => Math.exp(v - top));
  const sum = e.reduce((a, b) => a + b, 0);
  return e.map((v) => v / sum);
}

export function softplus(x: number): number {
  return Math.max(x, 0) + Math.log1p(Math.exp(-Math.abs(x)));
}

/** Scores of all experts of a row. */
export function scores(l: Float64Array, score: number): Float64Array {
  if (score === SOFTMAX) return softmax(l);
  if (score === SIGMOID) return l.map(sigmoid);
  return l.map((x) => Math.sqrt(softplus(x)));
}

/** Weights of the selected experts `ids` (-1: weight 0) of a row of logits as {@link readRow} gives them. */
export function weightsOf(
  l: Float64Array,
  ids: ArrayLike<number>,
  score: number,
  overSelected: boolean,
  normalize: boolean,
  epsilon: number,
  floor: number,
  scale: number,
): Float64Array {
  const k = ids.length;
  const valid = Array.from(ids, (id) => id >= 0);
  const uniform = () => {
    const count = valid.filter(Boolean).length;
    return Float64Array.from(valid, (v) => (v ? scale / count : 0));
  };
  const selected = Float64Array.from(ids, (id) => (id < 0 ? -Infinity : l[id]));
  const noneFinite = selected.every((x) => x === -Infinity);
  if (overSelected) {
    return noneFinite ? uniform() : softmax(selected).map((p) => p * scale);
  }
  if (normalize && epsilon === 0 && floor === 0 && score === SOFTMAX && noneFinite) return uniform();
  const s = scores(l, score);
  const w = Float64Array.from(ids, (id) => (id < 0 ? 0 : s[id]));
  let divisor = 1;
  if (normalize) {
    divisor = Math.max(w.reduce((a, b) => a + b, 0) + epsilon, floor);
    // The sum of a softmax over few, very unlikely experts may underflow although its ratio is well defined.
    if (score === SOFTMAX && epsilon === 0 && floor === 0) return softmax(selected).map((p) => p * scale);
    if (divisor === 0) return new Float64Array(k);
  }
  return w.map((x) => (x / divisor) * scale);
}
