import { resolveBackend, resolveThreads } from '../backend.ts';
import { HeddleError } from '../errors.ts';
import { type AsyncOpOptions, checkOptions, type OpOptions, optionChoice, optionNumber } from '../op.ts';
import { type ClipMode, clipFactorsReference } from '../reference/privacy/clipFactors.ts';
import { asTensor, Tensor, type TensorLike } from '../tensor.ts';

const MODES = ['abadi', 'auto-s', 'auto-v', 'indicator'] as const satisfies readonly ClipMode[];
const OPTIONS: ReadonlySet<string> = new Set([
  'maxNorm',
  'mode',
  'stability',
  'gamma',
  'grouping',
  'backend',
  'threads',
  'signal',
]);

/** float32 `[B]` factors of one group, and which samples were left out because a norm is not finite. */
export class ClipFactors extends Tensor<'float32'> {
  /** Samples whose factor is 0 because one of their norms is NaN or infinite, ascending; the same in every group. */
  readonly nonFinite: readonly number[];

  /** @internal */
  constructor(data: Float32Array, nonFinite: readonly number[]) {
    super('float32', data, [data.length]);
    this.nonFinite = nonFinite;
  }
}

export interface ClipFactorsOptions {
  /** R, the bound of the whole gradient's norm: at least 0; Infinity clips nothing (abadi, indicator). */
  maxNorm: number;
  /**
   * How a norm n becomes a factor. `abadi` (default): min(1, R/(n + stability)); `auto-s`: R/(n + gamma);
   * `auto-v`: R/n; `indicator`: 1 where n ≤ R, else 0.
   */
  mode?: ClipMode;
  /** Added to n by `abadi`. Default 1e-6. */
  stability?: number;
  /** γ of `auto-s`. Default 0.01. */
  gamma?: number;
  /**
   * Which layers are clipped together. `flat` (default): all, one list of factors. `layer`: each alone. Or the group
   * number of every layer, 0 … K−1. K groups are bounded by R/√K each, so the whole stays bounded by R.
   */
  grouping?: 'flat' | 'layer' | readonly number[];
}

function groupsOf(grouping: unknown, layers: number): number[] {
  if (grouping === undefined || grouping === 'flat') return new Array(layers).fill(0);
  if (grouping === 'layer') return Array.from({ length: layers }, (_, l) => l);
  if (!Array.isArray(grouping)) {
    throw new HeddleError(
      'ERR_OPTION',
      `grouping must be flat, layer or a list of group numbers, got ${JSON.stringify(grouping)}`,
    );
  }
  const count = new Set(grouping).size;
  const valid = grouping.every((g) => Number.isInteger(g) && g >= 0 && g < count);
  if (grouping.length !== layers || !valid) {
    throw new HeddleError(
      'ERR_OPTION',
      `grouping must give each of the ${layers} layers a group, numbered from 0 without gaps, got [${grouping.join(', ')}]`,
    );
  }
  return grouping;
}

function asNorms(value: TensorLike | Float32Array, name: string): Float32Array {
  return value instanceof Float32Array ? value : asTensor(value, name, ['float32'], 1).data;
}

type Norms = TensorLike | Float32Array;

function compute(
  squaredNorms: Norms | readonly Norms[],
  options: ClipFactorsOptions & OpOptions,
): ClipFactors | ClipFactors[] {
  checkOptions(options, OPTIONS, 'clipFactors');
  if (options === undefined) {
    throw new HeddleError('ERR_ARGUMENT', 'clipFactors: options with maxNorm are required');
  }
  const norms = Array.isArray(squaredNorms)
    ? squaredNorms.map((t, l) => asNorms(t, `squaredNorms[${l}]`))
    : [asNorms(squaredNorms as Norms, 'squaredNorms')];
  if (norms.length === 0) throw new HeddleError('ERR_ARGUMENT', 'squaredNorms: expected at least one layer');
  norms.forEach((n, l) => {
    if (n.length !== norms[0].length) {
      throw new HeddleError(
        'ERR_SHAPE',
        `squaredNorms[${l}]: expected [${norms[0].length}], got [${n.length}]`,
      );
    }
  });
  const mode = optionChoice(options.mode, MODES, 'abadi', 'mode');
  const unbounded = options.maxNorm === Infinity && (mode === 'abadi' || mode === 'indicator');
  const maxNorm = unbounded ? Infinity : optionNumber(options.maxNorm ?? Number.NaN, 0, 0, 'maxNorm');
  const stability = optionNumber(options.stability, 0, 1e-6, 'stability');
  const gamma = optionNumber(options.gamma, 0, 0.01, 'gamma');
  if (mode === 'auto-s' && gamma === 0) {
    throw new HeddleError('ERR_OPTION', "gamma must be above 0 for mode 'auto-s'; use 'auto-v'");
  }
  const groups = groupsOf(options.grouping, norms.length);
  resolveBackend(options.backend);
  resolveThreads(options.threads);

  const all = clipFactorsReference(norms, { maxNorm, mode, stability, gamma, groups });
  const nonFinite: number[] = [];
  for (let i = 0; i < norms[0].length; i++) {
    if (norms.some((n) => !Number.isFinite(n[i]))) nonFinite.push(i);
  }
  const count = new Set(groups).size;
  const lists = Array.from({ length: count }, (_, g) => {
    const factors = all[groups.indexOf(g)];
    return new ClipFactors(
      Float32Array.from(factors, (f) => (Number.isFinite(f) ? f : 0)),
      nonFinite,
    );
  });
  const flat = options.grouping === undefined || options.grouping === 'flat';
  return flat ? lists[0] : lists;
}

/**
 * Factors that bound every sample's gradient, from its squared norms in each layer.
 *
 * A sample with a norm that is not finite in any layer gets factor 0 in all, and is listed in `nonFinite`. The work is
 * one pass over B norms per layer: it is done in TypeScript, in float64, on every backend.
 *
 * @param squaredNorms float32 `[B]`, or a list of one for each layer
 * @returns factors `[B]` for flat grouping, else one list for each group
 * @throws HeddleError `ERR_ARGUMENT`, `ERR_SHAPE`, `ERR_DTYPE`, `ERR_OPTION`, `ERR_BACKEND`, `ERR_ABORTED`
 */
export async function clipFactors(
  squaredNorms: Norms | readonly Norms[],
  options: ClipFactorsOptions & AsyncOpOptions & { grouping?: 'flat' },
): Promise<ClipFactors>;
export async function clipFactors(
  squaredNorms: Norms | readonly Norms[],
  options: ClipFactorsOptions & AsyncOpOptions & { grouping: 'layer' | readonly number[] },
): Promise<ClipFactors[]>;
export async function clipFactors(
  squaredNorms: Norms | readonly Norms[],
  options: ClipFactorsOptions & AsyncOpOptions,
): Promise<ClipFactors | ClipFactors[]> {
  const result = compute(squaredNorms, options);
  if (options.signal?.aborted) {
    throw new HeddleError('ERR_ABORTED', 'clipFactors was aborted', { cause: options.signal.reason });
  }
  return result;
}

/** {@link clipFactors} on the calling thread. */
export function clipFactorsSync(
  squaredNorms: Norms | readonly Norms[],
  options: ClipFactorsOptions & OpOptions & { grouping?: 'flat' },
): ClipFactors;
export function clipFactorsSync(
  squaredNorms: Norms | readonly Norms[],
  options: ClipFactorsOptions & OpOptions & { grouping: 'layer' | readonly number[] },
): ClipFactors[];
export function clipFactorsSync(
  squaredNorms: Norms | readonly Norms[],
  options: ClipFactorsOptions & OpOptions,
): ClipFactors | ClipFactors[] {
  return compute(squaredNorms, options);
}
