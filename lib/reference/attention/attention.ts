import { type AttentionArguments, N } from '../../attention/layout.ts';
import { writeFloat } from '../../dtype.ts';
import type { TypedArray } from '../../tensor.ts';
import { dot } from '../gemm/linear.ts';
import { isVisible, logitOf, readHead, readVector, sequencesOf } from './logits.ts';

/** See native/attention/attention.h for the definition; this is the same function in float64. */
export function attentionReference(
  ...all: [...AttentionArguments, output: TypedArray, logSumExp: Float32Array | null]
): number {
  const args = all.slice(0, 15) as unknown as AttentionArguments;
  const output = all[15];
  const lse = all[16];
  const [n, type, query, key, value] = args;
  const sinks = args[8];
  const [, , , heads, keyHeads, dim, valueDim] = n;
  for (const s of sequencesOf(args)) {
    for (let h = 0; h < heads; h++) {
      const kv = Math.floor((h * keyHeads) / heads);
      const k = readHead(key, type, n, N.keyStrides, s.batch, s.keyBegin, s.keys, kv, dim);
      const v = readHead(value, type, n, N.valueStrides, s.batch, s.keyBegin, s.keys, kv, valueDim);
      for (let i = 0; i < s.queries; i++) {
        const qi = s.queryBegin + i;
        const q = readVector(query, type, n, N.queryStrides, s.batch, qi, h, dim);
        const logits = new Float64Array(s.keys).fill(-Infinity);
        let max = sinks === null ? -Infinity : sinks[h];
        for (let j = 0; j < s.keys; j++) {
          if (!isVisible(args, s, h, i, j)) continue;
          logits[j] = logitOf(args, s, h, i, j, dot(q, k[j])).logit;
          if (!(logits[j] <= max)) max = logits[j];
        }
        const row = new Float64Array(valueDim);
        let sum = 0;
        if (max !== -Infinity) {
          if (sinks !== null) sum = Math.exp(sinks[h] - max);
          for (let j = 0; j < s.keys; j++) {
            if (logits[j] === -Infinity) continue;
            const p = Math.exp(logits[j] - max);
            sum += p;
            for (let d = 0; d < valueDim; d++) row[d] += p * v[j][d];
          }
        } else if (n[N.uniformEmpty] !== 0) {
          sum = s.keys;
          for (let j = 0; j < s.keys; j++) for (let d = 0; d < valueDim; d++) row[d] += v[j][d];
        }
        const base = ((s.batch * n[N.queries] + qi) * heads + h) * valueDim;
        for (let d = 0; d < valueDim; d++) writeFloat(output, type, base + d, sum === 0 ? 0 : row[d] / sum);
        if (lse !== null) {
          lse[(s.batch * heads + h) * n[N.queries] + qi] =
            max === -Infinity ? -Infinity : max + Math.log(sum);
        }
      }
    }
  }
  return 0;
}
