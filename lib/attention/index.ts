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
export { KVCache, type KVCacheOptions, type KVCacheType } from './kvCache.ts';
export {
  type AttentionOptions,
  type HeadVector,
  type IdArray,
  MAX_HEAD_DIM,
  type Strides,
} from './options.ts';
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
