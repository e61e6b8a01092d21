import type { Steps } from '../../checkpoint/steps.ts';
import type { Op } from '../../op.ts';
import {
  convolutionInputGradientReference,
  convolutionReference,
} from '../../reference/training/convolution.ts';
import type { Tensor } from '../../tensor.ts';
import { perform, type RunOptions, zeros } from './perform.ts';

/** A convolution's geometry; every list has one entry per axis, one to three. */
export interface ConvolutionShape {
  samples: number;
  inChannels: number;
  outChannels: number;
  groups: number;
  size: readonly number[];
  outSize: readonly number[];
  kernel: readonly number[];
  stride: readonly number[];
  padding: readonly number[];
  dilation: readonly number[];
}

const forward: Op = { name: 'convolution', reference: convolutionReference };
const backward: Op = { name: 'convolutionInputGradient', reference: convolutionInputGradientReference };

/** Output places along one axis; below 1 where the kernel does not fit. */
export function outputSize(
  size: number,
  kernel: number,
  stride: number,
  padding: number,
  dilation = 1,
): number {
  return Math.floor((size + 2 * padding - dilation * (kernel - 1) - 1) / stride) + 1;
}

function numbers(s: ConvolutionShape): unknown[] {
  const three = (list: readonly number[], fill: number) => [
    ...new Array(3 - list.length).fill(fill),
    ...list,
  ];
  const geometry = Int32Array.of(
    ...three(s.size, 1),
    ...three(s.outSize, 1),
    ...three(s.kernel, 1),
    ...three(s.stride, 1),
    ...three(s.padding, 0),
    ...three(s.dilation, 1),
  );
  return [s.samples, s.inChannels, s.outChannels, s.groups, geometry];
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
