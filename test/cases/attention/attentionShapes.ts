import type { FloatType } from '../../../lib/dtype.ts';

/** Sizes of one case; lengths may differ between queries and keys, dims between keys and values. */
export interface AttentionShape {
  name: string;
  batch?: number;
  queries: number;
  keys: number;
  heads: number;
  keyHeads?: number;
  dim: number;
  valueDim?: number;
  type?: FloatType;
  causal?: boolean;
  window?: [number, number];
  softcap?: number;
  scale?: number;
  emptyRows?: 'zero' | 'uniform';
  /** Dims that are broadcast, as a 4-letter pattern of batch, heads, queries: for example 'B1Q'. */
  bias?: string;
  biasType?: FloatType;
  mask?: string;
  blockMask?: { pattern: string; query: number; key: number };
  alibi?: boolean;
  sinks?: boolean;
  /** Packed lengths `[queries, keys]` of each sequence; replaces queries and keys. */
  segments?: [number, number][];
  blockIds?: boolean;
  /** Draw q, k, v from one buffer `[batch, sequence, 3, heads, dim]`, read through strides. */
  fused?: boolean;
  bench?: boolean;
}

/** 256 lengths from 1 to 512, evenly spread and shuffled by a generator of period 256. */
const PACKED: [number, number][] = Array.from({ length: 256 }, (_, i) => {
  const n = 1 + 2 * ((i * 77 + 31) % 256);
  return [n, n];
});

export const attentionShapes: AttentionShape[] = [
  { name: 'plain', batch: 2, queries: 37, keys: 53, heads: 3, dim: 64 },
  { name: 'one query', queries: 1, keys: 700, heads: 4, keyHeads: 2, dim: 64 },
  { name: 'one key', queries: 5, keys: 1, heads: 2, dim: 32 },
  { name: 'no keys', queries: 3, keys: 0, heads: 2, dim: 32, emptyRows: 'uniform' },
  { name: 'no queries', queries: 0, keys: 9, heads: 2, dim: 32 },
  { name: 'no batch', batch: 0, queries: 3, keys: 9, heads: 2, dim: 32 },
  // flash-attention tests/test_flash_attn.py: head dims, and hopper/test_flash_attn.py: lengths
  { name: 'FA (1, 1)', queries: 1, keys: 1, heads: 2, dim: 64, causal: true },
  { name: 'FA (239, 1)', queries: 239, keys: 1, heads: 2, dim: 32, causal: true },
  { name: 'FA (1, 239)', queries: 1, keys: 239, heads: 6, keyHeads: 2, dim: 40, causal: true },
  { name: 'FA (113, 203) d59', queries: 113, keys: 203, heads: 2, dim: 59, causal: true },
  { name: 'FA (108, 256) d111', queries: 108, keys: 256, heads: 1, dim: 111, window: [30, 20] },
  { name: 'FA (799, 3)', queries: 799, keys: 3, heads: 1, dim: 96, causal: true },
  { name: 'FA (1023, 1024)', queries: 1023, keys: 1024, heads: 1, dim: 32, causal: true },
  { name: 'FA d192', queries: 33, keys: 65, heads: 2, keyHeads: 1, dim: 192, valueDim: 128 },
  { name: 'FA d256 softcap 50', queries: 19, keys: 300, heads: 1, dim: 256, softcap: 50, causal: true },
  { name: 'd512', queries: 9, keys: 270, heads: 1, dim: 512, causal: true },
  { name: 'd1', queries: 20, keys: 45, heads: 2, dim: 1, valueDim: 1 },
  { name: 'd3 v17', queries: 20, keys: 45, heads: 2, dim: 3, valueDim: 17 },
  { name: 'd17 v3', queries: 20, keys: 45, heads: 2, dim: 17, valueDim: 3, causal: true },
  // FlashInfer tests/attention: logits cap, sliding window
  { name: 'FI cap 1', queries: 27, keys: 97, heads: 4, keyHeads: 2, dim: 64, softcap: 1 },
  { name: 'FI cap 30', queries: 81, keys: 81, heads: 2, dim: 128, softcap: 30, causal: true },
  { name: 'FI window 43', queries: 37, keys: 177, heads: 2, dim: 64, window: [43, 0] },
  { name: 'FI window 533', queries: 61, keys: 754, heads: 1, dim: 64, window: [533, 0] },
  { name: 'window right', queries: 70, keys: 90, heads: 1, dim: 16, window: [-1, 7] },
  { name: 'window left', queries: 70, keys: 90, heads: 1, dim: 16, window: [7, -1] },
  { name: 'window off the end', queries: 200, keys: 40, heads: 1, dim: 16, window: [5, 5] },
  { name: 'causal, more queries than keys', queries: 90, keys: 50, heads: 2, dim: 24, causal: true },
  {
    name: 'causal, empty rows uniform',
    queries: 90,
    keys: 50,
    heads: 2,
    dim: 24,
    causal: true,
    emptyRows: 'uniform',
  },
  { name: 'scale 0.3', queries: 30, keys: 70, heads: 2, dim: 24, scale: 0.3 },
  { name: 'scale 0', queries: 30, keys: 70, heads: 2, dim: 24, scale: 0 },
  { name: 'scale -1', queries: 30, keys: 70, heads: 2, dim: 24, scale: -1 },
  { name: 'MQA', batch: 2, queries: 40, keys: 40, heads: 8, keyHeads: 1, dim: 32, causal: true },
  { name: 'GQA 5', queries: 23, keys: 600, heads: 10, keyHeads: 2, dim: 32, causal: true },
  { name: 'bias', batch: 2, queries: 21, keys: 83, heads: 2, dim: 32, bias: 'BHQ' },
  { name: 'bias of heads', batch: 2, queries: 21, keys: 83, heads: 2, dim: 32, bias: '1HQ', causal: true },
  { name: 'bias of keys', batch: 2, queries: 21, keys: 83, heads: 2, dim: 32, bias: '111' },
  { name: 'bias bf16', queries: 21, keys: 83, heads: 2, dim: 32, bias: 'BHQ', biasType: 'bfloat16' },
  { name: 'ALiBi', queries: 61, keys: 83, heads: 4, dim: 32, alibi: true, causal: true },
  { name: 'ALiBi both sides', queries: 61, keys: 83, heads: 4, dim: 32, alibi: true },
  { name: 'sinks', queries: 61, keys: 583, heads: 4, keyHeads: 2, dim: 64, sinks: true, causal: true },
  { name: 'sinks, empty rows', queries: 61, keys: 20, heads: 2, dim: 64, sinks: true, causal: true },
  { name: 'mask', batch: 2, queries: 41, keys: 133, heads: 2, dim: 32, mask: 'BHQ' },
  { name: 'mask of keys', batch: 2, queries: 41, keys: 133, heads: 2, dim: 32, mask: 'B11', causal: true },
  {
    name: 'everything',
    queries: 41,
    keys: 133,
    heads: 4,
    keyHeads: 2,
    dim: 32,
    mask: '11Q',
    bias: '1HQ',
    alibi: true,
    sinks: true,
    softcap: 3,
    window: [60, 20],
    emptyRows: 'uniform',
  },
  {
    name: 'block mask 32 x 64',
    queries: 150,
    keys: 700,
    heads: 2,
    dim: 32,
    blockMask: { pattern: '1HQ', query: 32, key: 64 },
  },
  {
    name: 'block mask 7 x 5',
    queries: 50,
    keys: 123,
    heads: 2,
    keyHeads: 1,
    dim: 32,
    blockMask: { pattern: '11Q', query: 7, key: 5 },
    causal: true,
  },
  {
    name: 'packed',
    segments: [
      [5, 5],
      [0, 7],
      [33, 33],
      [1, 1],
      [4, 0],
      [40, 90],
      [17, 9],
      [0, 0],
    ],
    queries: 0,
    keys: 0,
    heads: 4,
    keyHeads: 2,
    dim: 32,
    causal: true,
  },
  {
    name: 'packed, everything',
    segments: [
      [20, 35],
      [3, 50],
      [61, 61],
    ],
    queries: 0,
    keys: 0,
    heads: 2,
    dim: 32,
    mask: '1HQ',
    bias: '11Q',
    alibi: true,
    window: [20, 10],
    blockMask: { pattern: '111', query: 16, key: 16 },
    blockIds: true,
  },
  { name: 'Gemma 3 images', queries: 90, keys: 90, heads: 2, dim: 32, causal: true, blockIds: true },
  {
    name: 'Gemma 3 sliding',
    batch: 2,
    queries: 90,
    keys: 690,
    heads: 2,
    dim: 32,
    causal: true,
    window: [10, 0],
    blockIds: true,
  },
  { name: 'fused qkv', batch: 2, queries: 45, keys: 45, heads: 3, dim: 40, causal: true, fused: true },
  { name: 'fused qkv, bf16', queries: 45, keys: 45, heads: 3, dim: 41, fused: true, type: 'bfloat16' },
  { name: 'bf16', batch: 2, queries: 37, keys: 653, heads: 4, keyHeads: 2, dim: 64, type: 'bfloat16' },
  { name: 'bf16 causal d59', queries: 77, keys: 103, heads: 2, dim: 59, type: 'bfloat16', causal: true },
  {
    name: 'bf16 mask, softcap, sinks',
    queries: 40,
    keys: 103,
    heads: 2,
    dim: 64,
    type: 'bfloat16',
    mask: '11Q',
    softcap: 20,
    sinks: true,
  },
  { name: 'fp16', queries: 37, keys: 653, heads: 4, keyHeads: 2, dim: 64, type: 'float16', causal: true },
  { name: 'fp16 d5', queries: 20, keys: 33, heads: 1, dim: 5, type: 'float16', window: [3, 3] },
  { name: 'joint', queries: 1024, keys: 1024, heads: 12, dim: 64, bench: true },
  { name: 'joint', queries: 4096, keys: 4096, heads: 12, dim: 64, bench: true },
  { name: 'joint causal', queries: 4096, keys: 4096, heads: 12, dim: 64, causal: true, bench: true },
  { name: 'joint', queries: 4096, keys: 4096, heads: 12, dim: 64, type: 'bfloat16', bench: true },
  { name: 'spatial', batch: 64, queries: 196, keys: 196, heads: 12, dim: 64, bench: true },
  { name: 'spatial', batch: 64, queries: 196, keys: 196, heads: 12, dim: 64, type: 'bfloat16', bench: true },
  { name: 'temporal', batch: 196, queries: 64, keys: 64, heads: 12, dim: 64, bench: true },
  { name: 'temporal', batch: 196, queries: 64, keys: 64, heads: 12, dim: 64, type: 'bfloat16', bench: true },
  { name: 'temporal', batch: 392, queries: 32, keys: 32, heads: 12, dim: 64, bench: true },
  { name: 'temporal', batch: 784, queries: 16, keys: 16, heads: 12, dim: 64, bench: true },
  { name: 'decoder', queries: 2048, keys: 2048, heads: 8, dim: 128, causal: true, bench: true },
  { name: 'decoder', queries: 2048, keys: 2048, heads: 8, dim: 128, bench: true },
  { name: 'GQA 8:1', queries: 2048, keys: 2048, heads: 16, keyHeads: 2, dim: 64, causal: true, bench: true },
  { name: 'GQA 1:1', queries: 2048, keys: 2048, heads: 16, dim: 64, causal: true, bench: true },
  {
    name: 'window 4096',
    queries: 32768,
    keys: 32768,
    heads: 8,
    keyHeads: 2,
    dim: 128,
    causal: true,
    window: [4095, 0],
    bench: true,
  },
  { name: 'packed 1..512', segments: PACKED, queries: 0, keys: 0, heads: 12, dim: 64, bench: true },
];
