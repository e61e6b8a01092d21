import { DTYPE_CODE } from '../dtype.ts';
import { HeddleError } from '../errors.ts';
import {
  type AsyncOpOptions,
  call,
  callSync,
  checkOptions,
  type Op,
  type OpOptions,
  optionChoice,
  optionFlag,
  optionInteger,
  optionNumber,
} from '../op.ts';
import { routeSinkhornReference } from '../reference/moe/routeSinkhorn.ts';
import type { TensorLike } from '../tensor.ts';
import { type RouterScore, SCORE_CODE, SCORES } from './routerOptions.ts';
import { checkLogits, type Routing, routingResult } from './routeTopK.ts';

/** A routing and how the balancing went. */
export interface SinkhornRouting extends Routing {
  /** Scalings made; 0 when `training` is false. */
  iterations: number;
  /** False when `maxIterations` ended the scaling before it reached `tolerance`. */
  converged: boolean;
}

export interface SinkhornOptions {
  /** Experts per token, 1 to the number of experts. */
  k: number;
  /** Stops when the column factors change by no more than this on average. Default 1e-4. */
  tolerance?: number;
  /**
   * Added to each sum before it divides, at least 1e-30. It is relative to the largest term exp(l - max) of a row,
   * so that no logit overflows and a constant added to a row changes nothing. Default 1e-8.
   */
  epsilon?: number;
  /** Default 100. */
  maxIterations?: number;
  /** False: no balancing, plain top-k of the logits, as Megatron does when it evaluates. Default true. */
  training?: boolean;
  /** What the weights are made of. Default as Megatron: sigmoid when k = 1, else softmax over all experts. */
  score?: RouterScore;
  out?: Routing;
}

const MIN_EPSILON = 1e-30;
const OPTIONS: ReadonlySet<string> = new Set([
  'k',
  'tolerance',
  'epsilon',
  'maxIterations',
  'training',
  'score',
  'out',
  'backend',
  'threads',
  'signal',
]);

const op: Op = { name: 'routeSinkhorn', reference: routeSinkhornReference };

function prepare(logits: TensorLike, options: SinkhornOptions) {
  checkOptions(options, OPTIONS, 'routeSinkhorn');
  const l = checkLogits(logits);
  const [tokens, experts] = l.dims;
  if (options === undefined) {
    throw new HeddleError('ERR_ARGUMENT', 'routeSinkhorn: options with k are required');
  }
  const k = optionInteger(options.k, 1, experts, 'k');
  const tolerance = optionNumber(options.tolerance, 0, 1e-4, 'tolerance');
  const epsilon = optionNumber(options.epsilon, MIN_EPSILON, 1e-8, 'epsilon');
  const maxIterations =
    options.maxIterations === undefined
      ? 100
      : optionInteger(options.maxIterations, 1, 1_000_000, 'maxIterations');
  const training = optionFlag(options.training, true, 'training');
  const score = optionChoice(options.score, SCORES, k === 1 ? 'sigmoid' : 'softmax', 'score');
  const result = routingResult(tokens, k, options.out, [l]);
  const report = new Int32Array(2);
  const args = [
    l.data,
    DTYPE_CODE[l.type],
    tokens,
    experts,
    k,
    SCORE_CODE[score],
    tolerance,
    epsilon,
    training ? maxIterations : 0,
    result.indices.data,
    result.weights.data,
    report,
  ];
  const finish = (): SinkhornRouting => ({
    ...result,
    iterations: report[0],
    converged: report[1] === 1,
  });
  return { args, finish };
}

/**
 * Sinkhorn routing (Megatron): rows and columns of exp(logits) are scaled in turn until every expert gets the same
 * share, and each token takes the k largest entries of the balanced matrix. The weights come from the logits alone.
 *
 * A token's experts depend on the whole batch, by construction. Ties go to the lower expert id; NaN and infinite
 * logits count as in {@link routeTopK}. The result does not depend on the threads. A change of the scaling near
 * `tolerance` may end it one iteration earlier or later in another precision, and of entries that balancing makes equal
 * (all of them when there is only one token) rounding decides.
 *
 * @param logits `[tokens, experts]` float32, bfloat16 or float16; up to 4,096 experts
 * @returns indices int32 `[tokens, k]` in descending order of the balanced matrix, weights float32 `[tokens, k]`,
 *   iterations and converged
 * @throws HeddleError `ERR_ARGUMENT`, `ERR_SHAPE`, `ERR_DTYPE`, `ERR_OPTION`, `ERR_BACKEND`, `ERR_ABORTED`, `ERR_MEMORY`
 */
export async function routeSinkhorn(
  logits: TensorLike,
  options: SinkhornOptions & AsyncOpOptions,
): Promise<SinkhornRouting> {
  const { args, finish } = prepare(logits, options);
  await call(op, args, options);
  return finish();
}

/** {@link routeSinkhorn} on the calling thread (and helpers, when `threads` > 1). */
export function routeSinkhornSync(logits: TensorLike, options: SinkhornOptions & OpOptions): SinkhornRouting {
  const { args, finish } = prepare(logits, options);
  callSync(op, args, options);
  return finish();
}
