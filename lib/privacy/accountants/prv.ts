/**
 * The PRV accountant: tight numerical composition with proven error bounds.
 *
 * Source: Gopi, Lee & Wutschitz, "Numerical Composition of Differential Privacy" (NeurIPS 2021).
 *
 * Every step's privacy loss is rounded to a mesh with its mean kept (`discretise`), the k losses are added by
 * FFT (`compose`), and ε is read off the sum, moved by the error bounds:
 * - rounding: the k errors are independent, of mean 0, each in an interval of the mesh's length h, so by
 *   Hoeffding their sum exceeds ε_err = h·√(k/2·ln(12/δ_err)) with probability at most δ_err/12;
 * - truncation of the losses costs at most δ_err/4, wrap-around of the sum at most δ_err/2;
 * - rounding in the transform is covered by a measured allowance added to δ_err.
 * Hence δ̃(ε + ε_err) − δ_err ≤ δ(ε) ≤ δ̃(ε − ε_err) + δ_err for the true δ and the computed δ̃.
 */
import {
  type ComposedLoss,
  compose,
  deltaAt,
  epsilonAt,
  type RepeatedLoss,
  sumRange,
} from './composedLoss.ts';
import { type Direction, discretise, lossRange, lossVariable } from './lossVariable.ts';
import { badOption, type PrivacyPhase } from './options.ts';

/** Accuracy of the PRV accountant. */
export interface PrvOptions {
  /**
   * ε_err: how far the estimate may be from the bounds. Default 0.01, or as much more as keeps the transform
   * within 2²¹ points (a run whose ε is in the hundreds); a value given here is kept, or refused.
   */
  epsilonError?: number;
  /** δ_err: the part of δ set aside for the numerical errors. Default δ/1000. */
  deltaError?: number;
}

/** Bounds of the PRV accountant: the true value is in [lower, upper], and `upper` is the guarantee. */
export interface PrvBounds {
  lower: number;
  estimate: number;
  upper: number;
}

const DEFAULT_EPSILON_ERROR = 0.01;
const DEFAULT_SIZE = 2 ** 21;
const LARGEST_SIZE = 2 ** 23;
const SMALLEST_SIGMA = 0.01;

/** The composed loss in one direction, and the ε error that its mesh has. */
interface Composed {
  sum: ComposedLoss;
  epsilonError: number;
}

/** ε(δ) of at least one phase that spends something. */
export function prvEpsilon(phases: readonly PrivacyPhase[], delta: number, options: PrvOptions): PrvBounds {
  const deltaError = checkDeltaError(options.deltaError, delta);
  return worse(phases, deltaError, options, ({ sum, epsilonError }) => {
    const slack = deltaError + sum.rounding;
    if (slack >= 0.5 * delta) throw tooSmall(delta, sum.rounding);
    return {
      lower: Math.max(0, epsilonAt(sum, delta + slack) - epsilonError),
      estimate: Math.max(0, epsilonAt(sum, delta)),
      upper: Math.max(0, epsilonAt(sum, delta - slack) + epsilonError),
    };
  });
}

/** δ(ε) of at least one phase that spends something. */
export function prvDelta(phases: readonly PrivacyPhase[], epsilon: number, options: PrvOptions): PrvBounds {
  const deltaError = options.deltaError ?? 1e-10;
  checkDeltaError(deltaError, 1);
  return worse(phases, deltaError, options, ({ sum, epsilonError }) => {
    const slack = deltaError + sum.rounding;
    return {
      lower: clamp(deltaAt(sum, epsilon + epsilonError) - slack),
      estimate: clamp(deltaAt(sum, epsilon)),
      upper: clamp(deltaAt(sum, epsilon - epsilonError) + slack),
    };
  });
}

function clamp(delta: number): number {
  return Math.min(1, Math.max(0, delta));
}

function checkDeltaError(value: number | undefined, delta: number): number {
  if (value === undefined) return delta / 1000;
  if (typeof value !== 'number' || !(value > 0 && value < 0.5 * delta)) {
    throw badOption('deltaError', value, `a number greater than 0 and less than delta/2 = ${0.5 * delta}`);
  }
  return value;
}

function tooSmall(delta: number, rounding: number): Error {
  return badOption(
    'delta',
    delta,
    `greater than ${(2.01 * rounding).toExponential(1)} for accountant 'prv' here (float64 transforms resolve no less; use 'rdp')`,
  );
}

/** Bounds in both directions, and the worse of each. */
function worse(
  phases: readonly PrivacyPhase[],
  deltaError: number,
  options: PrvOptions,
  read: (composed: Composed) => PrvBounds,
): PrvBounds {
  const remove = read(composeLosses(phases, deltaError, options, 'remove'));
  const add = read(composeLosses(phases, deltaError, options, 'add'));
  return {
    lower: Math.max(remove.lower, add.lower),
    estimate: Math.max(remove.estimate, add.estimate),
    upper: Math.max(remove.upper, add.upper),
  };
}

function composeLosses(
  phases: readonly PrivacyPhase[],
  deltaError: number,
  options: PrvOptions,
  direction: Direction,
): Composed {
  let totalSteps = 0;
  for (const { steps, noiseMultiplier } of phases) {
    totalSteps += steps;
    if (noiseMultiplier < SMALLEST_SIGMA) {
      throw badOption('noiseMultiplier', noiseMultiplier, `at least ${SMALLEST_SIGMA} for accountant 'prv'`);
    }
  }
  if (options.epsilonError !== undefined) {
    const value: unknown = options.epsilonError;
    if (typeof value !== 'number' || !(value > 0 && value < Infinity)) {
      throw badOption('epsilonError', value, 'a finite number greater than 0');
    }
  }
  const fixed = options.epsilonError !== undefined;
  const sizeLimit = fixed ? LARGEST_SIZE : DEFAULT_SIZE;
  const meshOf = (epsilonError: number): number =>
    epsilonError / Math.sqrt(0.5 * totalSteps * Math.log(12 / deltaError));

  // Tails far below δ_err/4 cost little room, and keep the mean of the truncated loss equal to the loss's.
  const tail = Math.min(deltaError / (8 * totalSteps), 1e-15);
  const losses = phases.map(({ noiseMultiplier, sampleRate, steps }) => {
    const loss = lossVariable(noiseMultiplier, sampleRate, direction);
    return { loss, steps, ...lossRange(loss, tail) };
  });
  const widest = Math.max(...losses.map(({ low, high }) => high - low));

  let epsilonError = options.epsilonError ?? DEFAULT_EPSILON_ERROR;
  for (;;) {
    const mesh = meshOf(epsilonError);
    let bins = widest / mesh + 2;
    if (bins <= sizeLimit) {
      const repeated: RepeatedLoss[] = losses.map(({ loss, low, high, steps }) => ({
        loss: discretise(loss, low, high, mesh),
        steps,
      }));
      const range = sumRange(repeated, mesh, deltaError / 4);
      bins = Math.max(bins, (range.high - range.low) / mesh + 2);
      if (bins <= sizeLimit) {
        const size = 2 ** Math.max(4, Math.ceil(Math.log2(bins)));
        return { sum: compose(repeated, mesh, range, size), epsilonError };
      }
    }
    if (fixed) {
      throw badOption(
        'epsilonError',
        epsilonError,
        `at least ${((epsilonError * bins) / sizeLimit).toPrecision(3)} here`,
      );
    }
    epsilonError *= (1.05 * bins) / sizeLimit;
  }
}
