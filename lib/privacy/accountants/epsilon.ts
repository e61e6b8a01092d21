import { gaussianDelta, gaussianEpsilon, gdpMu } from './gdp.ts';
import {
  type AccountantName,
  badOption,
  type Composition,
  checkAccountant,
  checkDelta,
  checkOptionsObject,
  collectPhases,
} from './options.ts';
import { type PrvOptions, prvDelta, prvEpsilon } from './prv.ts';
import { checkOrders, composedRdp, rdpToDelta, rdpToEpsilon } from './rdp.ts';
import { overflowOf, truncatedEpsilon, truncationDelta } from './truncated.ts';

/** What both directions of the question take. */
export interface AccountantOptions extends PrvOptions {
  /**
   * - `'rdp'`: Rényi accountant; a guarantee, a little loose (5–20 %), cheap.
   * - `'prv'`: numerical composition; a guarantee within `epsilonError` of the exact value.
   * - `'gdp'`: central limit approximation; **not a guarantee**, usually too small. For comparison only.
   */
  accountant: AccountantName;
  /** Orders α of the RDP accountant, each > 1.01. Default: those of Opacus (`DEFAULT_ORDERS`). */
  orders?: readonly number[];
}

export type EpsilonOptions = Composition & AccountantOptions & { delta: number };
export type DeltaOptions = Composition & AccountantOptions & { epsilon: number };

/** ε spent at the asked δ. */
export interface EpsilonResult {
  /** The guarantee (of `'gdp'`: the approximation): `upper` of the PRV accountant, so never too small. */
  epsilon: number;
  /** PRV of Poisson batches only: the exact ε is not below this. */
  lower?: number;
  /** PRV of Poisson batches only: the most likely value; not a guarantee. */
  estimate?: number;
  /** PRV only: the exact ε is not above this; equal to `epsilon`. */
  upper?: number;
  /** RDP only: the order α that gave the bound (NaN where nothing was spent). */
  order?: number;
}

/** δ at the asked ε; fields as in {@link EpsilonResult}. */
export interface DeltaResult {
  delta: number;
  lower?: number;
  estimate?: number;
  upper?: number;
  order?: number;
}

/**
 * ε at which DP-SGD (Poisson sampling, one example added or removed) is (ε, δ)-differentially private.
 *
 * @param options `accountant`, `delta`, and either `noiseMultiplier` (σ), `sampleRate` (q), `steps` and, for truncated
 *   batches, `overflowProbability` (τ), or `phases`, a list of such runs one after another
 * @returns `epsilon` is the number to report: a proven upper bound for `'rdp'` and `'prv'`; infinite where truncation
 *   takes all of `delta`
 * @throws HeddleError `ERR_OPTION` naming the option that is out of range
 */
export function computeEpsilon(options: EpsilonOptions): EpsilonResult {
  checkOptionsObject(options, 'options');
  const accountant = checkAccountant(options.accountant);
  const delta = checkDelta(options.delta);
  const orders = checkOrders(options.orders);
  const phases = collectPhases(options);
  const overflow = overflowOf(phases);
  if (accountant === 'gdp') {
    const mu = gdpMu(phases);
    return truncatedEpsilon((d) => ({ epsilon: gaussianEpsilon(mu, d) }), delta, overflow);
  }
  if (accountant === 'rdp') {
    if (phases.length === 0) return { epsilon: 0, order: Number.NaN };
    const rdp = composedRdp(phases, orders);
    return truncatedEpsilon((d) => rdpToEpsilon(orders, rdp, d), delta, overflow);
  }
  if (phases.length === 0) return { epsilon: 0, lower: 0, estimate: 0, upper: 0 };
  const poisson = (d: number) => {
    const bounds = prvEpsilon(phases, d, options);
    return { epsilon: bounds.upper, ...bounds };
  };
  if (overflow === 0) return poisson(delta);
  const { epsilon } = truncatedEpsilon(poisson, delta, overflow);
  return { epsilon, upper: epsilon };
}

/**
 * δ at which DP-SGD is (ε, δ)-differentially private: {@link computeEpsilon} the other way round. The PRV
 * accountant's `deltaError` is 1e-10 by default here.
 */
export function computeDelta(options: DeltaOptions): DeltaResult {
  checkOptionsObject(options, 'options');
  const accountant = checkAccountant(options.accountant);
  const { epsilon } = options;
  if (typeof epsilon !== 'number' || !(epsilon >= 0 && epsilon < Infinity)) {
    throw badOption('epsilon', epsilon, 'a finite number of at least 0');
  }
  const orders = checkOrders(options.orders);
  const phases = collectPhases(options);
  const truncation = truncationDelta(epsilon, overflowOf(phases));
  const total = (delta: number) => Math.min(1, delta + truncation);
  if (accountant === 'gdp') return { delta: total(gaussianDelta(epsilon, gdpMu(phases))) };
  if (accountant === 'rdp') {
    if (phases.length === 0) return { delta: 0, order: Number.NaN };
    const { delta, order } = rdpToDelta(orders, composedRdp(phases, orders), epsilon);
    return { delta: total(delta), order };
  }
  if (phases.length === 0) return { delta: 0, lower: 0, estimate: 0, upper: 0 };
  const bounds = prvDelta(phases, epsilon, options);
  const delta = total(bounds.upper);
  return truncation === 0 ? { delta, ...bounds } : { delta, upper: delta };
}
