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
  optionChoice,
} from '../op.ts';
import { combineReference } from '../reference/moe/combine.ts';
import { asTensor, makeTensor, type Tensor, type TensorLike } from '../tensor.ts';
import { ROW_TYPES } from './permute.ts';
import { checkPlan, type DispatchPlan } from './planDispatch.ts';

export interface CombineOptions {
  /** Type of the result: that of `y` (default) or float32. */
  outType?: FloatType;
  /** `[tokens, width]`, of the type that `outType` says. */
  out?: TensorLike;
}

const OPTIONS: ReadonlySet<string> = new Set(['outType', 'out', 'backend', 'threads', 'signal']);

const op: Op = {
  name: 'combine',
  reference: combineReference,
  invalid: (index, args) => {
    const [, , routes, , , k, inverse] = args;
    const at = `[${Math.floor(index / k)}, ${index % k}]`;
    return new HeddleError(
      'ERR_VALUE',
      `plan.inverse${at} is ${readElement(inverse, index)}: expected -1 to ${routes - 1}`,
    );
  },
};

function prepare(
  y: TensorLike,
  plan: DispatchPlan,
  weights: TensorLike | undefined,
  options: CombineOptions | undefined,
) {
  checkOptions(options, OPTIONS, 'combine');
  const rows = asTensor(y, 'y', ROW_TYPES, 2, 'device');
  const { numTokens, k, order, inverse } = checkPlan(plan);
  const [routes, width] = rows.dims;
  if (routes !== order.dims[0]) {
    throw new HeddleError(
      'ERR_SHAPE',
      `y: expected ${order.dims[0]} rows, one per kept route of the plan, got ${routes}`,
    );
  }
  const inputs: Tensor[] = [rows, inverse];
  let w: Tensor<'float32'> | null = null;
  if (weights !== undefined) {
    w = asTensor(weights, 'weights', ['float32'], 2, 'device');
    if (w.dims[0] !== numTokens || w.dims[1] !== k) {
      throw new HeddleError(
        'ERR_SHAPE',
        `weights: expected [${numTokens}, ${k}] as the plan, got [${w.dims.join(', ')}]`,
      );
    }
    inputs.push(w);
  }
  const type = optionChoice<FloatType>(options?.outType, [rows.type, 'float32'], rows.type, 'outType');
  const dims = [numTokens, width];
  const out = options?.out === undefined ? null : asTensor(options.out, 'out', [type], undefined, 'device');
  const place = placeOf('combine', options, { y: rows, 'plan.inverse': inverse, weights: w, out });
  let result: Tensor<FloatType>;
  if (out === null) {
    result = makeTensor(type, allocateAt(place, type, numTokens * width), dims);
  } else {
    result = out;
    checkOut(result, dims, inputs, 'out');
  }
  const args = [
    rows.data,
    DTYPE_CODE[rows.type],
    routes,
    numTokens,
    width,
    k,
    inverse.data,
    w === null ? null : w.data,
    result.data,
    DTYPE_CODE[type],
  ];
  return { args, result };
}

/**
 * Brings the experts' outputs back to their tokens: `out[t] = Σ_j weights[t, j] · y[plan.inverse[t, j]]`.
 *
 * The sum runs over the slots j in ascending order in float32, whatever the threads, and is rounded once to the
 * result's type. Masked and dropped routes contribute zero, so a token without any kept route is a row of zeros.
 *
 * @param y `[routes, width]` float32, bfloat16 or float16: one row per kept route, in the order of the plan
 * @param plan from {@link planDispatch}
 * @param weights float32 `[tokens, k]`; left out, every weight is 1
 * @returns `[tokens, width]` of the type of `y`, or float32 with `outType`
 * @throws HeddleError `ERR_ARGUMENT`, `ERR_SHAPE`, `ERR_DTYPE`, `ERR_OPTION`, `ERR_VALUE`, `ERR_BACKEND`, `ERR_ABORTED`
 */
export async function combine(
  y: TensorLike,
  plan: DispatchPlan,
  weights?: TensorLike,
  options?: CombineOptions & AsyncOpOptions,
): Promise<Tensor<FloatType>> {
  const { args, result } = prepare(y, plan, weights, options);
  await call(op, args, options);
  return result;
}

/** {@link combine} on the calling thread (and helpers, when `threads` > 1). */
export function combineSync(
  y: TensorLike,
  plan: DispatchPlan,
  weights?: TensorLike,
  options?: CombineOptions & OpOptions,
): Tensor<FloatType> {
  const { args, result } = prepare(y, plan, weights, options);
  callSync(op, args, options);
  return result;
}
