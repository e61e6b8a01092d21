import { HeddleError } from '../errors.ts';
import {
  type AsyncOpOptions,
  call,
  callSync,
  type Op,
  type OpOptions,
  optionChoice,
  optionInteger,
} from '../op.ts';
import { loadBalancingLossReference, loadLossReference } from '../reference/moe/routerLoss.ts';
import type { TensorLike } from '../tensor.ts';
import {
  invalidIndex,
  LOSS_OPTIONS,
  type LossScoreOptions,
  prepareLoss,
  type RouterLoss,
  type RouterLossOptions,
  SCORE_OPTIONS,
} from './routerLoss.ts';
import { MAX_EXPERTS } from './routeTopK.ts';

export interface LoadBalancingLossOptions extends RouterLossOptions, LossScoreOptions {
  /**
   * What the counts are divided by: `'routes'`, k · tokens, so that a uniform load gives 1 (Switch, GShard, Megatron);
   * `'tokens'`, so that it gives k (transformers). Default `'routes'`.
   */
  normalization?: 'routes' | 'tokens';
}

export interface LoadLossOptions extends Pick<RouterLossOptions, 'mask' | 'coefficient'> {
  /** 1 to 4,096. */
  numExperts: number;
}

const NORMALIZATIONS = ['routes', 'tokens'] as const;
const BALANCING_OPTIONS: ReadonlySet<string> = new Set(['normalization', ...SCORE_OPTIONS, ...LOSS_OPTIONS]);
const LOAD_OPTIONS: ReadonlySet<string> = new Set([
  'numExperts',
  'mask',
  'coefficient',
  'backend',
  'threads',
  'signal',
]);

const balancing: Op = {
  name: 'loadBalancingLoss',
  reference: loadBalancingLossReference,
  invalid: invalidIndex,
};
const load: Op = { name: 'loadLoss', reference: loadLossReference, invalid: invalidIndex };

function prepareBalancing(
  logits: TensorLike,
  indices: TensorLike,
  options: LoadBalancingLossOptions | undefined,
) {
  const normalization = optionChoice(options?.normalization, NORMALIZATIONS, 'routes', 'normalization');
  return prepareLoss(
    {
      name: 'loadBalancingLoss',
      allowed: BALANCING_OPTIONS,
      logits: logits ?? null,
      indices: indices ?? null,
      perToken: normalization === 'tokens',
    },
    options,
  );
}

/**
 * Load-balancing loss `E · Σ_e f_e · P_e`: f_e is expert e's share of the routes, P_e its mean probability. Its gradient
 * goes through P alone. Ids of -1 are not counted, but k · tokens stays the divisor.
 *
 * To treat several layers as one, as transformers does, pass their logits and indices concatenated along the tokens.
 *
 * @param logits `[tokens, experts]` float32, bfloat16 or float16 (probabilities with `score: 'none'`)
 * @param indices int32 `[tokens, k]`, each -1 or an expert id, as `routeTopK` returned them
 * @throws HeddleError `ERR_ARGUMENT`, `ERR_SHAPE`, `ERR_DTYPE`, `ERR_OPTION`, `ERR_BACKEND`, `ERR_ABORTED`;
 *   `ERR_VALUE` for an id out of range
 */
export async function loadBalancingLoss(
  logits: TensorLike,
  indices: TensorLike,
  options?: LoadBalancingLossOptions & AsyncOpOptions,
): Promise<RouterLoss> {
  const { args, finish } = prepareBalancing(logits, indices, options);
  await call(balancing, args, options);
  return finish();
}

/** {@link loadBalancingLoss} on the calling thread (and helpers, when `threads` > 1). */
export function loadBalancingLossSync(
  logits: TensorLike,
  indices: TensorLike,
  options?: LoadBalancingLossOptions & OpOptions,
): RouterLoss {
  const { args, finish } = prepareBalancing(logits, indices, options);
  callSync(balancing, args, options);
  return finish();
}

function prepareLoad(indices: TensorLike, options: LoadLossOptions) {
  if (options === undefined || options === null) {
    throw new HeddleError('ERR_ARGUMENT', 'loadLoss: options with numExperts are required');
  }
  const numExperts = optionInteger(options.numExperts, 1, MAX_EXPERTS, 'numExperts');
  return prepareLoss(
    { name: 'loadLoss', allowed: LOAD_OPTIONS, indices: indices ?? null, numExperts },
    options,
  );
}

/**
 * How unevenly the routes are spread: population variance of the experts' counts over their squared mean. It has no
 * gradient; see `importanceLoss` for the differentiable one.
 *
 * @param indices int32 `[tokens, k]`, each -1 (not counted) or an expert id
 * @throws HeddleError as {@link loadBalancingLoss}
 */
export async function loadLoss(
  indices: TensorLike,
  options: LoadLossOptions & AsyncOpOptions,
): Promise<RouterLoss> {
  const { args, finish } = prepareLoad(indices, options);
  await call(load, args, options);
  return finish();
}

/** {@link loadLoss} on the calling thread. */
export function loadLossSync(indices: TensorLike, options: LoadLossOptions & OpOptions): RouterLoss {
  const { args, finish } = prepareLoad(indices, options);
  callSync(load, args, options);
  return finish();
}
