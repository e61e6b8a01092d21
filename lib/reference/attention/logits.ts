import { type AttentionArguments, N } from '../../attention/layout.ts';
import { readFloat } from '../../dtype.ts';
import type { TypedArray } from '../../tensor.ts';

/** One sequence: a batch entry, or a segment of the packed batch. */
export interface Sequence {
  batch: number;
  queryBegin: number;
  queries: number;
  keyBegin: number;
  keys: number;
}

/** The sequences of a problem; each attends only to itself. */
export function sequencesOf(args: AttentionArguments): Sequence[] {
  const n = args[0];
  const queryOffsets = args[13];
  const keyOffsets = args[14];
  if (queryOffsets === null || keyOffsets === null) {
    return Array.from({ length: n[N.batch] }, (_, batch) => ({
      batch,
      queryBegin: 0,
      queries: n[N.queries],
      keyBegin: 0,
      keys: n[N.keys],
    }));
  }
  return Array.from({ length: n[N.segments] }, (_, s) => ({
    batch: 0,
    queryBegin: queryOffsets[s],
    queries: queryOffsets[s + 1] - queryOffsets[s],
    keyBegin: keyOffsets[s],
    keys: keyOffsets[s + 1] - keyOffsets[s],
  }));
}

/** Element (b, s, h, :) of a strided tensor as numbers. */
export function readVector(
  data: TypedArray,
  type: number,
  n: Float64Array,
  strides: number,
  b: number,
  s: number,
  h: number,
  dim: number,
): Float64Array {
  const base = b * n[strides] + s * n[strides + 1] + h * n[strides + 2];
  return Float64Array.from({ length: dim }, (_, d) => readFloat(data, type, base + d * n[strides + 3]));
}

/** The vectors of one head over a range of positions. */
export function readHead(
  data: TypedArray,
  type: number,
  n: Float64Array,
  strides: number,
  b: number,
  begin: number,
  count: number,
  h: number,
  dim: number,
): Float64Array[] {
  return Array.from({ length: count }, (_, i) => readVector(data, type, n, strides, b, begin + i, h, dim));
}

/** Whether query i of head h sees key j; i and j count inside the sequence. */
export function isVisible(args: AttentionArguments, s: Sequence, h: number, i: number, j: number): boolean {
  const n = args[0];
  const [, , , , , , , , , mask, blockMask, queryIds, keyIds] = args;
  const distance = j - (i + s.keys - s.queries);
  let seen = (n[N.left] < 0 || distance >= -n[N.left]) && (n[N.right] < 0 || distance <= n[N.right]);
  const qi = s.queryBegin + i;
  const kj = s.keyBegin + j;
  if (!seen && queryIds !== null && keyIds !== null) {
    const id = queryIds[s.batch * n[N.queryIdStride] + qi];
    seen = id >= 0 && id === keyIds[s.batch * n[N.keyIdStride] + kj];
  }
  const row = (strides: number, q: number) => s.batch * n[strides] + h * n[strides + 1] + q * n[strides + 2];
  if (seen && mask !== null) seen = mask[row(N.maskStrides, qi) + kj] !== 0;
  if (seen && blockMask !== null) {
    const q = Math.floor(qi / n[N.blockQuery]);
    seen = blockMask[row(N.blockStrides, q) + Math.floor(kj / n[N.blockKey])] !== 0;
  }
  return seen;
}

/** A scaled product under the cap (0: none), and the derivative by it. */
export function capped(scaled: number, softcap: number): { logit: number; slope: number } {
  if (softcap === 0) return { logit: scaled, slope: 1 };
  const t = Math.tanh(scaled / softcap);
  return { logit: softcap * t, slope: 1 - t * t };
}

/** Logit of a visible pair from its product, and the derivative of the logit by the scaled product. */
export function logitOf(
  args: AttentionArguments,
  s: Sequence,
  h: number,
  i: number,
  j: number,
  product: number,
): { logit: number; slope: number } {
  const n = args[0];
  const bias = args[5];
  const alibi = args[7];
  let { logit, slope } = capped(n[N.scale] * product, n[N.softcap]);
  if (bias !== null) {
    const row =
      s.batch * n[N.biasStrides] + h * n[N.biasStrides + 1] + (s.queryBegin + i) * n[N.biasStrides + 2];
    logit += readFloat(bias, args[6], row + s.keyBegin + j);
  }
  if (alibi !== null) logit -= alibi[h] * Math.abs(i + s.keys - s.queries - j);
  return { logit, slope };
}

/** Sum of products of two vectors. */
