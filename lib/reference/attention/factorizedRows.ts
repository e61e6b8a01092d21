import { F, type FactorizedArguments } from '../../attention/factorizedLayout.ts';
import { readFloat } from '../../dtype.ts';
import type { TypedArray } from '../../tensor.ts';
import { capped } from './logits.ts';

/** A place of a sequence: a token, or the class token. */
export interface Place {
  batch: number;
  frame: number;
  patch: number;
  /** Row of the token in contiguous tensors: over [batch, frames, patches], or the packed order. -1: class token. */
  row: number;
}

/** Places that attend to each other, for a range of heads. */
export interface AxisSequence {
  batch: number;
  /** Counts the sequences of a batch entry. */
  index: number;
  places: Place[];
  firstHead: number;
  lastHead: number;
  causal: { left: number; right: number };
}

const [JOINT, TIME, SPACE, SPLIT] = [0, 1, 2, 3];

function tokensOf(args: FactorizedArguments, batch: number): Place[] {
  const [, , frames, patches] = args[0].subarray(F.axis, F.patches + 1);
  const all = Array.from({ length: frames * patches }, (_, i) => ({
    batch,
    frame: Math.floor(i / patches),
    patch: i % patches,
    row: batch * frames * patches + i,
  }));
  const frameOffsets = args[14];
  const patchOffsets = args[15];
  const order = args[16];
  if (frameOffsets === null || patchOffsets === null || order === null) return all;
  // Packed: a token belongs to the frame and to the patch whose list has its position.
  const frameOf = new Map<number, number>();
  for (let t = 0; t < frames; t++) {
    for (let i = frameOffsets[batch * frames + t]; i < frameOffsets[batch * frames + t + 1]; i++)
      frameOf.set(i, t);
  }
  const places: Place[] = [];
  for (let patch = 0; patch < patches; patch++) {
    for (let i = patchOffsets[batch * patches + patch]; i < patchOffsets[batch * patches + patch + 1]; i++) {
      places.push({ batch, frame: frameOf.get(order[i]) as number, patch, row: order[i] });
    }
  }
  return places.sort((a, b) => a.row - b.row);
}

/** The sequences of a problem. */
export function axisSequences(args: FactorizedArguments): AxisSequence[] {
  const n = args[0];
  const [axis, batch, frames, patches, heads] = n;
  const list: AxisSequence[] = [];
  const causal = { left: n[F.left], right: n[F.right] };
  const everything = { left: -1, right: -1 };
  for (let b = 0; b < batch; b++) {
    const tokens = tokensOf(args, b);
    const half = heads / 2;
    if (axis === JOINT) {
      list.push({ batch: b, index: 0, places: tokens, firstHead: 0, lastHead: heads, causal });
    }
    if (axis === TIME || axis === SPLIT) {
      const lastHead = axis === SPLIT ? half : heads;
      for (let patch = 0; patch < patches; patch++) {
        const places = tokens.filter((p) => p.patch === patch);
        list.push({ batch: b, index: patch, places, firstHead: 0, lastHead, causal });
      }
    }
    if (axis === SPACE || axis === SPLIT) {
      const firstHead = axis === SPLIT ? half : 0;
      for (let frame = 0; frame < frames; frame++) {
        const places = tokens.filter((p) => p.frame === frame);
        if (args[5] !== null) places.unshift({ batch: b, frame, patch: -1, row: -1 });
        const seen = axis === SPLIT ? everything : causal;
        list.push({ batch: b, index: frame, places, firstHead, lastHead: heads, causal: seen });
      }
    }
  }
  return list;
}

/** Index of the first element of a place's vector. */
export function vectorAt(
  args: FactorizedArguments,
  strides: number,
  classStrides: number,
  p: Place,
  head: number,
): number {
  const n = args[0];
  if (p.row < 0) return p.batch * n[classStrides] + head * n[classStrides + 1];
  if (args[13] !== null) return p.row * n[strides + 2] + head * n[strides + 3];
  return p.batch * n[strides] + p.frame * n[strides + 1] + p.patch * n[strides + 2] + head * n[strides + 3];
}

function vector(
  args: FactorizedArguments,
  data: TypedArray,
  classData: TypedArray | null,
  strides: number,
  classStrides: number,
  p: Place,
  head: number,
  dim: number,
): Float64Array {
  const from = p.row < 0 ? (classData as TypedArray) : data;
  const base = vectorAt(args, strides, classStrides, p, head);
  const step = args[0][strides + 4];
  return Float64Array.from({ length: dim }, (_, d) => readFloat(from, args[1], base + d * step));
}

export const readQuery = (a: FactorizedArguments, p: Place, h: number) =>
  vector(a, a[2], a[5], F.queryStrides, F.classQueryStrides, p, h, a[0][F.headDim]);
export const readKey = (a: FactorizedArguments, p: Place, h: number) =>
  vector(a, a[3], a[6], F.keyStrides, F.classKeyStrides, p, h, a[0][F.headDim]);
export const readValue = (a: FactorizedArguments, p: Place, h: number) =>
  vector(a, a[4], a[7], F.valueStrides, F.classValueStrides, p, h, a[0][F.valueDim]);

/** Index of a row of the log-sum-exp. */
export function lseAt(args: FactorizedArguments, p: Place, head: number): number {
  const [, , frames, patches, heads] = args[0];
  if (args[13] !== null) return p.batch * args[0][F.lseBatch] + p.row + head * args[0][F.lseHead];
  return ((p.batch * heads + head) * frames + p.frame) * patches + p.patch;
}

/** Index of a bias or mask element. */
export function pairAt(
  n: Float64Array,
  strides: number,
  s: AxisSequence,
  h: number,
  i: number,
  j: number,
): number {
  return s.batch * n[strides] + s.index * n[strides + 1] + h * n[strides + 2] + i * n[strides + 3] + j;
}

/** Whether place i of a sequence sees place j. */
export function placeIsVisible(
  args: FactorizedArguments,
  s: AxisSequence,
  h: number,
  i: number,
  j: number,
): boolean {
  const n = args[0];
  const distance = n[F.axis] === JOINT ? s.places[j].frame - s.places[i].frame : j - i;
  const { left, right } = s.causal;
  if ((left >= 0 && distance < -left) || (right >= 0 && distance > right)) return false;
  const mask = args[12];
  return mask === null || mask[pairAt(n, F.maskStrides, s, h, i, j)] !== 0;
}

/** Logit of a pair from its product, and its derivative by the scaled product. */
export function placeLogit(
  args: FactorizedArguments,
  s: AxisSequence,
  h: number,
  i: number,
  j: number,
  product: number,
): { logit: number; slope: number } {
  const n = args[0];
  let { logit, slope } = capped(n[F.scale] * product, n[F.softcap]);
  const bias = args[8];
  if (bias !== null) logit += readFloat(bias, args[9], pairAt(n, F.biasStrides, s, h, i, j));
  const alibi = args[10];
  if (alibi !== null) logit -= alibi[h] * Math.abs(i - j);
  return { logit, slope };
}

/** Weights of one row: softmax with sinks, empty rows as the problem wants them. */
export function placeWeights(
  args: FactorizedArguments,
  s: AxisSequence,
  h: number,
  i: number,
  products: Float64Array,
): { weights: Float64Array; slopes: Float64Array; lse: number } {
  const sinks = args[11];
  const logits = new Float64Array(products.length).fill(-Infinity);
  const slopes = new Float64Array(products.length);
  let max = sinks === null ? -Infinity : sinks[h];
  for (let j = 0; j < products.length; j++) {
    if (!placeIsVisible(args, s, h, i, j)) continue;
    ({ logit: logits[j], slope: slopes[j] } = placeLogit(args, s, h, i, j, products[j]));
    if (!(logits[j] <= max)) max = logits[j];
  }
  if (max === -Infinity) {
    const share = args[0][F.uniformEmpty] !== 0 ? 1 / products.length : 0;
    return { weights: new Float64Array(products.length).fill(share), slopes: slopes.fill(0), lse: -Infinity };
  }
  let sum = sinks === null ? 0 : Math.exp(sinks[h] - max);
  const weights = logits.map((z) => (z === -Infinity ? 0 : Math.exp(z - max)));
  for (const w of weights) sum += w;
  return { weights: weights.map((w) => w / sum), slopes, lse: max + Math.log(sum) };
}
