import { placeOf } from '../device.ts';
import { DTYPE_CODE, FLOAT_TYPES, type FloatType } from '../dtype.ts';
import { HeddleError } from '../errors.ts';
import { type AsyncOpOptions, call, callSync, checkOptions, type Op, type OpOptions } from '../op.ts';
import { addResidualReference } from '../reference/nn/elementwise.ts';
import { asTensor, type Tensor, type TensorLike } from '../tensor.ts';
import { elementwiseOutput, givenTensor, optionalLike } from './outputs.ts';

export interface AddResidualOptions {
  /**
   * α of a gate tanh(α) on y (LongViViT, Flamingo): a number, or float32 `[1]` or `[width]`. α = 0 closes it. Default: no
   * gate. On the CPU, wherever x is.
   */
  gate?: number | TensorLike;
  /** May be x or y itself. */
  out?: TensorLike;
}

const OPTIONS: ReadonlySet<string> = new Set(['gate', 'out', 'backend', 'threads', 'signal']);

const op: Op = { name: 'addResidual', reference: addResidualReference };

/** tanh(α), one value or one per column. */
function gateOf(gate: number | TensorLike | undefined, width: number): Float32Array | null {
  if (gate === undefined) return null;
  if (typeof gate === 'number') return Float32Array.of(Math.tanh(gate));
  const t = asTensor(gate, 'gate', ['float32']);
  if (t.dims.length > 1 || (t.size !== 1 && t.size !== width)) {
    throw new HeddleError(
      'ERR_SHAPE',
      `gate: expected a number, [1] or [${width}], got [${t.dims.join(', ')}]`,
    );
  }
  return t.data.map(Math.tanh);
}

function prepare(x: TensorLike, y: TensorLike, options: AddResidualOptions | undefined) {
  checkOptions(options, OPTIONS, 'addResidual');
  const stream = asTensor(x, 'x', FLOAT_TYPES, undefined, 'device');
  const added = optionalLike(y ?? null, stream, 'y', 'device') as Tensor<FloatType>;
  const width = stream.dims.length === 0 ? 1 : stream.dims[stream.dims.length - 1];
  const gate = gateOf(options?.gate, width);
  const place = placeOf('addResidual', options, { x: stream, y: added, out: givenTensor(options?.out) });
  const out = elementwiseOutput(options?.out, stream.type, stream.dims, [stream, added], [], 'out', place);
  const rows = width === 0 ? 0 : stream.size / width;
  const args = [
    stream.data,
    added.data,
    DTYPE_CODE[stream.type],
    rows,
    width,
    gate,
    gate === null ? 0 : gate.length,
    out.data,
  ];
  return { args, out };
}

/**
 * `x + y`, or `x + tanh(gate) * y`. Where a norm follows, `layerNorm(y, { residual: x, returnSum: true })` does both in
 * one pass.
 *
 * @param x `[..., width]` float32, bfloat16 or float16
 * @param y the type and dims of x
 * @returns the type and dims of x, rounded once, on the device when x is
 * @throws HeddleError `ERR_ARGUMENT`, `ERR_SHAPE`, `ERR_DTYPE`, `ERR_OPTION`, `ERR_BACKEND`, `ERR_ABORTED`
 */
export async function addResidual(
  x: TensorLike,
  y: TensorLike,
  options?: AddResidualOptions & AsyncOpOptions,
): Promise<Tensor<FloatType>> {
  const { args, out } = prepare(x, y, options);
  await call(op, args, options);
  return out;
}

/** {@link addResidual} on the calling thread (and helpers, when `threads` > 1). */
export function addResidualSync(
  x: TensorLike,
  y: TensorLike,
  options?: AddResidualOptions & OpOptions,
): Tensor<FloatType> {
  const { args, out } = prepare(x, y, options);
  callSync(op, args, options);
  return out;
}
