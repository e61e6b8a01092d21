import { type AttentionArguments, N } from '../../attention/layout.ts';
import { readFloat, writeFloat } from '../../dtype.ts';
import type { TypedArray } from '../../tensor.ts';
import { dot } from '../gemm/linear.ts';
import { isVisible, logitOf, readHead, readVector, sequencesOf } from './logits.ts';

/** See native/attention/attention_backward.h for the definition; this is the same function in float64. */
export function attentionBackwardReference(
  ...all: [
    ...AttentionArguments,
    upstream: TypedArray,
    output: TypedArray,
    logSumExp: Float32Array,
    queryGrad: TypedArray,
    keyGrad: TypedArray,
    valueGrad: TypedArray,
    biasGrad: Float32Array | null,
  ]
): number {
  const args = all.slice(0, 15) as unknown as AttentionArguments;
  const [, , , , , , , , , , , , , , , upstream, output, lse, queryGrad, keyGrad, valueGrad, biasGrad] = all;
  const [n, type, query, key, value] = args;
  const [, queries, keys, heads, keyHeads, dim, valueDim] = n;
  const group = keyHeads === 0 ? 0 : heads / keyHeads;
  const biasSums = biasGrad === null ? null : new Float64Array(biasGrad.length);
  for (const s of sequencesOf(args)) {
    for (let kv = 0; kv < keyHeads; kv++) {
      const k = readHead(key, type, n, N.keyStrides, s.batch, s.keyBegin, s.keys, kv, dim);
      const v = readHead(value, type, n, N.valueStrides, s.batch, s.keyBegin, s.keys, kv, valueDim);
      const dk = k.map(() => new Float64Array(dim));
      const dv = v.map(() => new Float64Array(valueDim));
      for (let row = 0; row < s.queries * group; row++) {
        const i = Math.floor(row / group);
        const h = kv * group + (row % group);
        const qi = s.queryBegin + i;
        const at = (s.batch * queries + qi) * heads + h;
        const q = readVector(query, type, n, N.queryStrides, s.batch, qi, h, dim);
        const contiguous = (data: TypedArray) =>
          Float64Array.from({ length: valueDim }, (_, d) => readFloat(data, type, at * valueDim + d));
        const g = contiguous(upstream);
        const delta = dot(g, contiguous(output));
        const rowLse = lse[(s.batch * heads + h) * queries + qi];
        const dq = new Float64Array(dim);
        for (let j = 0; j < s.keys; j++) {
          let p: number;
          let dz = 0;
          let slope = 0;
          if (rowLse === -Infinity) {
            p = n[N.uniformEmpty] !== 0 ? 1 / s.keys : 0;
          } else {
            if (!isVisible(args, s, h, i, j)) continue;
            const z = logitOf(args, s, h, i, j, dot(q, k[j]));
            p = Math.exp(z.logit - rowLse);
            dz = p === 0 ? 0 : p * (dot(g, v[j]) - delta);
            slope = z.slope;
          }
          const ds = n[N.scale] * slope * dz;
          if (p !== 0) for (let d = 0; d < valueDim; d++) dv[j][d] += p * g[d];
          if (ds !== 0) {
            for (let d = 0; d < dim; d++) {
              dq[d] += ds * k[j][d];
              dk[j][d] += ds * q[d];
            }
          }
          if (biasSums !== null) {
            const b = s.batch * n[N.biasStrides] + h * n[N.biasStrides + 1] + qi * n[N.biasStrides + 2];
            biasSums[b + s.keyBegin + j] += dz;
          }
        }
        for (let d = 0; d < dim; d++) writeFloat(queryGrad, type, at * dim + d, dq[d]);
      }
      for (let j = 0; j < s.keys; j++) {
        const at = (s.batch * keys + s.keyBegin + j) * keyHeads + kv;
        for (let d = 0; d < dim; d++) writeFloat(keyGrad, type, at * dim + d, dk[j][d]);
        for (let d = 0; d < valueDim; d++) writeFloat(valueGrad, type, at * valueDim + d, dv[j][d]);
      }
    }
  }
  if (biasGrad !== null && biasSums !== null) biasGrad.set(biasSums);
  return 0;
}
