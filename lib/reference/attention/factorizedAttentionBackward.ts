import { F, FACTORIZED_ARGUMENTS, type FactorizedArguments } from '../../attention/factorizedLayout.ts';
import { readFloat, writeFloat } from '../../dtype.ts';
import type { TypedArray } from '../../tensor.ts';
import { dot } from '../gemm/linear.ts';
import {
  axisSequences,
  lseAt,
  type Place,
  pairAt,
  placeIsVisible,
  placeLogit,
  placeWeights,
  readKey,
  readQuery,
  readValue,
  vectorAt,
} from './factorizedRows.ts';

type Tail = [
  upstream: TypedArray,
  output: TypedArray,
  logSumExp: Float32Array,
  classUpstream: TypedArray | null,
  queryGrad: TypedArray,
  keyGrad: TypedArray,
  valueGrad: TypedArray,
  biasGrad: Float32Array | null,
  classQueryGrad: TypedArray | null,
  classKeyGrad: TypedArray | null,
  classValueGrad: TypedArray | null,
];

/** Sums of a gradient [rows, heads, dim] in float64, with the class token's [batch, heads, dim] apart. */
class Sums {
  readonly tokens: Float64Array;
  readonly classes: Float64Array;
  constructor(
    private readonly to: TypedArray,
    private readonly classTo: TypedArray | null,
    private readonly heads: number,
    private readonly dim: number,
  ) {
    this.tokens = new Float64Array(to.length);
    this.classes = new Float64Array(classTo?.length ?? 0);
  }
  add(p: Place, head: number, factor: number, x: Float64Array): void {
    const sums = p.row < 0 ? this.classes : this.tokens;
    const at = ((p.row < 0 ? p.batch : p.row) * this.heads + head) * this.dim;
    if (factor !== 0) for (let d = 0; d < this.dim; d++) sums[at + d] += factor * x[d];
  }
  write(type: number): void {
    for (const [i, x] of this.tokens.entries()) writeFloat(this.to, type, i, x);
    for (const [i, x] of this.classes.entries()) writeFloat(this.classTo as TypedArray, type, i, x);
  }
}

/** See native/attention/factorized_attention.h and attention_backward.h; this is the same function in float64. */
export function factorizedAttentionBackwardReference(...all: [...FactorizedArguments, ...Tail]): number {
  const args = all.slice(0, FACTORIZED_ARGUMENTS) as unknown as FactorizedArguments;
  const tail = all.slice(FACTORIZED_ARGUMENTS) as Tail;
  const [upstream, output, lse, classUpstream, queryGrad, keyGrad, valueGrad, biasGrad] = tail;
  const [n, type] = args;
  const [, , frames, , heads, keyHeads, dim, valueDim] = n;
  const dq = new Sums(queryGrad, tail[8], heads, dim);
  const dk = new Sums(keyGrad, tail[9], keyHeads, dim);
  const dv = new Sums(valueGrad, tail[10], keyHeads, valueDim);
  const biasSums = biasGrad === null ? null : new Float64Array(biasGrad.length);
  const read = (data: TypedArray, at: number) =>
    Float64Array.from({ length: valueDim }, (_, d) => readFloat(data, type, at + d));
  for (const s of axisSequences(args)) {
    for (let h = s.firstHead; h < s.lastHead; h++) {
      const kv = Math.floor((h * keyHeads) / heads);
      const keys = s.places.map((p) => readKey(args, p, kv));
      const values = s.places.map((p) => readValue(args, p, kv));
      for (const [i, place] of s.places.entries()) {
        const query = readQuery(args, place, h);
        const products = Float64Array.from(keys, (k) => dot(query, k));
        let g: Float64Array;
        let delta: number;
        let weight: (j: number) => number;
        let rowLse: number;
        if (place.row < 0) {
          // The class token's output is the mean over the frames, and its output in a frame was not kept.
          g = read(classUpstream as TypedArray, (s.batch * heads + h) * valueDim).map((x) => x / frames);
          const row = placeWeights(args, s, h, i, products);
          rowLse = row.lse;
          weight = (j) => row.weights[j];
          delta = values.reduce(
            (sum, v, j) => (row.weights[j] === 0 ? sum : sum + row.weights[j] * dot(g, v)),
            0,
          );
        } else {
          g = read(upstream, (place.row * heads + h) * valueDim);
          delta = dot(g, read(output, vectorAt(args, F.outputStrides, F.classOutputStrides, place, h)));
          rowLse = lse[lseAt(args, place, h)];
          weight = (j) => Math.exp(placeLogit(args, s, h, i, j, products[j]).logit - rowLse);
        }
        for (const [j, other] of s.places.entries()) {
          if (rowLse === -Infinity) {
            if (n[F.uniformEmpty] !== 0) dv.add(other, kv, 1 / s.places.length, g);
            continue;
          }
          if (!placeIsVisible(args, s, h, i, j)) continue;
          const p = weight(j);
          if (p === 0) continue;
          const dz = p * (dot(g, values[j]) - delta);
          const ds = n[F.scale] * placeLogit(args, s, h, i, j, products[j]).slope * dz;
          dv.add(other, kv, p, g);
          dq.add(place, h, ds, keys[j]);
          dk.add(other, kv, ds, query);
          if (biasSums !== null) biasSums[pairAt(n, F.biasStrides, s, h, i, j)] += dz;
        }
      }
    }
  }
  for (const sums of [dq, dk, dv]) sums.write(type);
  if (biasGrad !== null && biasSums !== null) biasGrad.set(biasSums);
  return 0;
}
