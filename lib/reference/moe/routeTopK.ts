import type { TypedArray } from '../../tensor.ts';
import { readRow, scores, weightsOf } from './router.ts';

/** Positions of the k largest values in descending order, ties to the lower position. */
export function topK(values: ArrayLike<number>, k: number, allowed: (i: number) => boolean): number[] {
  const order = Array.from({ length: values.length }, (_, i) => i).filter(allowed);
  order.sort((a, b) => values[b] - values[a] || a - b);
  return order.slice(0, k);
}

/** See native/moe/route_top_k.h for the definition; this is the same function in float64. */
export function routeTopKReference(
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
  bias: Float32Array | null,
  groupCount: number,
  groupKeep: number,
  groupTop2: boolean,
  mask: Uint8Array | null,
  maskStride: number,
  given: Int32Array | null,
  indices: Int32Array,
  weights: Float32Array,
): number {
  for (let i = 0; given !== null && i < tokens * k; i++) {
    if (given[i] < -1 || given[i] >= experts) return i + 1;
  }
  for (let row = 0; row < tokens; row++) {
    const exists = (e: number) => mask === null || mask[row * maskStride + e] !== 0;
    const l = readRow(logits, type, row, experts, exists);
    let ids: number[];
    if (given !== null) {
      ids = Array.from(given.subarray(row * k, row * k + k));
    } else {
      // Scores are monotone in the logits, so without a bias or sums the logits themselves decide: exp and
      // sigmoid would only create false ties.
      const needScores = groupTop2 || (bias !== null && !overSelected);
      let c: Float64Array = needScores && !overSelected ? scores(l, score) : l;
      if (bias !== null) c = c.map((x, e) => (Number.isNaN(x + bias[e]) ? -Infinity : x + bias[e]));
      const kept = keptGroups(c, exists, groupCount, groupKeep, groupTop2);
      const size = groupCount > 0 ? experts / groupCount : experts;
      ids = topK(c, k, (e) => exists(e) && (kept === null || kept.has(Math.floor(e / size))));
      while (ids.length < k) ids.push(-1);
    }
    indices.set(ids, row * k);
    weights.set(weightsOf(l, ids, score, overSelected, normalize, epsilon, floor, scale), row * k);
  }
  return 0;
}

function keptGroups(
  c: Float64Array,
  exists: (e: number) => boolean,
  count: number,
  keep: number,
  top2: boolean,
): Set<number> | null {
  if (count <= 1 || keep >= count) return null;
  const size = c.length / count;
  const groupScores = Array.from({ length: count }, (_, g) => {
    const members = Array.from(c.subarray(g * size, (g + 1) * size), (x, i) =>
      exists(g * size + i) ? x : -Infinity,
    );
    members.sort((a, b) => b - a);
    return top2 ? members[0] + members[1] : members[0];
  });
  return new Set(topK(groupScores, keep, () => true));
}
