/** Row-wise steps between products, on float32 buffers. */
import { addResidual } from '../../nn/addResidual.ts';
import { layerNorm } from '../../nn/norm.ts';
import type { AsyncOpOptions } from '../../op.ts';
import { makeTensor, type Tensor } from '../../tensor.ts';
import type { ResolvedConfig } from './config.ts';

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
export async function normRows(
  x: Float32Array,
  rows: number,
  norm: NormWeights,
  c: ResolvedConfig,
  out: Float32Array,
  options: AsyncOpOptions,
): Promise<void> {
  const dims = [rows, c.hiddenSize] as const;
  await layerNorm(view(x, ...dims), {
    ...options,
    weight: norm.weight,
    bias: norm.bias,
    epsilon: c.layerNormEpsilon,
    unitOffset: c.unitOffset,
    out: { output: view(out, ...dims) },
  });
}

/** x += tanh(gate) · y; without a gate x += y. */
export async function addRows(
  x: Float32Array,
  y: Float32Array,
  width: number,
  gate: number | undefined,
  options: AsyncOpOptions,
): Promise<void> {
  const rows = x.length / width;
  const stream = view(x, rows, width);
  await addResidual(stream, view(y, rows, width), { ...options, gate, out: stream });
}
