import type { TypedArray } from '../../tensor.ts';
import { readRow, scores, softmax } from './router.ts';
import { scoreSlope } from './routerLoss.ts';

const SOFTMAX = 0;

/** See native/moe/route_top_k_backward.h for the definition; this is the same function in float64. */
export function routeTopKBackwardReference(
  gradWeights: Float32Array,
  logits: TypedArray,
  type: number,
  tokens: number,
  experts: number,
  k: number,
  score: number,
  overSelected: boolean,
  normalize: boolean,
  epsilon: number,
  floor: number,
  scale: number,
  mask: Uint8Array | null,
  maskStride: number,
  indices: Int32Array,
  gradLogits: Float32Array,
): number {
  for (let i = 0; i < tokens * k; i++) {
    if (indices[i] < -1 || indices[i] >= experts) return i + 1;
  }
  for (let row = 0; row < tokens; row++) {
    const exists = (e: number) => mask === null || mask[row * maskStride + e] !== 0;
    const l = readRow(logits, type, row, experts, exists);
    const slots = Array.from({ length: k }, (_, j) => j).filter((j) => indices[row * k + j] >= 0);
    const ids = slots.map((j) => indices[row * k + j]);
    const g = slots.map((j) => gradWeights[row * k + j]);
    const dl = new Float64Array(experts);
    if (score === SOFTMAX && (overSelected || (normalize && epsilon === 0 && floor === 0))) {
      const p = softmax(ids.map((id) => l[id])); // all zeros where only -Infinity is selected
      const dot = p.reduce((a, x, j) => a + x * g[j], 0);
      ids.forEach((id, j) => {
        dl[id] += scale * p[j] * (g[j] - dot);
      });
    } else {
      const s = scores(l, score);
      const ds = new Float64Array(experts);
      scoreGradients(
        ids.map((id) => s[id]),
        g,
        normalize,
        epsilon,
        floor,
        scale,
      ).forEach((d, j) => {
        ds[ids[j]] += d;
      });
      const dot = ds.reduce((a, d, e) => a + d * s[e], 0);
      for (let e = 0; e < experts; e++) {
        dl[e] = score === SOFTMAX ? s[e] * (ds[e] - dot) : ds[e] * scoreSlope(l[e], s[e], score);
      }
    }
    gradLogits.set(dl, row * experts);
  }
  return 0;
}

/** Gradient by the selected scores s of the weights scale * s / D, D as `weightsOf` in router.ts takes it. */
function scoreGradients(
  s: number[],
  g: number[],
  normalize: boolean,
  epsilon: number,
  floor: number,
  scale: number,
): number[] {
  if (!normalize) return g.map((x) => scale * x);
  const sum = s.reduce((a, b) => a + b, 0) + epsilon;
  const divisor = Math.max(sum, floor);
  if (divisor === 0) return g.map(() => 0);
  const dot = sum < floor ? 0 : s.reduce((a, x, j) => a + x * g[j], 0) / divisor;
  return g.map((x) => (scale / divisor) * (x - dot));
}
