/** Row-wise steps that no product takes along, on float32 buffers. */
import { type Steps, step } from '../../checkpoint/steps.ts';
import { addResidual, addResidualSync } from '../../nn/addResidual.ts';
import type { NormWeights } from '../../nn/fusedLinear.ts';
import { layerNorm, layerNormSync } from '../../nn/norm.ts';
import type { AsyncOpOptions } from '../../op.ts';
import { makeTensor, type Tensor } from '../../tensor.ts';
import type { ResolvedConfig } from './config.ts';

/** A float32 tensor over the start of a buffer. */
export function view(data: Float32Array, ...dims: number[]): Tensor<'float32'> {
  const size = dims.reduce((a, b) => a * b, 1);
  return makeTensor('float32', data.length === size ? data : data.subarray(0, size), dims);
}

/** Layer norm of rows; `out` may be `x`. */
export function* normRows(
  x: Float32Array,
  rows: number,
  norm: NormWeights,
  c: ResolvedConfig,
  out: Float32Array,
  options: AsyncOpOptions,
): Steps<void> {
  const dims = [rows, c.hiddenSize] as const;
  const input = view(x, ...dims);
  const o = {
    ...options,
    weight: norm.weight,
    bias: norm.bias,
    epsilon: c.layerNormEpsilon,
    unitOffset: c.unitOffset,
    out: { output: view(out, ...dims) },
  };
  yield* step(
    () => layerNormSync(input, o),
    () => layerNorm(input, o),
  );
}

/** x += y. */
export function* addAll(x: Float32Array, y: Float32Array, options: AsyncOpOptions): Steps<void> {
  const [stream, update] = [view(x, x.length), view(y, x.length)];
  const o = { ...options, out: stream };
  yield* step(
    () => addResidualSync(stream, update, o),
    () => addResidual(stream, update, o),
  );
}
