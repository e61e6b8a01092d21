import { type AccountantOptions, computeEpsilon } from './epsilon.ts';
import {
  badOption,
  checkAccountant,
  checkBetween,
  checkDelta,
  checkOptionsObject,
  checkPhase,
} from './options.ts';

/** Options of {@link calibrateNoiseMultiplier}. */
export interface CalibrateOptions extends AccountantOptions {
  /** The ε that must not be exceeded. */
  epsilon: number;
  delta: number;
  sampleRate: number;
  steps: number;
  /** τ of truncated batches; see `PrivacyPhase`. Default 0. */
  overflowProbability?: number;
  /** How far below the target the ε of the result may be. Default: a thousandth of the target. */
  tolerance?: number;
}

const LARGEST_SIGMA = 1e7;
const SMALLEST_SIGMA = 0.01;

/**
 * The noise multiplier σ that spends the privacy budget and never more: `computeEpsilon` at the returned σ
 * with the same options gives an ε in [target − tolerance, target].
 *
 * @throws HeddleError `ERR_OPTION` where no σ up to 1e7 is private enough (for `'prv'`: a target that is not
 *   above its `epsilonError`), or where nothing is to be protected (`sampleRate` or `steps` 0)
 */
export function calibrateNoiseMultiplier(options: CalibrateOptions): number {
  checkOptionsObject(options, 'options');
  const accountant = checkAccountant(options.accountant);
  const target = checkBetween(options.epsilon, 'epsilon', 0, Infinity);
  checkDelta(options.delta);
  const { delta, sampleRate, steps, overflowProbability, orders, epsilonError, deltaError } = options;
  checkPhase({ noiseMultiplier: 1, sampleRate, steps, overflowProbability });
  if (sampleRate === 0) throw badOption('sampleRate', 0, 'greater than 0 to calibrate noise');
  if (steps === 0) throw badOption('steps', 0, 'greater than 0 to calibrate noise');
  const tolerance =
    options.tolerance === undefined
      ? 1e-3 * target
      : checkBetween(options.tolerance, 'tolerance', 0, Infinity);

  const epsilonOf = (noiseMultiplier: number): number =>
    computeEpsilon({
      accountant,
      delta,
      noiseMultiplier,
      sampleRate,
      steps,
      overflowProbability,
      orders,
      epsilonError,
      deltaError,
    }).epsilon;
  // The PRV accountant is dear: start it where the RDP accountant, which is not far off, is satisfied.
  const start =
    accountant === 'prv'
      ? calibrateNoiseMultiplier({ ...options, accountant: 'rdp', tolerance: 0.05 * target })
      : 1;
  return search(epsilonOf, target, tolerance, start, accountant === 'prv' ? 1.25 : 2);
}

/**
 * Finds σ with target − tolerance ≤ ε(σ) ≤ target. ε falls with σ; a bracket is found by multiplying, then
 * narrowed by false position on ln ε over ln σ towards the middle of the wanted band, with bisection whenever
 * that does not halve the bracket twice in a row.
 */
function search(
  epsilonOf: (sigma: number) => number,
  target: number,
  tolerance: number,
  start: number,
  factor: number,
): number {
  const aim = Math.max(target - 0.5 * tolerance, 0.5 * target);
  const excess = (epsilon: number): number =>
    epsilon > 0 ? Math.min(50, Math.max(-50, Math.log(epsilon / aim))) : -50;
  const good = (epsilon: number): boolean => epsilon <= target && epsilon >= target - tolerance;

  let high = start;
  let highEpsilon = epsilonOf(high);
  let low = high;
  let lowEpsilon = highEpsilon;
  while (highEpsilon > target) {
    if (high >= LARGEST_SIGMA) {
      throw badOption(
        'epsilon',
        target,
        `reachable with a noise multiplier of at most ${LARGEST_SIGMA} (a small target needs larger orders or a smaller epsilonError; truncated batches take a part of delta)`,
      );
    }
    low = high;
    lowEpsilon = highEpsilon;
    high *= factor;
    highEpsilon = epsilonOf(high);
  }
  while (lowEpsilon <= target) {
    if (good(lowEpsilon) || low <= SMALLEST_SIGMA) return low;
    high = low;
    highEpsilon = lowEpsilon;
    low = Math.max(SMALLEST_SIGMA, low / factor);
    lowEpsilon = epsilonOf(low);
  }
  let slow = 0;
  for (let i = 0; i < 200 && !good(highEpsilon) && high / low > 1 + 1e-14; i++) {
    const a = Math.log(low);
    const b = Math.log(high);
    const fa = excess(lowEpsilon);
    const fb = excess(highEpsilon);
    const fraction = slow < 2 && fa > fb ? Math.min(0.99, Math.max(0.01, fa / (fa - fb))) : 0.5;
    const sigma = Math.exp(a + (b - a) * fraction);
    const epsilon = epsilonOf(sigma);
    if (epsilon <= target) {
      high = sigma;
      highEpsilon = epsilon;
    } else {
      low = sigma;
      lowEpsilon = epsilon;
    }
    slow = Math.log(high / low) > 0.5 * (b - a) ? slow + 1 : 0;
  }
  return high;
}
