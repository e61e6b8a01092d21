import { type Steps, step } from '../../checkpoint/steps.ts';
import { addResidual, addResidualSync } from '../../nn/addResidual.ts';
import type { Op } from '../../op.ts';
import { ELEMENTWISE, type Elementwise, elementwiseReference } from '../../reference/training/activation.ts';
import type { Tensor } from '../../tensor.ts';
import { perform, type RunOptions, zeros } from './perform.ts';

const op: Op = { name: 'elementwise', reference: elementwiseReference };

/**
 * Elementwise ops of training (native/training/activation.h).
 * @param x forward: x; backward: dy
 * @param y backward: what the forward kept (relu, tanh: its result; gelu: its input), of the size of x
 */
export function* elementwise(
  kind: Elementwise,
  x: Tensor<'float32'>,
  y: Tensor<'float32'> | null,
  options?: RunOptions,
): Steps<Tensor<'float32'>> {
  const out = zeros(x.dims);
  return yield* perform(
    op,
    [ELEMENTWISE.indexOf(kind), x.size, x.data, y?.data ?? null, out.data],
    out,
    options,
  );
}

/** a + b. */
export function* add(
  a: Tensor<'float32'>,
  b: Tensor<'float32'>,
  options?: RunOptions,
): Steps<Tensor<'float32'>> {
  const sum = yield* step(
    () => addResidualSync(a, b, options),
    () => addResidual(a, b, options),
  );
  return sum as Tensor<'float32'>;
}
