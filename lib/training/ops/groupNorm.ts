import type { Steps } from '../../checkpoint/steps.ts';
import type { Op } from '../../op.ts';
import { groupNormBackwardReference, groupNormReference } from '../../reference/training/groupNorm.ts';
import type { Tensor } from '../../tensor.ts';
import { perform, type RunOptions, zeros } from './perform.ts';

/** How x is cut: `[samples, channels, spatial]` in groups of channels (native/training/group_norm.h). */
export interface GroupNormShape {
  samples: number;
  channels: number;
  spatial: number;
  groups: number;
  epsilon: number;
}

/** What the forward gives. */
export interface Normalized {
  output: Tensor<'float32'>;
  /** x̂, before the weight: what per-sample clipping reads. */
  normalized: Tensor<'float32'>;
  /** 1/√(variance + ε) of each sample and group. */
  rstd: Float32Array;
}

const forward: Op = { name: 'groupNorm', reference: groupNormReference };
const backward: Op = { name: 'groupNormBackward', reference: groupNormBackwardReference };

const numbers = (s: GroupNormShape) => [s.samples, s.channels, s.spatial, s.groups, s.epsilon];

/** Group normalisation. */
export function* groupNorm(
  x: Tensor<'float32'>,
  weight: Tensor<'float32'>,
  bias: Tensor<'float32'> | null,
  shape: GroupNormShape,
  options?: RunOptions,
): Steps<Normalized> {
  const result = {
    output: zeros(x.dims),
    normalized: zeros(x.dims),
    rstd: new Float32Array(shape.samples * shape.groups),
  };
  const { output, normalized, rstd } = result;
  const args = [x.data, weight.data, bias?.data ?? null, output.data, normalized.data, rstd];
  return yield* perform(forward, [...numbers(shape), ...args], result, options);
}

/** Gradient of {@link groupNorm} by its input. */
export function* groupNormBackward(
  gradOutput: Tensor<'float32'>,
  weight: Tensor<'float32'>,
  kept: Pick<Normalized, 'normalized' | 'rstd'>,
  shape: GroupNormShape,
  options?: RunOptions,
): Steps<Tensor<'float32'>> {
  const out = zeros(gradOutput.dims);
  const args = [gradOutput.data, weight.data, null, out.data, kept.normalized.data, kept.rstd];
  return yield* perform(backward, [...numbers(shape), ...args], out, options);
}
