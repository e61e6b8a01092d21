import { HeddleError } from '../../errors.ts';

/** Steps of DP-SGD that share one noise multiplier and one sampling rate. */
export interface PrivacyPhase {
  /** σ: standard deviation of the noise divided by the clipping norm. */
  noiseMultiplier: number;
  /** q: probability with which each example enters a batch (Poisson sampling). */
  sampleRate: number;
  /** Number of steps, empty batches included. */
  steps: number;
  /**
   * τ: probability that one step's batch was not the Poisson batch, of a `TruncatedPoissonSampler`. It costs
   * (1 + e^ε)·steps·τ of δ. Default 0.
   */
  overflowProbability?: number;
}

/** Either one phase, spelled out, or a list of phases run one after another. */
export type Composition = (PrivacyPhase & { phases?: undefined }) | ComposedPhases;

/** A list of phases; their order does not matter to the result. */
export interface ComposedPhases {
  phases: readonly PrivacyPhase[];
  noiseMultiplier?: undefined;
  sampleRate?: undefined;
  steps?: undefined;
  overflowProbability?: undefined;
}

/** Which accountant computes the guarantee; see `computeEpsilon`. */
export type AccountantName = 'rdp' | 'prv' | 'gdp';

const ACCOUNTANTS: readonly AccountantName[] = ['rdp', 'prv', 'gdp'];

/** A value as it appears in a message. */
export function show(value: unknown): string {
  if (typeof value === 'string') return `'${value}'`;
  if (typeof value === 'bigint') return `${value}n`;
  if (typeof value === 'function') return 'a function';
  if (Array.isArray(value)) return 'an array';
  if (value !== null && typeof value === 'object') return 'an object';
  return String(value);
}

/** The error of an option with a value that is not allowed. */
export function badOption(name: string, value: unknown, allowed: string): HeddleError {
  return new HeddleError('ERR_OPTION', `${name}: must be ${allowed}, got ${show(value)}`);
}

/** Checks that `value` is a number strictly between `low` and `high`. */
export function checkBetween(value: unknown, name: string, low: number, high: number): number {
  if (typeof value !== 'number' || !(value > low && value < high)) {
    const allowed =
      high === Infinity
        ? `a finite number greater than ${low}`
        : `a number greater than ${low} and less than ${high}`;
    throw badOption(name, value, allowed);
  }
  return value;
}

/** δ of (ε, δ): strictly between 0 and 1. */
export function checkDelta(delta: unknown): number {
  return checkBetween(delta, 'delta', 0, 1);
}

/** The accountant's name, one of the known ones. */
export function checkAccountant(accountant: unknown): AccountantName {
  if (!ACCOUNTANTS.includes(accountant as AccountantName)) {
    throw badOption('accountant', accountant, `one of ${ACCOUNTANTS.map((a) => `'${a}'`).join(', ')}`);
  }
  return accountant as AccountantName;
}

/** Checks the options object itself, so that a missing one is reported and not a crash. */
export function checkOptionsObject(options: unknown, name: string): void {
  if (options === null || typeof options !== 'object' || Array.isArray(options)) {
    throw new HeddleError('ERR_ARGUMENT', `${name}: expected an object, got ${show(options)}`);
  }
}

/** Checks one phase and returns a copy with its numbers and nothing else; τ only where it is not 0. */
export function checkPhase(phase: PrivacyPhase, prefix = ''): PrivacyPhase {
  const { noiseMultiplier, sampleRate, steps, overflowProbability = 0 } = phase;
  checkBetween(noiseMultiplier, `${prefix}noiseMultiplier`, 0, Infinity);
  if (typeof sampleRate !== 'number' || !(sampleRate >= 0 && sampleRate <= 1)) {
    throw badOption(`${prefix}sampleRate`, sampleRate, 'a number from 0 to 1');
  }
  if (!Number.isSafeInteger(steps) || steps < 0) {
    throw badOption(`${prefix}steps`, steps, 'a non-negative integer');
  }
  if (typeof overflowProbability !== 'number' || !(overflowProbability >= 0 && overflowProbability <= 1)) {
    throw badOption(`${prefix}overflowProbability`, overflowProbability, 'a number from 0 to 1');
  }
  const checked = { noiseMultiplier, sampleRate, steps };
  return overflowProbability === 0 ? checked : { ...checked, overflowProbability };
}

/** Whether steps of both are steps of one mechanism, so that their numbers add up. */
export function sameMechanism(a: PrivacyPhase, b: PrivacyPhase): boolean {
  return (
    a.noiseMultiplier === b.noiseMultiplier &&
    a.sampleRate === b.sampleRate &&
    a.overflowProbability === b.overflowProbability
  );
}

/**
 * The checked phases of a composition: those that spend nothing (no steps, or rate 0) dropped, and equal
 * ones added up, since composition does not depend on the order.
 */
export function collectPhases(composition: Composition): PrivacyPhase[] {
  const checked: PrivacyPhase[] = [];
  if (composition.phases !== undefined) {
    const { phases } = composition;
    if (!Array.isArray(phases)) throw badOption('phases', phases, 'an array of phases');
    for (const name of ['noiseMultiplier', 'sampleRate', 'steps', 'overflowProbability'] as const) {
      if (composition[name] !== undefined) {
        throw badOption(name, composition[name], 'left out where phases is given');
      }
    }
    phases.forEach((phase, i) => {
      checkOptionsObject(phase, `phases[${i}]`);
      checked.push(checkPhase(phase, `phases[${i}].`));
    });
  } else {
    checked.push(checkPhase(composition as PrivacyPhase));
  }
  const collected: PrivacyPhase[] = [];
  for (const phase of checked) {
    if (phase.steps === 0 || phase.sampleRate === 0) continue;
    const same = collected.find((c) => sameMechanism(c, phase));
    if (same === undefined) collected.push(phase);
    else same.steps += phase.steps;
  }
  return collected;
}
