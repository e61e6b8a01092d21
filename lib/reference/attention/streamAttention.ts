import { type AttentionArguments, N } from '../../attention/layout.ts';
import { readFloat } from '../../dtype.ts';
import type { TypedArray } from '../../tensor.ts';

type StreamArguments = [
  type: number,
  keys: TypedArray,
  values: TypedArray,
  keyScales: Float32Array | null,
  valueScales: Float32Array | null,
  tokens: number,
  offset: number,
  totalKeys: number,
  state: Float64Array,
  wantBest: boolean,
];

const HEAD = 4;

/** See native/attention/stream_attention.h: adds one block to the state of every row, key by key in float64. */
export function streamAttentionReference(...all: [...AttentionArguments, ...StreamArguments]): number {
  const args = all.slice(0, 15) as unknown as AttentionArguments;
  const [type, keys, values, keyScales, valueScales, tokens, offset, totalKeys, state, wantBest] = all.slice(
    15,
  ) as unknown as StreamArguments;
  const [n, queryType, query] = args;
  const alibi = args[7];
  const [, queries, , heads, keyHeads, dim, valueDim] = n;
  const [left, right, scale, softcap] = [n[N.left], n[N.right], n[N.scale], n[N.softcap]];
  for (let i = 0; i < queries; i++) {
    const own = i + totalKeys - queries;
    for (let h = 0; h < heads; h++) {
      const kv = Math.floor((h * keyHeads) / heads);
      const at = (i * heads + h) * (HEAD + valueDim);
      const q = Float64Array.from({ length: dim }, (_, d) =>
        readFloat(query, queryType, (i * heads + h) * dim + d),
      );
      for (let j = 0; j < tokens; j++) {
        const key = offset + j;
        if ((left >= 0 && key < own - left) || (right >= 0 && key > own + right)) continue;
        const vector = j * keyHeads + kv;
        let z = 0;
        for (let d = 0; d < dim; d++) z += q[d] * readFloat(keys, type, vector * dim + d);
        z *= scale * (keyScales === null ? 1 : keyScales[vector]);
        if (softcap > 0) z = softcap * Math.tanh(z / softcap);
        if (alibi !== null) z -= alibi[h] * Math.abs(own - key);
        z /= Math.LN2;
        if (wantBest && z > state[at + 2]) {
          state[at + 2] = z;
          state[at + 3] = key;
        }
        let p = 1;
        if (z > state[at]) {
          const factor = 2 ** (state[at] - z);
          state[at + 1] *= factor;
          for (let c = at + HEAD; c < at + HEAD + valueDim; c++)
            state[c] = factor === 0 ? 0 : state[c] * factor;
          state[at] = z;
        } else {
          p = z === -Infinity ? 0 : 2 ** (z - state[at]);
        }
        state[at + 1] += p;
        if (p === 0) continue; // weight 0 never brings in a value that is not finite
        const factor = p * (valueScales === null ? 1 : valueScales[vector]);
        for (let c = 0; c < valueDim; c++) {
          state[at + HEAD + c] += factor * readFloat(values, type, vector * valueDim + c);
        }
      }
    }
  }
  return 0;
}
