export {
  type AttentionForwardOptions,
  type AttentionResult,
  attention,
  attentionSync,
} from './attention.ts';
export {
  type AttentionBackwardOptions,
  type AttentionGradients,
  attentionBackward,
  attentionBackwardSync,
} from './attentionBackward.ts';
export {
  type DecodeAttentionOptions,
  decodeAttention,
  decodeAttentionSync,
} from './decodeAttention.ts';
export {
  type FactorizedAttentionForwardOptions,
  type FactorizedAttentionResult,
  factorizedAttention,
  factorizedAttentionSync,
} from './factorizedAttention.ts';
export {
  type FactorizedAttentionBackwardOptions,
  type FactorizedAttentionGradients,
  factorizedAttentionBackward,
  factorizedAttentionBackwardSync,
} from './factorizedAttentionBackward.ts';
export type {
  AttentionAxis,
  ClassToken,
  FactorizedAttentionOptions,
  VideoStrides,
} from './factorizedOptions.ts';
export { type InflateWeightsOptions, inflateWeights } from './inflateWeights.ts';
export {
  type InterpolatePositionsOptions,
  type InterpolationMode,
  interpolatePositions,
} from './interpolatePositions.ts';
export type { KeptTokens } from './keptTokens.ts';
export type { BlockType, FileTensor, KeyValueBlock, KeyValueFile, KeyValueSource } from './keyValueSource.ts';
export { KVCache, type KVCacheOptions, type KVCacheType } from './kvCache.ts';
export { type MaskTokensOptions, maskTokens, type TokenMask, tokensFromMask } from './maskTokens.ts';
export {
  type AttentionOptions,
  type HeadVector,
  type IdArray,
  MAX_HEAD_DIM,
  type Strides,
} from './options.ts';
export {
  type PatchEmbedOptions,
  type PatchWeights,
  patchEmbed,
  patchEmbedSync,
} from './patchEmbed.ts';
export { type PatchGridOptions, patchGrid, type Size3 } from './patchGrid.ts';
export {
  type AttentionPooling,
  type ClassPooling,
  type MeanPooling,
  type PoolTokensOptions,
  poolTokens,
  poolTokensSync,
} from './poolTokens.ts';
export {
  type RotaryEmbeddingOptions,
  rotaryEmbedding,
  rotaryEmbeddingSync,
} from './rotaryEmbedding.ts';
export type { RotaryScaling } from './rotaryFrequencies.ts';
export {
  type StreamAttentionOptions,
  type StreamAttentionResult,
  streamAttention,
} from './streamAttention.ts';
export {
  type GatherTokensOptions,
  gatherTokens,
  gatherTokensSync,
  type ScatterTokensOptions,
  scatterTokens,
  scatterTokensSync,
} from './tokens.ts';

export * from './video/index.ts';
