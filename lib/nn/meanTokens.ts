import { DTYPE_CODE, FLOAT_TYPES, type FloatType } from '../dtype.ts';
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
import { meanTokensReference } from '../reference/nn/elementwise.ts';
import { allocate, asTensor, makeTensor, type Tensor, type TensorLike } from '../tensor.ts';

export interface MeanTokensOptions {
  /** `[batch, width]` of the type of x. */
  out?: TensorLike;
}

const OPTIONS: ReadonlySet<string> = new Set(['out', 'backend', 'threads', 'signal']);

const op: Op = { name: 'meanTokens', reference: meanTokensReference };

function prepare(x: TensorLike, options: MeanTokensOptions | undefined) {
  checkOptions(options, OPTIONS, 'meanTokens');
  const input = asTensor(x, 'x', FLOAT_TYPES, 3);
  const [batch, tokens, width] = input.dims;
  if (tokens === 0) throw new HeddleError('ERR_SHAPE', `x: the mean of 0 tokens is not defined`);
  let out: Tensor<FloatType>;
  if (options?.out === undefined) {
    out = makeTensor(input.type, allocate(input.type, batch * width), [batch, width]);
  } else {
    out = asTensor(options.out, 'out', [input.type]);
    checkOut(out, [batch, width], [input], 'out');
  }
  return { args: [input.data, DTYPE_CODE[input.type], batch, tokens, width, out.data], out };
}

/**
 * Mean over the tokens of each sequence.
 *
 * @param x `[batch, tokens, width]` float32, bfloat16 or float16; at least one token
 * @returns `[batch, width]` of the type of x
 * @throws HeddleError `ERR_ARGUMENT`, `ERR_SHAPE`, `ERR_DTYPE`, `ERR_OPTION`, `ERR_BACKEND`, `ERR_ABORTED`
 */
export async function meanTokens(
  x: TensorLike,
  options?: MeanTokensOptions & AsyncOpOptions,
): Promise<Tensor<FloatType>> {
  const { args, out } = prepare(x, options);
  await call(op, args, options);
  return out;
}

/** {@link meanTokens} on the calling thread (and helpers, when `threads` > 1). */
export function meanTokensSync(x: TensorLike, options?: MeanTokensOptions & OpOptions): Tensor<FloatType> {
  const { args, out } = prepare(x, options);
  callSync(op, args, options);
  return out;
}
