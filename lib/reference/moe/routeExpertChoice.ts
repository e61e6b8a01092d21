import type { TypedArray } from '../../tensor.ts';
import { readRow, scores } from './router.ts';
import { topK } from './routeTopK.ts';

/** See native/moe/route_expert_choice.h for the definition; this is the same function in float64. */
export function routeExpertChoiceReference(
  logits: TypedArray,
  type: number,
  tokens: number,
  experts: number,
  score: number,
  capacity: number,
  indices: Int32Array,
  weights: Float32Array,
): number {
  const s = Array.from({ length: tokens }, (_, t) =>
    scores(
      readRow(logits, type, t, experts, () => true),
      score,
    ),
  );
  for (let e = 0; e < experts; e++) {
    const column = s.map((row) => row[e]);
    const chosen = topK(column, capacity, () => true);
    indices.set(chosen, e * capacity);
    weights.set(
      chosen.map((t) => column[t]),
      e * capacity,
    );
  }
  return 0;
}
