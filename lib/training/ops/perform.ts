import { type Steps, step } from '../../checkpoint/steps.ts';
import { type AsyncOpOptions, call, callSync, type Op, type OpArguments, type OpOptions } from '../../op.ts';
import type { TensorLike } from '../../tensor.ts';
import { asTensor, Tensor } from '../../tensor.ts';

/** Options that a training op passes on. */
export type RunOptions = OpOptions & AsyncOpOptions;

/** One op as a step: on this thread or on heddle's own, as the runner says. */
export function* perform<T>(op: Op, args: OpArguments, result: T, options?: RunOptions): Steps<T> {
  yield* step(
    () => callSync(op, args, options),
    () => call(op, args, options),
  );
  return result;
}

/** A fresh float32 tensor. */
export const zeros = (dims: readonly number[]): Tensor<'float32'> => Tensor.zeros('float32', dims);

export const float32 = (value: TensorLike, name: string, rank?: number): Tensor<'float32'> =>
  asTensor(value, name, ['float32'], rank);
