import { HeddleError } from '../errors.ts';
import { checkOptions, optionInteger, optionNumber } from '../op.ts';

/** Largest standard deviation in steps of the grid: all integers of the sampler then fit 64 bits. */
const MAX_SIGMA = 2 ** 23;
const SMALLEST = 2 ** -126;
const LARGEST = 2 ** 126;

/**
 * The default step of the grid of discrete noise: the power of two in (stddev/2²¹, stddev/2²⁰].
 * @throws HeddleError `ERR_OPTION` for a standard deviation that is not a finite number above 0
 */
export function noiseGranularity(stddev: number): number {
  optionNumber(stddev ?? Number.NaN, Number.MIN_VALUE, 0, 'stddev');
  // Exact: the exponent comes from comparisons, not from a rounded logarithm.
  let g = 1;
  while (g * 2 ** 20 > stddev && g > SMALLEST) g /= 2;
  while (g * 2 ** 21 <= stddev && g < LARGEST) g *= 2;
  return g;
}

/** @internal Checks a grid; sigma is the standard deviation in its steps, rounded up. */
export function gridOf(stddev: number, given: number | undefined): { granularity: number; sigma: number } {
  if (given === undefined && stddev === 0) {
    throw new HeddleError('ERR_OPTION', 'granularity is required where stddev is 0');
  }
  const granularity = given ?? noiseGranularity(stddev);
  const isPower =
    typeof granularity === 'number' &&
    granularity >= SMALLEST &&
    granularity <= LARGEST &&
    Number.isInteger(Math.log2(granularity)) &&
    2 ** Math.log2(granularity) === granularity;
  if (!isPower) {
    throw new HeddleError(
      'ERR_OPTION',
      `granularity must be a power of two from 2^-126 to 2^126, got ${String(granularity)}`,
    );
  }
  const sigma = Math.ceil(stddev / granularity);
  if (sigma > MAX_SIGMA) {
    throw new HeddleError(
      'ERR_OPTION',
      `granularity must be at least stddev/2^23 (stddev ${stddev}), got ${granularity}`,
    );
  }
  return { granularity, sigma };
}

export interface DiscreteNoiseOptions {
  /** R, the bound of every sample's clipped gradient. */
  maxNorm: number;
  /** σ, as the accountant is told. */
  noiseMultiplier: number;
  /** n, the elements of all parameters together. */
  elements: number;
  /** Step of the grid, a power of two. Default: that of {@link noiseGranularity} for σ·R. */
  granularity?: number;
  /**
   * A bound of how far floating-point addition may take the clipped sum from the exact one (l2 norm, all elements), on
   * either of two neighbouring batches. Default 0: the accounting then trusts the sum's arithmetic.
   */
  sumError?: number;
}

export interface DiscreteNoisePlan {
  granularity: number;
  /** R + g·√n + 2·sumError. */
  sensitivity: number;
  /** What `addNoise` draws: σ·sensitivity, rounded up to the grid. */
  stddev: number;
}

const PLAN_OPTIONS: ReadonlySet<string> = new Set([
  'maxNorm',
  'noiseMultiplier',
  'elements',
  'granularity',
  'sumError',
]);

/**
 * What to give {@link addNoise} in mode `discrete`, so that a step has the noise multiplier that the accountant is told:
 * the standard deviation pays for rounding the sum to the grid.
 *
 * Two sums of neighbouring batches differ by at most R; rounding moves each element of each by at most g/2, so that the
 * rounded ones differ by at most R + g·√n. Discrete Gaussian noise of the same σ then has no larger Rényi divergence than
 * continuous noise (Canonne, Kamath & Steinke 2020, theorem 4 and section 4.1), which is what the RDP accountant uses
 * without sampling. For subsampled steps the accountants compute with the continuous mechanism; at σ/g ≥ 2²⁰ the two
 * differ by less than the accountants' own bounds, but that is not a theorem of the paper.
 *
 * @throws HeddleError `ERR_OPTION`, `ERR_ARGUMENT`
 */
export function discreteNoisePlan(options: DiscreteNoiseOptions): DiscreteNoisePlan {
  if (options === undefined) throw new HeddleError('ERR_ARGUMENT', 'discreteNoisePlan: options are required');
  checkOptions(options, PLAN_OPTIONS, 'discreteNoisePlan');
  const maxNorm = optionNumber(options.maxNorm ?? Number.NaN, Number.MIN_VALUE, 0, 'maxNorm');
  const multiplier = optionNumber(
    options.noiseMultiplier ?? Number.NaN,
    Number.MIN_VALUE,
    0,
    'noiseMultiplier',
  );
  const elements = optionInteger(options.elements, 1, Number.MAX_SAFE_INTEGER, 'elements');
  const sumError = optionNumber(options.sumError, 0, 0, 'sumError');
  const granularity = options.granularity ?? noiseGranularity(multiplier * maxNorm);
  const sensitivity = maxNorm + granularity * Math.sqrt(elements) + 2 * sumError;
  const { sigma } = gridOf(multiplier * sensitivity, granularity);
  return { granularity, sensitivity, stddev: sigma * granularity };
}
