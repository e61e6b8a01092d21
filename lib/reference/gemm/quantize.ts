import { toBfloat16 } from '../../dtype.ts';
import { decodeE4M3, E2M1, encodeE2M1, encodeE4M3, roundEven } from './codes.ts';

/** How a packed matrix stores its weights. */
export type WeightType = 'float32' | 'bfloat16' | 'int8' | 'int4' | 'mxfp4' | 'float8';

/** Types whose weights are integers or codes with scales. */
export type QuantizedType = Exclude<WeightType, 'float32' | 'bfloat16'>;

/** Side of a float8 scale block. */
export const BLOCK = 128;

/** How int4 weights are rounded; formulas in native/gemm/quantize.h. */
export interface Rounding {
  /** False: a zero point per group. */
  symmetric: boolean;
  /** Tries smaller ranges per group and keeps the one with the least weighted error. */
  search: boolean;
  /** Weight of each input in that error. */
  meanSquare: Float32Array | null;
}

export const PLAIN: Rounding = { symmetric: true, search: false, meanSquare: null };

const f = Math.fround;

/** Values per scale along k. */
export function spanOf(type: QuantizedType, k: number, group: number): number {
  return type === 'int8' ? k : type === 'float8' ? BLOCK : group;
}

function exponentOf(x: number): number {
  let e = Math.floor(Math.log2(x));
  while (2 ** e > x) e--;
  while (2 ** (e + 1) <= x) e++;
  return e;
}

function largest(w: Float32Array): number {
  let amax = 0;
  for (const v of w) amax = Math.max(amax, Math.abs(v));
  return amax;
}

const clamp = (q: number, low: number, high: number) => Math.min(high, Math.max(low, q));

const SEARCH_STEPS = 40;
const SEARCH_LAST = 20;

/** Scale and zero point of an int4 group whose range is shrunk to step / 40. */
function int4Candidate(low: number, high: number, symmetric: boolean, step: number): [number, number] {
  const shrink = f(step / SEARCH_STEPS);
  if (symmetric) return [f(f(Math.max(high, -low) * shrink) / 7), 8];
  const lo = f(low * shrink);
  const hi = f(high * shrink);
  const scale = f(f(hi / 15) - f(lo / 15));
  return [scale, scale > 0 ? clamp(roundEven(f(-lo / scale)), 0, 15) : 0];
}

const int4Code = (w: number, scale: number, zero: number) =>
  scale > 0 ? clamp(roundEven(f(w / scale)) + zero, 0, 15) : zero;

function int4Group(w: Float32Array, r: Rounding, first: number): [number, number] {
  const low = w.reduce((a, b) => Math.min(a, b), 0);
  const high = w.reduce((a, b) => Math.max(a, b), 0);
  let best = int4Candidate(low, high, r.symmetric, SEARCH_STEPS);
  if (!r.search || !(best[0] > 0)) return best;
  let least = Infinity;
  for (let step = SEARCH_STEPS; step >= SEARCH_LAST; step--) {
    const [scale, zero] = int4Candidate(low, high, r.symmetric, step);
    if (!(scale > 0)) break;
    const sums = [0, 0, 0, 0]; // as the native packer adds them up
    for (let i = 0; i < w.length; i++) {
      const d = w[i] - scale * (int4Code(w[i], scale, zero) - zero);
      sums[i % 4] += (r.meanSquare === null ? 1 : r.meanSquare[first + i]) * (d * d);
    }
    const error = sums[0] + sums[1] + (sums[2] + sums[3]);
    if (error < least) {
      least = error;
      best = [scale, zero];
    }
  }
  return best;
}

/** One row (all inputs of one output) as codes, one byte per value, with a scale and a zero point per span of k. */
export interface QuantizedRow {
  /** int8: two's complement; int4: 0..15; MXFP4: E2M1 codes; float8: E4M3 codes. */
  codes: Uint8Array;
  scales: Float32Array;
  /** int4 only (8 when symmetric). */
  zeros: Uint8Array;
}

/** @param blockScales float8: the row's scales, from {@link blockScales} */
export function quantizeRow(
  w: Float32Array,
  type: QuantizedType,
  group: number,
  rounding: Rounding = PLAIN,
  blockScales?: Float32Array,
): QuantizedRow {
  const span = spanOf(type, w.length, group);
  const count = w.length === 0 ? 0 : Math.ceil(w.length / span);
  const codes = new Uint8Array(w.length);
  const scales = new Float32Array(count);
  const zeros = new Uint8Array(count);
  for (let g = 0; g < count; g++) {
    const begin = g * span;
    const part = w.subarray(begin, begin + span);
    let code: (v: number) => number;
    if (type === 'int4') {
      const [scale, zero] = int4Group(part, rounding, begin);
      scales[g] = scale;
      zeros[g] = zero;
      code = (v) => int4Code(v, scale, zero);
    } else if (type === 'mxfp4') {
      const amax = largest(part);
      scales[g] = amax === 0 ? 1 : 2 ** clamp(exponentOf(amax) - 2, -127, 127);
      code = (v) => encodeE2M1(f(v / scales[g]));
    } else if (type === 'float8') {
      const scale = blockScales?.[g] ?? 1;
      scales[g] = scale;
      code = (v) => (scale > 0 ? encodeE4M3(f(v / scale)) : 0);
    } else {
      const scale = f(largest(part) / 127);
      scales[g] = scale;
      code = (v) => (scale > 0 ? clamp(roundEven(f(v / scale)), -127, 127) : 0);
    }
    for (let i = 0; i < part.length; i++) codes[begin + i] = code(part[i]);
  }
  return { codes, scales, zeros };
}

/** The values that a quantised row stands for, rounded to float32. */
export function dequantizeRow(row: QuantizedRow, type: QuantizedType, group: number): Float32Array {
  const span = spanOf(type, row.codes.length, group);
  return Float32Array.from(row.codes, (c, i) => {
    const g = Math.floor(i / span);
    if (type === 'int8') return ((c << 24) >> 24) * row.scales[g];
    if (type === 'int4') return (c - row.zeros[g]) * row.scales[g];
    if (type === 'mxfp4') return E2M1[c] * row.scales[g];
    return decodeE4M3(c) * row.scales[g];
  });
}

/** max|w| / 448 of each block of 128 x 128: one list per block of rows. */
export function blockScales(rows: readonly Float32Array[], k: number): Float32Array[] {
  const out: Float32Array[] = [];
  for (let r = 0; r < rows.length; r += BLOCK) {
    const scales = new Float32Array(Math.ceil(k / BLOCK));
    for (let b = 0; b < scales.length; b++) {
      const amax = rows
        .slice(r, r + BLOCK)
        .reduce((a, row) => Math.max(a, largest(row.subarray(b * BLOCK, (b + 1) * BLOCK))), 0);
      scales[b] = amax / 448;
    }
    out.push(scales);
  }
  return out;
}

/**
 * Weights as their packed form represents them: round to `type` and back.
 * @param rows all inputs of each output, float32 values
 * @param group k values per scale (int4, MXFP4)
 */
export function dequantizedRows(
  rows: readonly Float32Array[],
  type: WeightType,
  group: number,
  rounding: Rounding = PLAIN,
): Float32Array[] {
  if (type === 'float32') return rows.map((row) => row.slice());
  if (type === 'bfloat16') {
    return rows.map((row) => {
      const bits = Uint32Array.from(row, (v) => toBfloat16(v) << 16);
      return new Float32Array(bits.buffer);
    });
  }
  const scales = type === 'float8' ? blockScales(rows, rows[0]?.length ?? 0) : [];
  return rows.map((row, i) =>
    dequantizeRow(quantizeRow(row, type, group, rounding, scales[Math.floor(i / BLOCK)]), type, group),
  );
}

/**
 * Activations as the integer products see them: int8 with one scale per row (int8 weights) or per group (4-bit
 * weights). The identity for floating weights.
 */
export function quantizedActivations(x: Float64Array, type: WeightType, group: number): Float64Array {
  if (type === 'float32' || type === 'bfloat16' || type === 'float8') return x;
  const out = new Float64Array(x.length);
  const span = spanOf(type, x.length, group);
  for (let begin = 0; begin < x.length; begin += span) {
    const end = Math.min(begin + span, x.length);
    let amax = 0;
    for (let i = begin; i < end; i++) amax = Math.max(amax, Math.abs(f(x[i])));
    if (!Number.isFinite(amax)) {
      out.fill(Number.NaN, begin, end); // integers cannot carry it: the whole result is NaN
      continue;
    }
    const inverse = f(127 / amax);
    if (!Number.isFinite(inverse)) continue; // zero, or too small for float32 to scale: 0
    const scale = f(amax / 127);
    for (let i = begin; i < end; i++) out[i] = roundEven(f(f(x[i]) * inverse)) * scale;
  }
  return out;
}
