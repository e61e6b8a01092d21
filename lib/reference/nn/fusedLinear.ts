import { linearReference, type ReferenceMatrix } from '../gemm/linear.ts';
import { gatherRowsReference } from './gatherRows.ts';
import { normReference } from './norm.ts';

const FLOAT32 = 0;

/**
 * Adds up to two rows of tables to the rows of y, and writes them where they belong; `index` null: the row that is
 * written, `to` null: row i, `to[i]` -1: none.
 */
export function writeRowsReference(
  y: Float32Array,
  rows: number,
  n: number,
  gate: number,
  add: readonly (readonly [Float32Array | null, Int32Array | null])[],
  out: Float32Array,
  to: Int32Array | null,
): void {
  for (let i = 0; i < rows; i++) {
    const at = to === null ? i : to[i];
    if (at < 0) continue;
    for (let j = 0; j < n; j++) {
      let v = gate * y[i * n + j];
      for (const [table, index] of add) {
        if (table !== null) v = Math.fround(v + table[(index === null ? at : index[i]) * n + j]);
      }
      out[at * n + j] = v;
    }
  }
}

/** See native/nn/fused_linear.h: gatherRows, layerNorm, linear and addResidual one after the other. */
export function fusedLinearReference(
  x: Float32Array,
  rows: number,
  index: Int32Array | null,
  normed: boolean,
  normWeight: Float32Array | null,
  normBias: Float32Array | null,
  unitOffset: boolean,
  epsilon: number,
  hidden: ReferenceMatrix | null,
  hiddenBias: Float32Array | null,
  hiddenActivation: number,
  weight: ReferenceMatrix,
  bias: Float32Array | null,
  activation: number,
  gate: number,
  add0: Float32Array | null,
  addIndex0: Int32Array | null,
  add1: Float32Array | null,
  addIndex1: Int32Array | null,
  out: Float32Array,
  to: Int32Array | null,
  also: ReferenceMatrix | null,
  alsoBias: Float32Array | null,
  alsoOut: Float32Array | null,
): number {
  const { k } = hidden ?? weight;
  let h = new Float32Array(rows * k);
  const order = index ?? Int32Array.from({ length: rows }, (_, i) => i);
  gatherRowsReference(x, FLOAT32, x.length / k, k, order, rows, null, h);
  if (normed) {
    const args = [normWeight, normBias, unitOffset, epsilon, h, FLOAT32, null, null, null] as const;
    normReference(true, h, null, FLOAT32, rows, k, ...args);
  }
  const product = (m: ReferenceMatrix, b: Float32Array | null, act: number) => {
    const y = new Float32Array(rows * m.n);
    linearReference(m, h, FLOAT32, rows, b, act, y, FLOAT32);
    return y;
  };
  if (also !== null && alsoOut !== null) alsoOut.set(product(also, alsoBias, 0));
  if (hidden !== null) h = product(hidden, hiddenBias, hiddenActivation);
  const y = product(weight, bias, activation);
  const tables = [
    [add0, addIndex0],
    [add1, addIndex1],
  ] as const;
  writeRowsReference(y, rows, weight.n, gate, tables, out, to);
  return 0;
}
