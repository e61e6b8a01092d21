import { attentionCases } from './attention/attention.ts';
import { attentionBackwardCases } from './attention/attentionBackward.ts';
import { decodeAttentionCases } from './attention/decodeAttention.ts';
import { rotaryEmbeddingCases } from './attention/rotaryEmbedding.ts';
import type { OpCase } from './case.ts';
import { routeTopKCases } from './moe/routeTopK.ts';

/** Every op's table. */
export const allCases: OpCase[] = [
  ...routeTopKCases,
  ...attentionCases,
  ...attentionBackwardCases,
  ...decodeAttentionCases,
  ...rotaryEmbeddingCases,
];
