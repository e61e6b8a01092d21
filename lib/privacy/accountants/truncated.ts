import type { PrivacyPhase } from './options.ts';

/** Σ steps·τ: at most the probability that any batch of the run was not its Poisson batch. */
export function overflowOf(phases: readonly PrivacyPhase[]): number {
  return phases.reduce((sum, p) => sum + p.steps * (p.overflowProbability ?? 0), 0);
}

/**
 * What truncated batches add to the δ of Poisson batches at ε: (1 + e^ε)·overflow. The two runs can be coupled so that
 * they differ with probability `overflow` at most, on either of two neighbouring datasets, so
 * `P[M'(D) ∈ S] ≤ P[M(D) ∈ S] + overflow ≤ e^ε·P[M(D') ∈ S] + δ + overflow`, and P[M(D') ∈ S] ≤ P[M'(D') ∈ S] + overflow
 * (Chua et al. 2024, "Scalable DP-SGD: Shuffling vs. Poisson Subsampling").
 */
export function truncationDelta(epsilon: number, overflow: number): number {
  return overflow === 0 ? 0 : (1 + Math.exp(epsilon)) * overflow;
}

/** Of the δ that truncation takes, how much more is set aside than the last ε asked for: ε then rests after a step or two. */
const RESERVE = 1.01;

/**
 * ε at `delta` of a run with truncated batches, from that of the Poisson run: the least ε = poisson(δ'), nearly, for which
 * δ' + {@link truncationDelta}(ε) ≤ δ. Infinite where `overflow` leaves nothing of δ.
 */
export function truncatedEpsilon<R extends { epsilon: number }>(
  poisson: (delta: number) => R,
  delta: number,
  overflow: number,
): R | { epsilon: number } {
  let rest = delta;
  for (;;) {
    const result = poisson(rest);
    const needed = truncationDelta(result.epsilon, overflow);
    if (rest + needed <= delta) return result;
    // ε grows from one round to the next, by so much that (1 + e^ε) grows by 1 % at least.
    rest = delta - RESERVE * needed;
    if (!(rest > 0)) return { epsilon: Infinity };
  }
}
