import { readFloat, writeFloat } from '../../dtype.ts';
import type { TypedArray } from '../../tensor.ts';
import { type Activation, gatedActivation } from '../gemm/activation.ts';
import { dot, type ReferenceMatrix } from '../gemm/linear.ts';
import { quantizedActivations } from '../gemm/quantize.ts';

/** One expert: `gate` is absent in ungated layers; biases may be absent. */
export interface ReferenceExpert {
  gate?: ReferenceMatrix;
  up: ReferenceMatrix;
  down: ReferenceMatrix;
  gateBias?: Float32Array;
  upBias?: Float32Array;
  downBias?: Float32Array;
}

export interface ReferenceBank {
  activation: Activation;
  alpha: number;
  limit: number;
  hidden: number;
  intermediate: number;
  experts: ReferenceExpert[];
}

/** y = down(act(gate(x)) * up(x)) of one expert. */
export function expertReference(bank: ReferenceBank, e: ReferenceExpert, x: Float64Array): Float64Array {
  const a = quantizedActivations(x, e.up.type, e.up.group);
  const h = new Float64Array(bank.intermediate);
  for (let i = 0; i < h.length; i++) {
    const up = dot(e.up.rows[i], a) + (e.upBias?.[i] ?? 0);
    if (e.gate === undefined) {
      h[i] = gatedActivation(bank.activation, up, 1, bank.alpha, bank.limit);
    } else {
      const gate = dot(e.gate.rows[i], a) + (e.gateBias?.[i] ?? 0);
      h[i] = gatedActivation(bank.activation, gate, up, bank.alpha, bank.limit);
    }
  }
  const b = quantizedActivations(h, e.down.type, e.down.group);
  return Float64Array.from(
    { length: bank.hidden },
    (_, i) => dot(e.down.rows[i], b) + (e.downBias?.[i] ?? 0),
  );
}

/** See native/moe/experts.h; the same function in float64. */
export function expertsForwardReference(
  bank: ReferenceBank,
  shared: ReferenceBank | null,
  sharedGate: Float32Array | null,
  x: TypedArray,
  type: number,
  tokens: number,
  k: number,
  indices: Int32Array,
  weights: Float32Array | null,
  out: TypedArray | null,
  outType: number,
  routes: Float64Array | null = null,
): number {
  for (let r = 0; r < tokens * k; r++) {
    if (indices[r] < -1 || indices[r] >= bank.experts.length) return r + 1;
  }
  const d = bank.hidden;
  for (let t = 0; t < tokens; t++) {
    const row = Float64Array.from({ length: d }, (_, i) => readFloat(x, type, t * d + i));
    const sum = new Float64Array(d);
    for (let j = 0; j < k; j++) {
      const id = indices[t * k + j];
      if (id < 0) continue;
      const at = (t * k + j) * d;
      if (routes !== null && out === null) routes.set(expertReference(bank, bank.experts[id], row), at);
      if (out === null) continue;
      const y = routes === null ? expertReference(bank, bank.experts[id], row) : routes.subarray(at, at + d);
      const w = weights === null ? 1 : weights[t * k + j];
      for (let i = 0; i < d; i++) sum[i] += w * y[i];
    }
    if (out === null) continue;
    if (shared !== null) {
      const y = expertReference(shared, shared.experts[0], row);
      const w = sharedGate === null ? 1 : sharedGate[t];
      for (let i = 0; i < d; i++) sum[i] += w * y[i];
    }
    for (let i = 0; i < d; i++) writeFloat(out, outType, t * d + i, sum[i]);
  }
  return 0;
}
