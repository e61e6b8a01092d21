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
import { gatherRowsReference } from '../reference/nn/gatherRows.ts';
import { allocate, asTensor, makeTensor, product, type Tensor, type TensorLike } from '../tensor.ts';

export interface GatherRowsOptions {
  /** Row of the places whose index is -1: `[width]` of the type of x. Default: zeros. */
  fill?: TensorLike;
  /** `[indices, width]` of the type of x. */
  out?: TensorLike;
}

const OPTIONS: ReadonlySet<string> = new Set(['fill', 'out', 'backend', 'threads', 'signal']);

const op: Op = {
  name: 'gatherRows',
  reference: gatherRowsReference,
  invalid: (index, args) =>
    new HeddleError('ERR_VALUE', `index[${index}] is ${args[4][index]}: expected -1 to ${args[2] - 1}`),
};

/** @internal Checks everything but the indices; `dims` are the result's, all but the last multiply to its rows. */
export function prepareGather(
  x: Tensor<FloatType>,
  index: Int32Array,
  dims: readonly number[],
  options: GatherRowsOptions | undefined,
): { op: Op; args: unknown[]; out: Tensor<FloatType> } {
  const width = dims[dims.length - 1];
  let fill: Tensor<FloatType> | null = null;
  if (options?.fill !== undefined) {
    fill = asTensor(options.fill, 'fill', [x.type]);
    if (fill.dims.length !== 1 || fill.dims[0] !== width) {
      throw new HeddleError('ERR_SHAPE', `fill: expected [${width}], got [${fill.dims.join(', ')}]`);
    }
  }
  let out: Tensor<FloatType>;
  if (options?.out === undefined) {
    out = makeTensor(x.type, allocate(x.type, index.length * width), dims);
  } else {
    out = asTensor(options.out, 'out', [x.type]);
    const indices = makeTensor('int32', index, [index.length]);
    checkOut(out, dims, [x, fill, indices], 'out');
  }
  const rows = product(x.dims.slice(0, -1)); // also where the width is 0
  const args = [x.data, DTYPE_CODE[x.type], rows, width, index, index.length, fill?.data ?? null, out.data];
  return { op, args, out };
}

function prepare(x: TensorLike, index: Int32Array, options: GatherRowsOptions | undefined) {
  checkOptions(options, OPTIONS, 'gatherRows');
  const rows = asTensor(x, 'x', FLOAT_TYPES, 2);
  if (!(index instanceof Int32Array)) throw new HeddleError('ERR_ARGUMENT', 'index: expected an Int32Array');
  return prepareGather(rows, index, [index.length, rows.dims[1]], options);
}

/**
 * Rows by index: row r of the result is `x[index[r]]`, or `fill` where the index is -1. Copied bit by bit.
 *
 * @param x `[rows, width]` float32, bfloat16 or float16
 * @param index -1 to rows - 1
 * @returns `[indices, width]` of the type of x
 * @throws HeddleError `ERR_ARGUMENT`, `ERR_SHAPE`, `ERR_DTYPE`, `ERR_OPTION`, `ERR_VALUE`, `ERR_BACKEND`, `ERR_ABORTED`
 */
export async function gatherRows(
  x: TensorLike,
  index: Int32Array,
  options?: GatherRowsOptions & AsyncOpOptions,
): Promise<Tensor<FloatType>> {
  const p = prepare(x, index, options);
  await call(p.op, p.args, options);
  return p.out;
}

/** {@link gatherRows} on the calling thread (and helpers, when `threads` > 1). */
export function gatherRowsSync(
  x: TensorLike,
  index: Int32Array,
  options?: GatherRowsOptions & OpOptions,
): Tensor<FloatType> {
  const p = prepare(x, index, options);
  callSync(p.op, p.args, options);
  return p.out;
}
