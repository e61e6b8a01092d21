import type { Steps } from '../../checkpoint/steps.ts';
import type { Op } from '../../op.ts';
import { normalizeBackwardReference, normalizeReference } from '../../reference/training/normalize.ts';
import type { Tensor } from '../../tensor.ts';
import { perform, type RunOptions, zeros } from './perform.ts';

/** How x is cut: `[samples, channels, spatial]` in groups of channels (native/training/normalize.h). */
export interface NormalizeShape {
  samples: number;
  channels: number;
  spatial: number;
  groups: number;
  /** False: RMS normalisation. */
  centered: boolean;
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

const forward: Op = { name: 'normalize', reference: normalizeReference };
const backward: Op = { name: 'normalizeBackward', reference: normalizeBackwardReference };

const numbers = (s: NormalizeShape) => [s.samples, s.channels, s.spatial, s.groups, s.centered, s.epsilon];

/** Layer, RMS or group normalisation. */
export function* normalize(
  x: Tensor<'float32'>,
  weight: Tensor<'float32'>,
  bias: Tensor<'float32'> | null,
  shape: NormalizeShape,
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

/** Gradient of {@link normalize} by its input. */
export function* normalizeBackward(
  gradOutput: Tensor<'float32'>,
  weight: Tensor<'float32'>,
  kept: Pick<Normalized, 'normalized' | 'rstd'>,
  shape: NormalizeShape,
  options?: RunOptions,
): Steps<Tensor<'float32'>> {
  const out = zeros(gradOutput.dims);
  const args = [gradOutput.data, weight.data, null, out.data, kept.normalized.data, kept.rstd];
  return yield* perform(backward, [...numbers(shape), ...args], out, options);
}
