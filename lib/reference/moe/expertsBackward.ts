import { DTYPE_CODE, readFloat, toBfloat16, writeFloat } from '../../dtype.ts';
import type { TypedArray } from '../../tensor.ts';
import { ACTIVATIONS, gatedActivation, gatedActivationGradient } from '../gemm/activation.ts';
import { dot } from '../gemm/linear.ts';

/** One matrix per expert; element (n, k) at n * nStride + k * kStride. */
type Matrices = readonly TypedArray[];
type Vectors = readonly Float32Array[] | null;

/** The rows [n][k] of one matrix, as weights of type `type` (0 float32, 1 bfloat16) represent them. */
function rowsOf(
  data: TypedArray,
  source: number,
  type: number,
  [n, k]: [number, number],
  [nStride, kStride]: [number, number],
): Float64Array[] {
  return Array.from({ length: n }, (_, i) =>
    Float64Array.from({ length: k }, (_, j) => {
      const v = readFloat(data, source, i * nStride + j * kStride);
      return type === 1 ? readFloat([toBfloat16(v)] as unknown as TypedArray, DTYPE_CODE.bfloat16, 0) : v;
    }),
  );
}

const zeros = (n: number, k: number) => Array.from({ length: n }, () => new Float64Array(k));

/** sum += factor * row */
function addTo(sum: Float64Array, factor: number, row: Float64Array): void {
  for (let i = 0; i < sum.length; i++) sum[i] += factor * row[i];
}

/** Matrix times vector, plus a bias. */
function affine(rows: Float64Array[], v: Float64Array, bias: Float32Array | undefined): Float64Array {
  return Float64Array.from(rows, (row, i) => dot(row, v) + (bias?.[i] ?? 0));
}

/** Transposed matrix times vector. */
function transposed(rows: Float64Array[], v: Float64Array, width: number): Float64Array {
  const out = new Float64Array(width);
  for (const [i, row] of rows.entries()) addTo(out, v[i], row);
  return out;
}

/** See native/moe/experts_backward.h; the same function in float64. */
export function expertsBackwardReference(
  gradOutput: TypedArray,
  gradOutputType: number,
  x: TypedArray,
  xType: number,
  tokens: number,
  k: number,
  indices: Int32Array,
  weights: Float32Array,
  type: number,
  activation: number,
  alpha: number,
  limit: number,
  d: number,
  f: number,
  source: number,
  gate: Matrices | null,
  up: Matrices,
  upN: number,
  upK: number,
  down: Matrices,
  downN: number,
  downK: number,
  gateBias: Vectors,
  upBias: Vectors,
  downBias: Vectors,
  gradX: Float32Array,
  gradWeights: Float32Array,
  gradGate: Vectors,
  gradUp: readonly Float32Array[],
  gradDown: readonly Float32Array[],
  gradGateBias: Vectors,
  gradUpBias: Vectors,
  gradDownBias: Vectors,
  biasStride: number,
): number {
  const kind = ACTIVATIONS[activation];
  const routes = tokens * k;
  for (let r = 0; r < routes; r++) {
    if (indices[r] < -1 || indices[r] >= up.length) return r + 1;
  }
  const row = (data: TypedArray, code: number, t: number) =>
    Float64Array.from({ length: d }, (_, i) => readFloat(data, code, t * d + i));
  const dx = zeros(tokens, d);
  gradWeights.fill(0);
  for (let e = 0; e < up.length; e++) {
    const Wg = gate === null ? null : rowsOf(gate[e], source, type, [f, d], [upN, upK]);
    const Wu = rowsOf(up[e], source, type, [f, d], [upN, upK]);
    const Wd = rowsOf(down[e], source, type, [d, f], [downN, downK]);
    const [dWg, dWu, dWd] = [zeros(f, d), zeros(f, d), zeros(d, f)];
    const [dbg, dbu, dbd] = [new Float64Array(f), new Float64Array(f), new Float64Array(d)];
    for (let r = 0; r < routes; r++) {
      if (indices[r] !== e) continue;
      const t = Math.floor(r / k);
      const xt = row(x, xType, t);
      const dout = row(gradOutput, gradOutputType, t);
      // forward: h = act(g) u, y = Wd h + bd, out += w y
      const g = Wg === null ? null : affine(Wg, xt, gateBias?.[e]);
      const u = affine(Wu, xt, upBias?.[e]);
      const h = u.map((v, i) =>
        g === null ? gatedActivation(kind, v, 1, alpha, limit) : gatedActivation(kind, g[i], v, alpha, limit),
      );
      const y = affine(Wd, h, downBias?.[e]);
      // backward
      gradWeights[r] = dot(dout, y);
      const dy = dout.map((v) => weights[r] * v);
      const dh = transposed(Wd, dy, f);
      const dg = new Float64Array(f);
      const du = new Float64Array(f);
      for (let i = 0; i < f; i++) {
        if (g === null) {
          du[i] = dh[i] * gatedActivationGradient(kind, u[i], 1, alpha, limit)[0];
        } else {
          const [a, b] = gatedActivationGradient(kind, g[i], u[i], alpha, limit);
          dg[i] = dh[i] * a;
          du[i] = dh[i] * b;
        }
        addTo(dWg[i], dg[i], xt);
        addTo(dWu[i], du[i], xt);
      }
      for (let i = 0; i < d; i++) addTo(dWd[i], dy[i], h);
      addTo(dbg, 1, dg);
      addTo(dbu, 1, du);
      addTo(dbd, 1, dy);
      if (Wg !== null) addTo(dx[t], 1, transposed(Wg, dg, d));
      addTo(dx[t], 1, transposed(Wu, du, d));
    }
    const write = (out: Float32Array | undefined, rows: Float64Array[], nStride: number, kStride: number) => {
      if (out === undefined) return;
      for (const [n, values] of rows.entries()) {
        for (const [i, v] of values.entries()) out[n * nStride + i * kStride] = v;
      }
    };
    write(gradGate?.[e], dWg, upN, upK);
    write(gradUp[e], dWu, upN, upK);
    write(gradDown[e], dWd, downN, downK);
    write(gradGateBias?.[e], [dbg], 0, biasStride);
    write(gradUpBias?.[e], [dbu], 0, biasStride);
    write(gradDownBias?.[e], [dbd], 0, 1);
  }
  for (const [t, values] of dx.entries()) {
    for (let i = 0; i < d; i++) writeFloat(gradX, DTYPE_CODE.float32, t * d + i, values[i]);
  }
  return 0;
}
