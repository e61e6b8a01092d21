import type { Steps } from '../../checkpoint/steps.ts';
import type { Op } from '../../op.ts';
import { poolingBackwardReference, poolingReference } from '../../reference/training/pooling.ts';
import type { Tensor } from '../../tensor.ts';
import { perform, type RunOptions, zeros } from './perform.ts';

/** Two-dimensional pooling; lists are [height, width]. */
export interface PoolingShape {
  average: boolean;
  /** Samples times channels. */
  planes: number;
  size: readonly number[];
  outSize: readonly number[];
  kernel: readonly number[];
  stride: readonly number[];
  padding: readonly number[];
}

const forward: Op = { name: 'pooling', reference: poolingReference };
const backward: Op = { name: 'poolingBackward', reference: poolingBackwardReference };

const numbers = (s: PoolingShape) => [
  s.average,
  s.planes,
  Int32Array.of(...s.size, ...s.outSize, ...s.kernel, ...s.stride, ...s.padding),
];

/** Pools `[N, C, H, W]`; for max pooling also the place in its plane that each result came from. */
export function* pooling(
  x: Tensor<'float32'>,
  shape: PoolingShape,
  options?: RunOptions,
): Steps<{ output: Tensor<'float32'>; index: Int32Array | null }> {
  const output = zeros([...x.dims.slice(0, 2), ...shape.outSize]);
  const index = shape.average ? null : new Int32Array(output.size);
  return yield* perform(forward, [...numbers(shape), x.data, output.data, index], { output, index }, options);
}

/** Gradient of {@link pooling} by x. */
export function* poolingBackward(
  gradOutput: Tensor<'float32'>,
  index: Int32Array | null,
  shape: PoolingShape,
  options?: RunOptions,
): Steps<Tensor<'float32'>> {
  const out = zeros([...gradOutput.dims.slice(0, 2), ...shape.size]);
  return yield* perform(backward, [...numbers(shape), gradOutput.data, out.data, index], out, options);
}
