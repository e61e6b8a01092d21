/** Row-wise steps between products, on float32 buffers. */
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
): Promise<void> {
  const d = c.hiddenSize;
  const offset = c.unitOffset ? 1 : 0;
  for (let r = 0; r < rows; r++) {
    const at = r * d;
    let mean = 0;
    for (let j = 0; j < d; j++) mean += x[at + j];
    mean /= d;
    let variance = 0;
    for (let j = 0; j < d; j++) variance += (x[at + j] - mean) ** 2;
    const inverse = 1 / Math.sqrt(variance / d + c.layerNormEpsilon);
    for (let j = 0; j < d; j++) {
      out[at + j] = (x[at + j] - mean) * inverse * (norm.weight.data[j] + offset) + norm.bias.data[j];
    }
  }
}

/** x += tanh(gate) · y; without a gate x += y. */
export async function addRows(x: Float32Array, y: Float32Array, gate: number | undefined): Promise<void> {
  const scale = gate === undefined ? 1 : Math.tanh(gate);
  for (let i = 0; i < x.length; i++) x[i] += scale * y[i];
}
