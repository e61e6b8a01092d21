/** Private training: an optimizer on per-sample clipping, and blocks to build networks of. */
export type { AdamOptions, AlgorithmOptions, SgdOptions } from './algorithm.ts';
export { SelfAttention } from './blocks/attention.ts';
export { Block, type ForwardOptions, type LayerParameters, Pass } from './blocks/block.ts';
export {
  AvgPool2d,
  Conv1d,
  Conv2d,
  Conv3d,
  type ConvOptions,
  MaxPool2d,
  type PoolOptions,
} from './blocks/convolution.ts';
export { Embedding, Linear, PositionEmbedding } from './blocks/linear.ts';
export { GroupNorm, LayerNorm, RmsNorm } from './blocks/normalization.ts';
export { Residual, Sequential } from './blocks/sequential.ts';
export { Flatten, Gelu, MeanTokens, Relu, Tanh } from './blocks/simple.ts';
export {
  type CrossEntropyOptions,
  type CrossEntropyResult,
  crossEntropy,
  crossEntropySync,
} from './crossEntropy.ts';
export type { DynamicLossScale } from './lossScale.ts';
export type {
  Accumulated,
  Layers,
  PrivateOptimizerOptions,
  SamplingParameters,
  StepReport,
} from './optimizerOptions.ts';
export type { OptimizerProgress, OptimizerState } from './optimizerState.ts';
export { PrivateOptimizer } from './privateOptimizer.ts';
