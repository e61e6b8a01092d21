import { F, FACTORIZED_ARGUMENTS, type FactorizedArguments } from '../../attention/factorizedLayout.ts';
import { writeFloat } from '../../dtype.ts';
import type { TypedArray } from '../../tensor.ts';
import { dot } from '../gemm/linear.ts';
import {
  axisSequences,
  lseAt,
  placeWeights,
  readKey,
  readQuery,
  readValue,
  vectorAt,
} from './factorizedRows.ts';

/** See native/attention/factorized_attention.h for the definition; this is the same function in float64. */
export function factorizedAttentionReference(
  ...all: [
    ...FactorizedArguments,
    output: TypedArray,
    logSumExp: Float32Array | null,
    classOutput: TypedArray | null,
  ]
): number {
  const args = all.slice(0, FACTORIZED_ARGUMENTS) as unknown as FactorizedArguments;
  const [output, lse, classOutput] = all.slice(FACTORIZED_ARGUMENTS) as [
    TypedArray,
    Float32Array | null,
    TypedArray | null,
  ];
  const [n, type] = args;
  const [, batch, frames, , heads, keyHeads, , valueDim] = n;
  const classSums = new Float64Array(batch * heads * valueDim);
  for (const s of axisSequences(args)) {
    for (let h = s.firstHead; h < s.lastHead; h++) {
      const kv = Math.floor((h * keyHeads) / heads);
      const keys = s.places.map((p) => readKey(args, p, kv));
      const values = s.places.map((p) => readValue(args, p, kv));
      for (const [i, place] of s.places.entries()) {
        const query = readQuery(args, place, h);
        const products = Float64Array.from(keys, (k) => dot(query, k));
        const row = placeWeights(args, s, h, i, products);
        const sums = new Float64Array(valueDim);
        for (const [j, w] of row.weights.entries()) {
          if (w !== 0) for (let d = 0; d < valueDim; d++) sums[d] += w * values[j][d];
        }
        if (place.row < 0) {
          const at = (s.batch * heads + h) * valueDim;
          for (let d = 0; d < valueDim; d++) classSums[at + d] += sums[d];
          continue;
        }
        const at = vectorAt(args, F.outputStrides, F.classOutputStrides, place, h);
        for (let d = 0; d < valueDim; d++) writeFloat(output, type, at + d, sums[d]);
        if (lse !== null) lse[lseAt(args, place, h)] = row.lse;
      }
    }
  }
  if (classOutput !== null) {
    for (let b = 0; b < batch; b++) {
      for (let h = 0; h < heads; h++) {
        const at = b * n[F.classOutputStrides] + h * n[F.classOutputStrides + 1];
        for (let d = 0; d < valueDim; d++) {
          const sum = classSums[(b * heads + h) * valueDim + d];
          writeFloat(classOutput, type, at + d, frames === 0 ? 0 : sum / frames);
        }
      }
    }
  }
  return 0;
}
