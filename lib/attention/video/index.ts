import { resolveConfig, tensorShapes, type VideoEncoderConfig } from './config.ts';

export { VIDEO_MODEL_TYPES } from './architectures.ts';
export type { ResolvedConfig, VideoAttention, VideoEncoderConfig } from './config.ts';
export {
  VideoEncoder,
  type VideoEncoderOutput,
  type VideoForwardOptions,
} from './encoder.ts';
export type { LayerActivations } from './forward.ts';
export type { Normalization } from './pixels.ts';
export type { ForwardPlan } from './plan.ts';
export type { StepActivations } from './steps.ts';
export type { VideoEncoderOptions, VideoWeightType } from './weights.ts';

/**
 * Names and dims of the tensors that `VideoEncoder.create` needs for a config. Matrices are `[outputs, inputs]`; `qkv`
 * is query, key and value one after the other; the patch weight is a convolution's `[hidden, channels, time, height,
 * width]`.
 * @throws HeddleError `ERR_OPTION` naming the config's field
 */
export function videoEncoderTensors(config: VideoEncoderConfig): Map<string, readonly number[]> {
  return tensorShapes(resolveConfig(config));
}
