import type { TypedArray } from '../../tensor.ts';
import { readRow, weightsOf } from './router.ts';
import { topK } from './routeTopK.ts';

/** Scales rows and columns of exp(l - max) in turn; returns the column factors. See native/moe/route_sinkhorn.h. */
function balance(
  rows: Float64Array[],
  experts: number,
  tolerance: number,
  epsilon: number,
  maxIterations: number,
) {
  const cost = rows.map((l) => {
    const top = l.reduce((a, b) => Math.max(a, b), -Infinity);
    return l.map((x) => Math.exp(x - top));
  });
  let right = new Float64Array(experts).fill(1);
  let iterations = 0;
  let converged = rows.length === 0 || maxIterations === 0;
  while (!converged && iterations < maxIterations) {
    const columns = new Float64Array(experts);
    for (const c of cost) {
      const sum = c.reduce((a, x, e) => a + x * right[e], 0);
      const left = 1 / (rows.length * (sum + epsilon));
      for (let e = 0; e < experts; e++) columns[e] += left * c[e];
    }
    const fresh = columns.map((sum) => 1 / (experts * (sum + epsilon)));
    const change = right.reduce((a, x, e) => a + Math.abs(x - fresh[e]), 0) / experts;
    right = fresh;
    iterations++;
    converged = change <= tolerance;
  }
  return { right, iterations, converged };
}

/** See native/moe/route_sinkhorn.h for the definition; this is the same function in float64. */
export function routeSinkhornReference(
  logits: TypedArray,
  type: number,
  tokens: number,
  experts: number,
  k: number,
  score: number,
  tolerance: number,
  epsilon: number,
  maxIterations: number,
  indices: Int32Array,
  weights: Float32Array,
  report: Int32Array,
): number {
  const rows = Array.from({ length: tokens }, (_, t) => readRow(logits, type, t, experts, () => true));
  const { right, iterations, converged } = balance(rows, experts, tolerance, epsilon, maxIterations);
  rows.forEach((l, t) => {
    const chosen = topK(
      l.map((x, e) => x + Math.log(right[e])),
      k,
      () => true,
    );
    indices.set(chosen, t * k);
    weights.set(weightsOf(l, chosen, score, false, false, 0, 0, 1), t * k);
  });
  report[0] = iterations;
  report[1] = converged ? 1 : 0;
  return 0;
}
