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
} from '../op.ts';
import { routeTopKBackwardReference } from '../reference/moe/routeTopKBackward.ts';
import { allocate, asTensor, makeTensor, type Tensor, type TensorLike } from '../tensor.ts';
import { ROUTER_OPTION_NAMES, type RouterOptions, routerArguments } from './routerOptions.ts';
import { asMask, checkLogits } from './routeTopK.ts';

export interface RouteTopKBackwardOptions extends RouterOptions {
  /** int32 `[tokens, k]`: the experts that the forward chose. */
  indices: TensorLike;
  /** The mask that the forward had. */
  mask?: TensorLike;
  /** float32 `[tokens, experts]`. */
  out?: TensorLike;
}

const OPTIONS: ReadonlySet<string> = new Set([
  'indices',
  'mask',
  ...ROUTER_OPTION_NAMES,
  'out',
  'backend',
  'threads',
  'signal',
]);

const op: Op = {
  name: 'routeTopKBackward',
  reference: routeTopKBackwardReference,
  invalid: (index, args) => {
    const [, , , , experts, k] = args;
    const given = args[args.length - 2] as Int32Array;
    const at = `[${Math.floor(index / k)}, ${index % k}]`;
    return new HeddleError('ERR_VALUE', `indices${at} is ${given[index]}: expected -1 to ${experts - 1}`);
  },
};

function prepare(gradWeights: TensorLike, logits: TensorLike, options: RouteTopKBackwardOptions) {
  checkOptions(options, OPTIONS, 'routeTopKBackward');
  const g = asTensor(gradWeights, 'gradWeights', ['float32'], 2);
  const l = checkLogits(logits);
  const [tokens, experts] = l.dims;
  if (options === undefined || options.indices === undefined) {
    throw new HeddleError('ERR_ARGUMENT', 'routeTopKBackward: options with indices are required');
  }
  const ids = asTensor(options.indices, 'indices', ['int32'], 2);
  const k = ids.dims[1];
  if (ids.dims[0] !== tokens) {
    throw new HeddleError('ERR_SHAPE', `indices: expected ${tokens} tokens as in logits, got ${ids.dims[0]}`);
  }
  if (k < 1 || k > experts) {
    throw new HeddleError('ERR_SHAPE', `indices: expected 1 to ${experts} ids per token, got ${k}`);
  }
  if (g.dims[0] !== tokens || g.dims[1] !== k) {
    throw new HeddleError(
      'ERR_SHAPE',
      `gradWeights: expected [${tokens}, ${k}] as indices, got [${g.dims.join(', ')}]`,
    );
  }
  const router = routerArguments(options);
  const mask = options.mask === undefined ? null : asMask(options.mask, tokens, experts);
  const dims = [tokens, experts];
  let result: Tensor<'float32'>;
  if (options.out === undefined) {
    result = makeTensor('float32', allocate('float32', tokens * experts), dims);
  } else {
    result = asTensor(options.out, 'out', ['float32']);
    checkOut(result, dims, [g, l, ids, mask], 'out');
  }
  const args = [
    g.data,
    l.data,
    DTYPE_CODE[l.type],
    tokens,
    experts,
    k,
    ...router,
    mask === null ? null : mask.data,
    mask !== null && mask.dims.length === 2 ? experts : 0,
    ids.data,
    result.data,
  ];
  return { args, result };
}

/**
 * Gradient of the weights of `routeTopK` (or `routeWith`) by the logits, with the same options; the selection is held
 * fixed, so a selection bias and groups play no part. Where `normalizeFloor` decides the divisor, the divisor has no
 * gradient. Weights beside an id of -1 have none. Logits of -Infinity (and NaN) get a gradient of zero.
 *
 * @param gradWeights float32 `[tokens, k]`: gradient of the loss by the weights
 * @param logits `[tokens, experts]`: those of the forward
 * @returns float32 `[tokens, experts]`
 * @throws HeddleError `ERR_ARGUMENT`, `ERR_SHAPE`, `ERR_DTYPE`, `ERR_OPTION`, `ERR_BACKEND`, `ERR_ABORTED`;
 *   `ERR_VALUE` for an id out of range
 */
export async function routeTopKBackward(
  gradWeights: TensorLike,
  logits: TensorLike,
  options: RouteTopKBackwardOptions & AsyncOpOptions,
): Promise<Tensor<'float32'>> {
  const { args, result } = prepare(gradWeights, logits, options);
  await call(op, args, options);
  return result;
}

/** {@link routeTopKBackward} on the calling thread (and helpers, when `threads` > 1). */
export function routeTopKBackwardSync(
  gradWeights: TensorLike,
  logits: TensorLike,
  options: RouteTopKBackwardOptions & OpOptions,
): Tensor<'float32'> {
  const { args, result } = prepare(gradWeights, logits, options);
  callSync(op, args, options);
  return result;
}
