import { DTYPE_CODE } from '../dtype.ts';
import { HeddleError } from '../errors.ts';
import {
  type AsyncOpOptions,
  call,
  callSync,
  checkOptions,
  checkOut,
  type Op,
  type OpOptions,
  optionChoice,
  optionInteger,
} from '../op.ts';
import { routeExpertChoiceReference } from '../reference/moe/routeExpertChoice.ts';
import { allocate, asTensor, makeTensor, type Tensor, type TensorLike } from '../tensor.ts';
import { type RouterScore, SCORE_CODE, SCORES } from './routerOptions.ts';
import { checkLogits } from './routeTopK.ts';

/** Tokens chosen by each expert and their weights. */
export interface ExpertChoice {
  /** `[experts, capacity]` token ids in descending order of score. */
  indices: Tensor<'int32'>;
  /** `[experts, capacity]` weights: the scores, not renormalised. */
  weights: Tensor<'float32'>;
}

export interface ExpertChoiceOptions {
  /** Tokens each expert takes, 0 to the number of tokens; usually tokens · factor / experts. */
  capacity: number;
  /** Score of an expert for a token. Default softmax, over the token's experts. */
  score?: RouterScore;
  out?: ExpertChoice;
}

const OPTIONS: ReadonlySet<string> = new Set(['capacity', 'score', 'out', 'backend', 'threads', 'signal']);

const op: Op = { name: 'routeExpertChoice', reference: routeExpertChoiceReference };

function prepare(logits: TensorLike, options: ExpertChoiceOptions) {
  checkOptions(options, OPTIONS, 'routeExpertChoice');
  const l = checkLogits(logits);
  const [tokens, experts] = l.dims;
  if (options === undefined) {
    throw new HeddleError('ERR_ARGUMENT', 'routeExpertChoice: options with capacity are required');
  }
  const capacity = optionInteger(options.capacity, 0, tokens, 'capacity');
  const score = optionChoice(options.score, SCORES, 'softmax', 'score');
  const dims = [experts, capacity];
  let result: ExpertChoice;
  if (options.out === undefined) {
    result = {
      indices: makeTensor('int32', allocate('int32', experts * capacity), dims),
      weights: makeTensor('float32', allocate('float32', experts * capacity), [experts, capacity]),
    };
  } else {
    const indices = asTensor(options.out.indices, 'out.indices', ['int32']);
    const weights = asTensor(options.out.weights, 'out.weights', ['float32']);
    checkOut(indices, dims, [l], 'out.indices');
    checkOut(weights, dims, [l, indices], 'out.weights');
    result = { indices, weights };
  }
  const args = [
    l.data,
    DTYPE_CODE[l.type],
    tokens,
    experts,
    SCORE_CODE[score],
    capacity,
    result.indices.data,
    result.weights.data,
  ];
  return { args, result };
}

/**
 * Expert-choice routing: every expert takes its `capacity` best tokens, so the load is balanced by construction; a
 * token may get several experts or none (Zhou et al. 2022, V-MoE).
 *
 * **Not causal:** whether a token is chosen depends on all other tokens of the batch, later ones included. Do not
 * use it to generate text, or results will depend on tokens that do not exist yet.
 *
 * Ties go to the lower token. NaN and infinite logits count as in {@link routeTopK}.
 *
 * @param logits `[tokens, experts]` float32, bfloat16 or float16; up to 4,096 experts
 * @returns indices int32 `[experts, capacity]` of tokens, weights float32 `[experts, capacity]`
 * @throws HeddleError `ERR_ARGUMENT`, `ERR_SHAPE`, `ERR_DTYPE`, `ERR_OPTION`, `ERR_BACKEND`, `ERR_ABORTED`, `ERR_MEMORY`
 */
export async function routeExpertChoice(
  logits: TensorLike,
  options: ExpertChoiceOptions & AsyncOpOptions,
): Promise<ExpertChoice> {
  const { args, result } = prepare(logits, options);
  await call(op, args, options);
  return result;
}

/** {@link routeExpertChoice} on the calling thread (and helpers, when `threads` > 1). */
export function routeExpertChoiceSync(
  logits: TensorLike,
  options: ExpertChoiceOptions & OpOptions,
): ExpertChoice {
  const { args, result } = prepare(logits, options);
  callSync(op, args, options);
  return result;
}
