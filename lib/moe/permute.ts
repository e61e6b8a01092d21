import { allocateAt, placeOf, readElement } from '../device.ts';
import { DTYPE_CODE, type FloatType } from '../dtype.ts';
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
import { permuteReference } from '../reference/moe/permute.ts';
import { asTensor, makeTensor, type Tensor, type TensorLike } from '../tensor.ts';
import { checkPlan, type DispatchPlan } from './planDispatch.ts';

export interface PermuteOptions {
  /** `[routes, width]` of the type of `x`. */
  out?: TensorLike;
}

/** The types of rows that are moved and combined. */
export const ROW_TYPES: readonly FloatType[] = ['float32', 'bfloat16', 'float16'];
const OPTIONS: ReadonlySet<string> = new Set(['out', 'backend', 'threads', 'signal']);

const op: Op = {
  name: 'permute',
  reference: permuteReference,
  invalid: (index, args) => {
    const [, , tokens, , k, order] = args;
    return new HeddleError(
      'ERR_VALUE',
      `plan.order[${index}] is ${readElement(order, index)}: expected 0 to ${tokens * k - 1}`,
    );
  },
};

function prepare(x: TensorLike, plan: DispatchPlan, options: PermuteOptions | undefined) {
  checkOptions(options, OPTIONS, 'permute');
  const rows = asTensor(x, 'x', ROW_TYPES, 2, 'device');
  const { numTokens, k, order } = checkPlan(plan);
  const width = rows.dims[1];
  if (rows.dims[0] !== numTokens) {
    throw new HeddleError('ERR_SHAPE', `x: expected ${numTokens} tokens as in the plan, got ${rows.dims[0]}`);
  }
  const routes = order.dims[0];
  const out =
    options?.out === undefined ? null : asTensor(options.out, 'out', [rows.type], undefined, 'device');
  const place = placeOf('permute', options, { x: rows, 'plan.order': order, out });
  let result: Tensor<FloatType>;
  if (out === null) {
    result = makeTensor(rows.type, allocateAt(place, rows.type, routes * width), [routes, width]);
  } else {
    result = out;
    checkOut(result, [routes, width], [rows, order], 'out');
  }
  const args = [rows.data, DTYPE_CODE[rows.type], numTokens, width, k, order.data, routes, result.data];
  return { args, result };
}

/**
 * Brings tokens into expert order: row r of the result is the token of route `plan.order[r]`. A token chosen by
 * several experts appears once for each; one whose routes are all masked or dropped does not appear.
 *
 * @param x `[tokens, width]` float32, bfloat16 or float16; copied bit by bit
 * @param plan from {@link planDispatch}
 * @returns `[routes, width]` of the type of `x`; expert e's rows are `plan.offsets[e]` to `plan.offsets[e + 1]`
 * @throws HeddleError `ERR_ARGUMENT`, `ERR_SHAPE`, `ERR_DTYPE`, `ERR_OPTION`, `ERR_VALUE`, `ERR_BACKEND`, `ERR_ABORTED`
 */
export async function permute(
  x: TensorLike,
  plan: DispatchPlan,
  options?: PermuteOptions & AsyncOpOptions,
): Promise<Tensor<FloatType>> {
  const { args, result } = prepare(x, plan, options);
  await call(op, args, options);
  return result;
}

/** {@link permute} on the calling thread (and helpers, when `threads` > 1). */
export function permuteSync(
  x: TensorLike,
  plan: DispatchPlan,
  options?: PermuteOptions & OpOptions,
): Tensor<FloatType> {
  const { args, result } = prepare(x, plan, options);
  callSync(op, args, options);
  return result;
}
