import { type AttentionArguments, N } from '../../attention/layout.ts';
import { DTYPE_CODE, readFloat, writeFloat } from '../../dtype.ts';
import type { TypedArray } from '../../tensor.ts';
import { attentionReference } from './attention.ts';

/** See native/attention/decode_attention.h for the definition: pages gathered into one tensor, then attention. */
export function decodeAttentionReference(
  ...all: [
    ...AttentionArguments,
    cacheType: number,
    keys: TypedArray,
    values: TypedArray,
    keyScales: Float32Array | null,
    valueScales: Float32Array | null,
    pageSize: number,
    table: Int32Array,
    tableStride: number,
    lengths: Int32Array,
    output: TypedArray,
    logSumExp: Float32Array | null,
  ]
): number {
  const args = all.slice(0, 15) as unknown as AttentionArguments;
  const [, , , , , , , , , , , , , , , type, keys, values, keyScales, valueScales] = all;
  const [pageSize, table, tableStride, lengths, output, lse] = all.slice(20) as [
    number,
    Int32Array,
    number,
    Int32Array,
    TypedArray,
    Float32Array | null,
  ];
  const n = args[0];
  const [batch, queries, , heads, keyHeads, dim, valueDim] = n;
  for (let b = 0; b < batch; b++) {
    const length = lengths[b];
    const gather = (pool: TypedArray, scales: Float32Array | null, d: number) => {
      const out = new Float64Array(length * keyHeads * d);
      for (let j = 0; j < length; j++) {
        const page = table[b * tableStride + Math.floor(j / pageSize)];
        for (let h = 0; h < keyHeads; h++) {
          const vector = (page * keyHeads + h) * pageSize + (j % pageSize);
          const scale = scales === null ? 1 : scales[vector];
          for (let i = 0; i < d; i++) {
            out[(j * keyHeads + h) * d + i] = scale * readFloat(pool, type, vector * d + i);
          }
        }
      }
      return out;
    };
    const one = Float64Array.from(n);
    one[N.batch] = 1;
    one[N.keys] = length;
    one.set([0, keyHeads * dim, dim, 1], N.keyStrides);
    one.set([0, keyHeads * valueDim, valueDim, 1], N.valueStrides);
    // The gathered keys are float64, q may be half precision: both as numbers.
    const size = queries * heads;
    const q = Float64Array.from({ length: size * dim }, (_, i) =>
      readFloat(args[2], args[1], b * size * dim + i),
    );
    one.set([0, heads * dim, dim, 1], N.queryStrides);
    const result = new Float64Array(size * valueDim);
    const sums = lse === null ? null : lse.subarray(b * size, (b + 1) * size);
    const own = [...args] as AttentionArguments;
    own[0] = one;
    own[1] = DTYPE_CODE.float64;
    own[2] = q;
    own[3] = gather(keys, keyScales, dim);
    own[4] = gather(values, valueScales, valueDim);
    attentionReference(...own, result, sums);
    for (let i = 0; i < result.length; i++) writeFloat(output, args[1], b * size * valueDim + i, result[i]);
  }
  return 0;
}
