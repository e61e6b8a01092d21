import { HeddleError } from '../errors.ts';
import { checkOptions, optionInteger, optionNumber } from '../op.ts';
import { adaptThreshold } from '../reference/privacy/clipFactors.ts';
import { discreteGaussianReference } from '../reference/privacy/discreteGaussian.ts';
import { COUNT_STREAM } from '../reference/privacy/gaussianNoise.ts';
import { asTensor, type TensorLike } from '../tensor.ts';
import { keyArgument } from './chacha20.ts';
import { gridOf, noiseGranularity } from './discreteNoise.ts';

const FORMAT = 'heddle.privacy.adaptive-clipping';
const VERSION = 1;

export interface AdaptiveClippingOptions {
  /** 32 secret bytes; the run's noise key may be used, the count reads another stream of it. */
  key: Uint8Array;
  /** R of the first step. The paper starts at 0.1. */
  maxNorm: number;
  /** γ, the share of samples that the threshold is to leave alone. Default 0.5, the median. */
  quantile?: number;
  /** η of R ← R·e^(−η(b̃ − γ)). Default 0.2. */
  rate?: number;
  /** B̄: public and fixed, never the size of a batch that was drawn. */
  expectedBatch: number;
  /** σ_b, the standard deviation of the noise on the count, in samples. Default B̄/20, as in the paper. */
  countStddev?: number;
}

/** A threshold as it is saved. It holds no secret: everything in it was released by the mechanism. */
export interface SavedAdaptiveClipping {
  format: typeof FORMAT;
  version: typeof VERSION;
  maxNorm: number;
  quantile: number;
  rate: number;
  expectedBatch: number;
  countStddev: number;
  /** Steps below this one have been used. */
  nextStep: number;
}

const OPTIONS: ReadonlySet<string> = new Set([
  'key',
  'maxNorm',
  'quantile',
  'rate',
  'expectedBatch',
  'countStddev',
]);
/** Beyond these the float32 factors would underflow or overflow; clamping a released number costs no privacy. */
const LEAST = 2 ** -100;
const MOST = 2 ** 100;
const MAX_STDDEV = 2 ** 20;

type Norms = TensorLike | Float32Array;

/**
 * A clipping threshold that follows a quantile of the gradient norms, privately: Andrew, Thakkar, McMahan & Ramaswamy
 * 2021, "Differentially Private Learning with Adaptive Clipping".
 *
 * Each step releases, beside the noised sum, the noised number of samples that were not clipped:
 * `b̃ = ½ + (Σ_i (1[n_i ≤ R] − ½) + σ_b·Z)/B̄`. A sample moves the centred sum by at most ½, so this is a Gaussian
 * query of noise multiplier 2σ_b on the same batch. The sum (multiplier z_Δ) and the count are together one Gaussian
 * query of multiplier z with `1/z² = 1/z_Δ² + 1/(2σ_b)²` (theorem 1): record z in the ledger, and multiply R by z_Δ for
 * the sum's noise, {@link gradientNoiseMultiplier} and {@link effectiveNoiseMultiplier} convert. The update of R itself
 * is post-processing.
 *
 * The count's noise is exact discrete Gaussian noise on a grid that contains the count, so it needs no allowance for
 * rounding. A sample whose norm is not finite counts as clipped. An empty batch is a step like any other.
 *
 * `PrivateOptimizer` does all of this where it is given one as `maxNorm`. By hand:
 *
 * ```js
 * const clipping = new AdaptiveClipping({ key, maxNorm: 0.1, expectedBatch: 256 });
 * const sigma = clipping.gradientNoiseMultiplier(1.1); // for the sum; 1.1 is what the accountant is told
 * const factors = clipFactorsSync(squaredNorms, { maxNorm: clipping.maxNorm });
 * // … clippedGradients, addNoise with stddev sigma * clipping.maxNorm …
 * clipping.update(squaredNorms, step);
 * ```
 */
export class AdaptiveClipping {
  readonly quantile: number;
  readonly rate: number;
  readonly expectedBatch: number;
  readonly countStddev: number;
  readonly #key: Uint8Array;
  #maxNorm: number;
  #nextStep = 0;

  /** @throws HeddleError `ERR_ARGUMENT`, `ERR_OPTION` */
  constructor(options: AdaptiveClippingOptions) {
    if (options === undefined)
      throw new HeddleError('ERR_ARGUMENT', 'AdaptiveClipping: options are required');
    checkOptions(options, OPTIONS, 'AdaptiveClipping');
    keyArgument(options.key);
    this.#key = options.key.slice();
    this.#maxNorm = between(options.maxNorm, LEAST, MOST, 'maxNorm');
    this.quantile = between(options.quantile ?? 0.5, 0, 1, 'quantile');
    this.rate = optionNumber(options.rate, 0, 0.2, 'rate');
    this.expectedBatch = between(options.expectedBatch, Number.MIN_VALUE, Number.MAX_VALUE, 'expectedBatch');
    this.countStddev = between(
      options.countStddev ?? this.expectedBatch / 20,
      Number.MIN_VALUE,
      MAX_STDDEV,
      'countStddev',
    );
  }

  /** R of the step to come. */
  get maxNorm(): number {
    return this.#maxNorm;
  }

  /**
   * Moves R by the share of this step's samples with n ≤ R, after the step's factors were made from R.
   *
   * @param squaredNorms float32 `[B]`, or a list of one for each layer, as {@link clipFactors} takes them
   * @param step number of the logical step, above that of every earlier update: noise is never drawn twice
   * @returns the new R
   * @throws HeddleError `ERR_ARGUMENT`, `ERR_SHAPE`, `ERR_DTYPE`, `ERR_OPTION`
   */
  update(squaredNorms: Norms | readonly Norms[], step: number): number {
    const lists = (Array.isArray(squaredNorms) ? squaredNorms : [squaredNorms]).map((t: Norms, l) =>
      t instanceof Float32Array ? t : asTensor(t, `squaredNorms[${l}]`, ['float32'], 1).data,
    );
    if (lists.length === 0)
      throw new HeddleError('ERR_ARGUMENT', 'squaredNorms: expected at least one layer');
    const samples = lists[0].length;
    lists.forEach((list, l) => {
      if (list.length !== samples) {
        throw new HeddleError('ERR_SHAPE', `squaredNorms[${l}]: expected [${samples}], got [${list.length}]`);
      }
    });
    optionInteger(step, this.#nextStep, Number.MAX_SAFE_INTEGER - 1, 'step');
    const norms = Float64Array.from({ length: samples }, (_, i) =>
      Math.sqrt(lists.reduce((sum, list) => sum + Math.max(0, list[i]), 0)),
    );
    // The count is a multiple of ½, so the grid must not be coarser.
    const { granularity, sigma } = gridOf(
      this.countStddev,
      Math.min(0.5, noiseGranularity(this.countStddev)),
    );
    const [noise] = discreteGaussianReference(1, this.#key, step, 0, sigma, COUNT_STREAM);
    const { quantile, rate, expectedBatch } = this;
    const moved = adaptThreshold(norms, this.#maxNorm, {
      quantile,
      rate,
      expectedBatch,
      noise: noise * granularity,
    });
    this.#nextStep = step + 1;
    this.#maxNorm = Math.min(MOST, Math.max(LEAST, moved));
    return this.#maxNorm;
  }

  /**
   * z_Δ = (z⁻² − (2σ_b)⁻²)^−½: the noise multiplier of the gradient sum for which sum and count together have z.
   * @throws HeddleError `ERR_OPTION` where the count alone spends as much: z ≥ 2σ_b
   */
  gradientNoiseMultiplier(noiseMultiplier: number): number {
    const z = optionNumber(noiseMultiplier ?? Number.NaN, Number.MIN_VALUE, 0, 'noiseMultiplier');
    const rest = z ** -2 - (2 * this.countStddev) ** -2;
    if (!(rest > 0)) {
      throw new HeddleError(
        'ERR_OPTION',
        `noiseMultiplier must be below 2·countStddev = ${2 * this.countStddev}, got ${z}`,
      );
    }
    return rest ** -0.5;
  }

  /** z = (z_Δ⁻² + (2σ_b)⁻²)^−½: what the accountant is told for a sum noised with z_Δ. */
  effectiveNoiseMultiplier(gradientNoiseMultiplier: number): number {
    const z = optionNumber(gradientNoiseMultiplier ?? Number.NaN, 0, 0, 'gradientNoiseMultiplier');
    return z === 0 ? 0 : (z ** -2 + (2 * this.countStddev) ** -2) ** -0.5;
  }

  /** The saved form, without the key; called by `JSON.stringify`. */
  toJSON(): SavedAdaptiveClipping {
    const { quantile, rate, expectedBatch, countStddev } = this;
    return {
      format: FORMAT,
      version: VERSION,
      maxNorm: this.#maxNorm,
      quantile,
      rate,
      expectedBatch,
      countStddev,
      nextStep: this.#nextStep,
    };
  }

  /**
   * Goes on where a saved threshold stopped.
   * @param saved the JSON text, or what it parses to
   * @param key the key of the run
   * @throws HeddleError `ERR_CHECKPOINT` where it is damaged, of another format or of a later version; `ERR_ARGUMENT`
   */
  static fromJSON(saved: string | SavedAdaptiveClipping, key: Uint8Array): AdaptiveClipping {
    keyArgument(key);
    try {
      const value: unknown = typeof saved === 'string' ? JSON.parse(saved) : saved;
      const { format, version, nextStep, ...options } = value as SavedAdaptiveClipping;
      if (format !== FORMAT) throw new Error(`format must be '${FORMAT}', got ${JSON.stringify(format)}`);
      if (version !== VERSION) throw new Error(`version must be ${VERSION}, got ${JSON.stringify(version)}`);
      const missing = [...OPTIONS].find((name) => name !== 'key' && !Object.hasOwn(options, name));
      if (missing !== undefined) throw new Error(`${missing} is missing`);
      const restored = new AdaptiveClipping({ ...options, key });
      restored.#nextStep = optionInteger(nextStep, 0, Number.MAX_SAFE_INTEGER, 'nextStep');
      return restored;
    } catch (cause) {
      throw new HeddleError('ERR_CHECKPOINT', `adaptive clipping: ${(cause as Error).message}`, { cause });
    }
  }
}

function between(value: unknown, least: number, most: number, name: string): number {
  if (typeof value !== 'number' || !(value >= least && value <= most)) {
    throw new HeddleError(
      'ERR_OPTION',
      `${name} must be a number from ${least} to ${most}, got ${String(value)}`,
    );
  }
  return value;
}
