/** How a norm becomes a factor; n the norm, R the threshold. */
export type ClipMode = 'abadi' | 'auto-s' | 'auto-v' | 'indicator';

/** Options of {@link clipFactorsReference}. */
export interface ClipOptions {
  maxNorm: number;
  mode: ClipMode;
  /** Added to n by `abadi`: 1e-6 by convention. */
  stability: number;
  /** γ of `auto-s`: 0.01 by convention. */
  gamma: number;
  /** Group number, from 0, of every layer: all 0 is flat clipping, 0, 1, 2, … is per layer. */
  groups: readonly number[];
}

/**
 * - abadi: min(1, R/(n + stability)) — Abadi et al. 2016
 * - auto-s: R/(n + γ), auto-v: R/n — Bu et al. 2022, "Automatic Clipping"
 * - indicator: 1 where n ≤ R, else 0
 *
 * A norm that is not finite gets 0; so does n = 0 under auto-v, where the sample contributes 0 anyway.
 */
export function clipFactor(norm: number, threshold: number, options: ClipOptions): number {
  if (!Number.isFinite(norm)) return 0;
  switch (options.mode) {
    case 'abadi':
      return Math.min(1, threshold / (norm + options.stability));
    case 'auto-s':
      return threshold / (norm + options.gamma);
    case 'auto-v':
      return norm === 0 ? 0 : threshold / norm;
    case 'indicator':
      return norm <= threshold ? 1 : 0;
  }
}

/**
 * Factors of every layer and sample. K groups get R/√K each, so that the whole gradient is bounded by R
 * (the sensitivity is √(Σ_k R_k²)). A sample with a norm that is not finite in any layer is left out of all.
 *
 * @param squaredNorms one list of B squared norms for each layer
 * @returns one list of B factors for each layer; layers of one group have equal lists
 */
export function clipFactorsReference(
  squaredNorms: readonly ArrayLike<number>[],
  options: ClipOptions,
): Float64Array[] {
  const samples = squaredNorms.length === 0 ? 0 : squaredNorms[0].length;
  const count = new Set(options.groups).size;
  const threshold = options.maxNorm / Math.sqrt(count);
  const factors = squaredNorms.map(() => new Float64Array(samples));
  for (let i = 0; i < samples; i++) {
    const sums = new Map<number, number>();
    squaredNorms.forEach((squared, l) => {
      const group = options.groups[l];
      sums.set(group, (sums.get(group) ?? 0) + Math.max(0, squared[i]));
    });
    const finite = [...sums.values()].every(Number.isFinite);
    squaredNorms.forEach((_, l) => {
      const norm = Math.sqrt(sums.get(options.groups[l])!);
      factors[l][i] = finite ? clipFactor(norm, threshold, options) : 0;
    });
  }
  return factors;
}

/**
 * Quantile-adaptive threshold (Andrew, Thakkar, McMahan & Ramaswamy 2021): the share of samples with n ≤ R,
 * noised, moves R towards the norm that `quantile` of them do not exceed: R·e^{−rate·(b̃ − quantile)},
 * b̃ = ½ + (Σ_i (1[n_i ≤ R] − ½) + noise)/B̄ with B̄ the public expected batch. Centred, a sample moves the sum by ½ at
 * most. `noise` is drawn by the caller and accounted for like that of any Gaussian query. A norm that is not finite is
 * above R.
 */
export function adaptThreshold(
  norms: ArrayLike<number>,
  maxNorm: number,
  options: { quantile: number; rate: number; expectedBatch: number; noise: number },
): number {
  let centred = 0;
  for (let i = 0; i < norms.length; i++) centred += norms[i] <= maxNorm ? 0.5 : -0.5;
  const share = 0.5 + (centred + options.noise) / options.expectedBatch;
  return maxNorm * Math.exp(-options.rate * (share - options.quantile));
}
