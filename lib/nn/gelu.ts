import { placeOf } from '../device.ts';
import { DTYPE_CODE, FLOAT_TYPES, type FloatType } from '../dtype.ts';
import {
  type AsyncOpOptions,
  call,
  callSync,
  checkOptions,
  type Op,
  type OpOptions,
  optionChoice,
} from '../op.ts';
import { geluReference } from '../reference/nn/elementwise.ts';
import { asTensor, type Tensor, type TensorLike } from '../tensor.ts';
import { elementwiseOutput, givenTensor } from './outputs.ts';

export interface GeluOptions {
  /** `'none'`: with the error function. `'tanh'`: 0.5 x (1 + tanh(√(2/π) (x + 0.044715 x³))). Default `'none'`. */
  approximate?: 'none' | 'tanh';
  /** May be x itself. */
  out?: TensorLike;
}

const OPTIONS: ReadonlySet<string> = new Set(['approximate', 'out', 'backend', 'threads', 'signal']);

const op: Op = { name: 'gelu', reference: geluReference };

function prepare(x: TensorLike, options: GeluOptions | undefined) {
  checkOptions(options, OPTIONS, 'gelu');
  const input = asTensor(x, 'x', FLOAT_TYPES, undefined, 'device');
  const form = optionChoice(options?.approximate, ['none', 'tanh'], 'none', 'approximate');
  const place = placeOf('gelu', options, { x: input, out: givenTensor(options?.out) });
  const out = elementwiseOutput(options?.out, input.type, input.dims, [input], [], 'out', place);
  const args = [input.data, DTYPE_CODE[input.type], input.size, form === 'tanh', out.data];
  return { args, out };
}

/**
 * Gaussian error linear unit (Hendrycks and Gimpel 2016): x times the standard normal distribution function. After a
 * product it costs nothing as `linear(…, { activation: 'gelu' | 'gelu-tanh' })`.
 *
 * @param x any dims, float32, bfloat16 or float16
 * @returns the type and dims of x, on the device when x is
 * @throws HeddleError `ERR_ARGUMENT`, `ERR_SHAPE`, `ERR_DTYPE`, `ERR_OPTION`, `ERR_BACKEND`, `ERR_ABORTED`
 */
export async function gelu(
  x: TensorLike,
  options?: GeluOptions & AsyncOpOptions,
): Promise<Tensor<FloatType>> {
  const { args, out } = prepare(x, options);
  await call(op, args, options);
  return out;
}

/** {@link gelu} on the calling thread (and helpers, when `threads` > 1). */
export function geluSync(x: TensorLike, options?: GeluOptions & OpOptions): Tensor<FloatType> {
  const { args, out } = prepare(x, options);
  callSync(op, args, options);
  return out;
}
