import { readFloat } from '../../dtype.ts';
import type { TypedArray } from '../../tensor.ts';
import { sigmoid } from '../gemm/activation.ts';
import { readRow, scores } from './router.ts';

const LOAD_BALANCING = 0;
const Z = 1;
const IMPORTANCE = 2;
const LOAD = 3;

const SOFTMAX = 0;
const SIGMOID = 1;
const GIVEN = 3;

const everyExpert = () => true;
const sum = (x: ArrayLike<number>) => Array.prototype.reduce.call(x, (a, b) => a + b, 0) as number;

/** Population variance over squared mean, and its derivative by each number. */
function variation(x: Float64Array): { value: number; derivative: Float64Array } {
  const n = x.length;
  const mean = sum(x) / n;
  const variance = sum(x.map((v) => (v - mean) ** 2)) / n;
  if (mean === 0) return { value: 0, derivative: new Float64Array(n) };
  return {
    value: variance / mean ** 2,
    derivative: x.map((v) => (2 * (v - mean)) / (n * mean ** 2) - (2 * variance) / (n * mean ** 3)),
  };
}

/** ds/dl of a score that looks at one logit. */
export function scoreSlope(l: number, s: number, score: number): number {
  if (score === SIGMOID) return s * sigmoid(-l);
  return s > 0 ? sigmoid(l) / (2 * s) : 0;
}

/** Scores of a row, and dL/dlogits of it for a given dL/dp. */
function lossRow(
  logits: TypedArray,
  type: number,
  row: number,
  experts: number,
  score: number,
  normalize: boolean,
) {
  const given = Float64Array.from({ length: experts }, (_, e) => readFloat(logits, type, row * experts + e));
  const l = readRow(logits, type, row, experts, everyExpert);
  const raw = score === GIVEN ? given.map((x) => (Number.isNaN(x) ? 0 : x)) : scores(l, score);
  const divisor = normalize && score !== SOFTMAX ? sum(raw) : 1;
  const p = raw.map((s) => (divisor === 0 ? 0 : s / divisor));
  const backward = (c: Float64Array): Float64Array => {
    const dot = normalize || score === SOFTMAX ? sum(c.map((x, e) => x * p[e])) : 0;
    if (score === SOFTMAX) return p.map((x, e) => x * (c[e] - dot));
    return raw.map((s, e) => {
      const bySelf = divisor === 0 ? 0 : (c[e] - dot) / divisor;
      return score === GIVEN ? bySelf : bySelf * scoreSlope(l[e], s, score);
    });
  };
  return { p, backward };
}

function lossReference(
  kind: number,
  logits: TypedArray | null,
  type: number,
  tokens: number,
  experts: number,
  score: number,
  normalize: boolean,
  mask: Uint8Array | null,
  indices: Int32Array | null,
  k: number,
  perToken: boolean,
  coefficient: number,
  value: Float64Array,
  gradient: Float32Array | null,
): number {
  const rows = Array.from({ length: tokens }, (_, t) => t).filter((t) => mask === null || mask[t] !== 0);
  const kept = rows.length;
  const counts = new Float64Array(experts);
  for (let i = 0; indices !== null && i < tokens * k; i++) {
    const id = indices[i];
    if (id < -1 || id >= experts) return i + 1;
    if (id >= 0 && (mask === null || mask[Math.floor(i / k)] !== 0)) counts[id]++;
  }
  gradient?.fill(0);
  if (kind === LOAD) {
    value[0] = coefficient * variation(counts).value;
    return 0;
  }
  const data = logits as TypedArray;
  if (kind === Z) {
    let total = 0;
    for (const t of rows) {
      const l = readRow(data, type, t, experts, everyExpert);
      const top = l.reduce((a, b) => Math.max(a, b), -Infinity);
      const lse = top + Math.log(sum(l.map((x) => Math.exp(x - top))));
      total += lse * lse;
      const factor = (2 * coefficient * lse) / kept;
      gradient?.set(
        scores(l, SOFTMAX).map((p) => factor * p),
        t * experts,
      );
    }
    value[0] = kept === 0 ? 0 : (coefficient * total) / kept;
    return 0;
  }
  const totals = new Float64Array(experts);
  const table = rows.map((t) => lossRow(data, type, t, experts, score, normalize));
  for (const { p } of table) {
    for (let e = 0; e < experts; e++) totals[e] += p[e];
  }
  let derivative: Float64Array = new Float64Array(experts);
  if (kind === IMPORTANCE) {
    const v = variation(totals);
    value[0] = coefficient * v.value;
    derivative = v.derivative;
  } else if (kept > 0) {
    derivative = counts.map((c) => (experts * c) / (perToken ? kept : kept * k) / kept);
    value[0] = coefficient * sum(derivative.map((d, e) => d * totals[e]));
  } else {
    value[0] = 0;
  }
  const c = derivative.map((d) => coefficient * d);
  rows.forEach((t, i) => {
    gradient?.set(table[i].backward(c), t * experts);
  });
  return 0;
}

// biome-ignore lint/suspicious/noExplicitAny: the argument list of lossReference without its kind
type LossFunction = (...args: any[]) => number;

/** See native/moe/router_loss.h for the definitions; these are the same functions in float64. */
const loss =
  (kind: number): LossFunction =>
  (...args) =>
    (lossReference as LossFunction)(kind, ...args);

export const loadBalancingLossReference = loss(LOAD_BALANCING);
export const routerZLossReference = loss(Z);
export const importanceLossReference = loss(IMPORTANCE);
export const loadLossReference = loss(LOAD);
