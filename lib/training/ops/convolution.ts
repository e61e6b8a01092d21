import type { Steps } from '../../checkpoint/steps.ts';
import type { Op } from '../../op.ts';
import { type ConvGeometry, geometryNumbers } from '../../privacy/convGeometry.ts';
import {
  convolutionInputGradientReference,
  convolutionReference,
} from '../../reference/training/convolution.ts';
import type { Tensor } from '../../tensor.ts';
import { perform, type RunOptions, zeros } from './perform.ts';

/** A convolution over one to three axes. */
export interface ConvolutionShape extends ConvGeometry {
  samples: number;
  inChannels: number;
  outChannels: number;
  groups: number;
}

const forward: Op = { name: 'convolution', reference: convolutionReference };
const backward: Op = { name: 'convolutionInputGradient', reference: convolutionInputGradientReference };

function numbers(s: ConvolutionShape): unknown[] {
  return [s.samples, s.inChannels, s.outChannels, s.groups, geometryNumbers(s)];
}

/** `[samples, C_out, …]` from x `[samples, C_in, …]` and weight `[C_out, C_in/groups, …kernel]`. */
export function* convolution(
  x: Tensor<'float32'>,
  weight: Tensor<'float32'>,
  bias: Tensor<'float32'> | null,
  shape: ConvolutionShape,
  options?: RunOptions,
): Steps<Tensor<'float32'>> {
  const out = zeros([shape.samples, shape.outChannels, ...shape.outSize]);
  const args = [...numbers(shape), weight.data, bias?.data ?? null, x.data, out.data];
  return yield* perform(forward, args, out, options);
}

/** Gradient of {@link convolution} by x. */
export function* convolutionInputGradient(
  gradOutput: Tensor<'float32'>,
  weight: Tensor<'float32'>,
  shape: ConvolutionShape,
  options?: RunOptions,
): Steps<Tensor<'float32'>> {
  const out = zeros([shape.samples, shape.inChannels, ...shape.size]);
  const args = [...numbers(shape), weight.data, null, gradOutput.data, out.data];
  return yield* perform(backward, args, out, options);
}
