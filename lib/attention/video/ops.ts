/** Row-wise steps between products, on float32 buffers. */
import { type Steps, step } from '../../checkpoint/steps.ts';
import { type LinearActivation, linear, linearSync, type PackedMatrix } from '../../gemm/linear.ts';
import { addResidual, addResidualSync } from '../../nn/addResidual.ts';
import { layerNorm, layerNormSync } from '../../nn/norm.ts';
import type { AsyncOpOptions } from '../../op.ts';
import { makeTensor, type Tensor } from '../../tensor.ts';
import type { ResolvedConfig } from './config.ts';

/** A product's weights. */
export interface Dense {
  weight: PackedMatrix;
  bias?: Tensor<'float32'>;
}

export interface NormWeights {
  weight: Tensor<'float32'>;
  bias: Tensor<'float32'>;
}

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

/** x += tanh(gate) · y; without a gate x += y. */
export function* addRows(
  x: Float32Array,
  y: Float32Array,
  width: number,
  gate: number | undefined,
  options: AsyncOpOptions,
): Steps<void> {
  const rows = x.length / width;
  const stream = view(x, rows, width);
  const update = view(y, rows, width);
  const o = { ...options, gate, out: stream };
  yield* step(
    () => addResidualSync(stream, update, o),
    () => addResidual(stream, update, o),
  );
}

/** out = activation(x Wᵀ + bias) of rows. */
export function* product(
  x: Float32Array,
  rows: number,
  w: Dense,
  out: Float32Array,
  options: AsyncOpOptions,
  activation?: LinearActivation,
): Steps<void> {
  const input = view(x, rows, w.weight.inputs);
  const o = { ...options, bias: w.bias, activation, out: view(out, rows, w.weight.outputs) };
  yield* step(
    () => linearSync(input, w.weight, o),
    () => linear(input, w.weight, o),
  );
}
