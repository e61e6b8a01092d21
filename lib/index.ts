export {
  type BackendInfo,
  type BackendName,
  type Defaults,
  type Info,
  type IsaName,
  info,
  setDefaults,
} from './backend.ts';
export {
  Checkpoint,
  type CheckpointOptions,
  openCheckpoint,
  openCheckpointSync,
  type ReadOptions,
  type TensorInfo,
} from './checkpoint.ts';
export {
  type CudaMemory,
  cudaMemory,
  DeviceData,
  type Location,
  releaseCudaCache,
  setCudaMemoryLimit,
} from './device.ts';
export { HeddleError, type HeddleErrorCode } from './errors.ts';
export {
  type LinearActivation,
  type LinearOptions,
  linear,
  linearSync,
  PackedMatrix,
  type PackMatrixOptions,
  packMatrix,
  packMatrixSync,
  type WeightType,
} from './gemm/linear.ts';
export {
  dequantize,
  type QuantizedTensor,
  type QuantizedType,
  type QuantizeOptions,
  quantize,
} from './gemm/quantize.ts';
export type { RoundingOptions } from './gemm/weights.ts';
export { type AddResidualOptions, addResidual, addResidualSync } from './nn/addResidual.ts';
export { type GatherRowsOptions, gatherRows, gatherRowsSync } from './nn/gatherRows.ts';
export { type GeluOptions, gelu, geluSync } from './nn/gelu.ts';
export { type MeanTokensOptions, meanTokens, meanTokensSync } from './nn/meanTokens.ts';
export {
  type LayerNormOptions,
  layerNorm,
  layerNormSync,
  type NormResult,
  type RmsNormOptions,
  rmsNorm,
  rmsNormSync,
} from './nn/norm.ts';
export {
  type LayerNormBackwardOptions,
  type LayerNormGradients,
  layerNormBackward,
  layerNormBackwardSync,
  type RmsNormBackwardOptions,
  type RmsNormGradients,
  rmsNormBackward,
  rmsNormBackwardSync,
} from './nn/normBackward.ts';
export type { AsyncOpOptions, OpOptions } from './op.ts';
export { type DType, type DTypeArrays, Tensor, type TensorLike } from './tensor.ts';
