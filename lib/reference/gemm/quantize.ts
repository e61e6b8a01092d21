import { toBfloat16 } from '../../dtype.ts';

/** How a packed matrix stores its weights. */
export type WeightType = 'float32' | 'bfloat16' | 'int8' | 'int4' | 'mxfp4';

const f = Math.fround;

/** Nearest integer, ties to even. */
export function roundEven(x: number): number {
  const r = Math.round(x);
  return Math.abs(x - Math.trunc(x)) === 0.5 && r % 2 !== 0 ? r - 1 : r;
}

const E2M1 = [0, 0.5, 1, 1.5, 2, 3, 4, 6];

/** Nearest E2M1 value (OCP MX 1.0), ties to the even code. */
export function roundE2M1(x: number): number {
  const a = Math.abs(x);
  let best = 0;
  for (let code = 1; code < 8; code++) {
    const d = Math.abs(a - E2M1[code]);
    const b = Math.abs(a - E2M1[best]);
    if (d < b || (d === b && code % 2 === 0)) best = code;
  }
  return x < 0 ? -E2M1[best] : E2M1[best];
}

function exponentOf(x: number): number {
  let e = Math.floor(Math.log2(x));
  while (2 ** e > x) e--;
  while (2 ** (e + 1) <= x) e++;
  return e;
}

/**
 * Weights as their packed form represents them: round to `type` and back. Formulas in native/gemm/quantize.h.
 * @param w one row (all inputs of one output), float32 values
 * @param group k values per scale (int4, MXFP4)
 */
export function dequantizedRow(w: Float32Array, type: WeightType, group: number): Float32Array {
  const out = new Float32Array(w.length);
  if (type === 'float32') {
    out.set(w);
    return out;
  }
  if (type === 'bfloat16') {
    const bits = new Uint32Array(out.buffer);
    for (let i = 0; i < w.length; i++) bits[i] = toBfloat16(w[i]) << 16;
    return out;
  }
  const span = type === 'int8' ? w.length : group;
  for (let begin = 0; begin < w.length; begin += span) {
    const end = Math.min(begin + span, w.length);
    let amax = 0;
    for (let i = begin; i < end; i++) amax = Math.max(amax, Math.abs(w[i]));
    if (amax === 0) continue;
    if (type === 'mxfp4') {
      const scale = 2 ** Math.min(127, Math.max(-127, exponentOf(amax) - 2));
      for (let i = begin; i < end; i++) out[i] = roundE2M1(f(w[i] / scale)) * scale;
      continue;
    }
    const scale = f(amax / (type === 'int8' ? 127 : 7));
    const low = type === 'int8' ? -127 : -8;
    const high = type === 'int8' ? 127 : 7;
    for (let i = begin; i < end; i++) {
      const q = scale > 0 ? Math.min(high, Math.max(low, roundEven(f(w[i] / scale)))) : 0;
      out[i] = q * scale;
    }
  }
  return out;
}

/**
 * Activations as the integer products see them: int8 with one scale per row (int8 weights) or per group (4-bit
 * weights). The identity for floating weights.
 */
export function quantizedActivations(x: Float64Array, type: WeightType, group: number): Float64Array {
  if (type === 'float32' || type === 'bfloat16') return x;
  const out = new Float64Array(x.length);
  const span = type === 'int8' ? x.length : group;
  for (let begin = 0; begin < x.length; begin += span) {
    const end = Math.min(begin + span, x.length);
    let amax = 0;
    for (let i = begin; i < end; i++) amax = Math.max(amax, Math.abs(f(x[i])));
    if (amax === 0) continue;
    const inverse = f(127 / amax);
    const scale = f(amax / 127);
    for (let i = begin; i < end; i++) out[i] = roundEven(f(f(x[i]) * inverse)) * scale;
  }
  return out;
}
