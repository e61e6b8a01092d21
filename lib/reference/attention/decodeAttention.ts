import { CACHE_CODE, type KVCacheType, pageLayout, readElement } from '../../attention/kvLayout.ts';
import { type AttentionArguments, N } from '../../attention/layout.ts';
import { DTYPE_CODE, readFloat, writeFloat } from '../../dtype.ts';
import type { TypedArray } from '../../tensor.ts';
import { attentionReference } from './attention.ts';

type DecodeArguments = [
  cacheType: number,
  keys: TypedArray,
  values: TypedArray,
  keyScales: Float32Array | null,
  valueScales: Float32Array | null,
  pageSize: number,
  table: Int32Array,
  tableStride: number,
  starts: Int32Array,
  lengths: Int32Array,
  output: TypedArray,
  logSumExp: Float32Array | null,
];

const COMMON = 15;

/**
 * See native/attention/decode_attention.h for the definition: for each sequence and key head, what the queries can see
 * is gathered from the pages, then attention.
 */
export function decodeAttentionReference(...all: [...AttentionArguments, ...DecodeArguments]): number {
  const args = all.slice(0, COMMON) as unknown as AttentionArguments;
  const [
    code,
    keys,
    values,
    keyScales,
    valueScales,
    pageSize,
    table,
    tableStride,
    starts,
    lengths,
    output,
    lse,
  ] = all.slice(COMMON) as unknown as DecodeArguments;
  const type = Object.entries(CACHE_CODE).find(([, c]) => c === code)![0] as KVCacheType;
  const n = args[0];
  const [batch, queries, , heads, keyHeads, dim, valueDim] = n;
  const group = heads / keyHeads;
  const own = [...args] as AttentionArguments;
  const perHead = (x: Float32Array | null, h: number) => x?.subarray(h * group, (h + 1) * group) ?? null;
  for (let b = 0; b < batch; b++) {
    const left = n[N.left];
    const first = left < 0 ? 0 : Math.max(0, lengths[b] - queries - left);
    const count = lengths[b] - first;
    for (let h = 0; h < keyHeads; h++) {
      const gather = (pool: TypedArray, scales: Float32Array | null, d: number, isValue: boolean) => {
        const layout = pageLayout(type, d, pageSize, isValue);
        const out = new Float64Array(count * d);
        for (let j = 0; j < count; j++) {
          const page = Math.floor((first + j) / pageSize) - starts[b] / pageSize;
          const vector = table[b * tableStride + page] * keyHeads + h;
          const slot = (first + j) % pageSize;
          const scale = scales === null ? 1 : scales[vector * layout.slots + slot];
          for (let e = 0; e < d; e++) {
            out[j * d + e] = scale * readElement(layout, pool, vector * layout.size, slot, e);
          }
        }
        return out;
      };
      const one = Float64Array.from(n);
      one.set([1, queries, count, group, 1]);
      one.set([0, group * dim, dim, 1], N.queryStrides);
      one.set([0, dim, dim, 1], N.keyStrides);
      one.set([0, valueDim, valueDim, 1], N.valueStrides);
      const row = (i: number) => (b * queries + Math.floor(i / group)) * heads + h * group + (i % group);
      // The gathered keys are float64, q may be half precision: both as numbers.
      const q = new Float64Array(queries * group * dim);
      for (let i = 0; i < queries * group; i++) {
        for (let d = 0; d < dim; d++) q[i * dim + d] = readFloat(args[2], args[1], row(i) * dim + d);
      }
      const result = new Float64Array(queries * group * valueDim);
      own[0] = one;
      own[1] = DTYPE_CODE.float64;
      own[2] = q;
      own[3] = gather(keys, keyScales, dim, false);
      own[4] = gather(values, valueScales, valueDim, true);
      own[7] = perHead(args[7], h);
      own[8] = perHead(args[8], h);
      const at = (b * heads + h * group) * queries;
      attentionReference(...own, result, lse?.subarray(at, at + group * queries) ?? null);
      for (let i = 0; i < queries * group; i++) {
        for (let c = 0; c < valueDim; c++)
          writeFloat(output, args[1], row(i) * valueDim + c, result[i * valueDim + c]);
      }
    }
  }
  return 0;
}
