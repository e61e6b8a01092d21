import type { AttentionResult } from '../../../lib/attention/attention.ts';
import {
  type DecodeAttentionOptions,
  decodeAttention,
  decodeAttentionSync,
} from '../../../lib/attention/decodeAttention.ts';
import { KVCache, type KVCacheType } from '../../../lib/attention/kvCache.ts';
import { encodeFloats, type FloatType } from '../../../lib/dtype.ts';
import { type DTypeArrays, Tensor } from '../../../lib/tensor.ts';
import type { OpCase } from '../case.ts';
import type { Random } from '../random.ts';
import { decoded } from './attention.ts';

interface DecodeShape {
  name: string;
  /** Tokens of each sequence. */
  lengths: number[];
  queries?: number;
  heads: number;
  keyHeads: number;
  dim: number;
  valueDim?: number;
  pageSize?: number;
  cache?: KVCacheType;
  type?: FloatType;
  options?: Omit<DecodeAttentionOptions, 'sequences' | 'out'>;
  sinks?: boolean;
  alibi?: boolean;
  bench?: boolean;
}

const shapes: DecodeShape[] = [
  { name: 'one token', lengths: [1], heads: 2, keyHeads: 2, dim: 16 },
  { name: 'GQA, three parts', lengths: [2500, 3, 1024, 1025], heads: 8, keyHeads: 2, dim: 64, pageSize: 16 },
  { name: 'MQA', lengths: [77, 400], heads: 16, keyHeads: 1, dim: 128, valueDim: 96, pageSize: 32 },
  { name: 'odd pages and dims', lengths: [77, 5], heads: 3, keyHeads: 3, dim: 37, valueDim: 11, pageSize: 7 },
  { name: 'five queries', lengths: [600, 5], queries: 5, heads: 4, keyHeads: 2, dim: 32 },
  {
    name: 'window',
    lengths: [3000, 40],
    queries: 2,
    heads: 4,
    keyHeads: 2,
    dim: 32,
    options: { windowLeft: 1500 },
  },
  { name: 'softcap', lengths: [300], heads: 4, keyHeads: 2, dim: 32, options: { softcap: 5, scale: 0.5 } },
  { name: 'sinks, ALiBi', lengths: [1300, 9], heads: 4, keyHeads: 2, dim: 32, sinks: true, alibi: true },
  { name: 'no batch', lengths: [], heads: 4, keyHeads: 2, dim: 32 },
  { name: 'bf16', lengths: [1100, 64], heads: 8, keyHeads: 2, dim: 64, cache: 'bfloat16', type: 'bfloat16' },
  { name: 'bf16 cache', lengths: [1100, 64], heads: 8, keyHeads: 2, dim: 64, cache: 'bfloat16' },
  { name: 'fp16 cache', lengths: [100], heads: 8, keyHeads: 2, dim: 59, cache: 'float16', type: 'float16' },
  { name: 'int8 cache', lengths: [1100, 64], heads: 8, keyHeads: 2, dim: 64, cache: 'int8' },
  { name: 'int8 cache d59', lengths: [90], heads: 2, keyHeads: 2, dim: 59, valueDim: 17, cache: 'int8' },
  { name: 'decode', lengths: [16384], heads: 32, keyHeads: 8, dim: 128, bench: true },
  { name: 'decode', lengths: [16384], heads: 32, keyHeads: 8, dim: 128, cache: 'bfloat16', bench: true },
  { name: 'decode', lengths: [16384], heads: 32, keyHeads: 8, dim: 128, cache: 'int8', bench: true },
];

const TOLERANCE: Readonly<Record<FloatType, number>> = { float32: 5e-6, float16: 1e-3, bfloat16: 5e-3 };

function floats(random: Random, type: FloatType, dims: number[]): Tensor<FloatType> {
  const values = random.normals(dims.reduce((a, b) => a * b, 1));
  return new Tensor(type, encodeFloats(values, type) as DTypeArrays[FloatType], dims);
}

function outputs(r: AttentionResult): Tensor[] {
  return [decoded(r.output), r.logSumExp as Tensor];
}

/** Decode cases: groups, page sizes, part borders, every cache type. */
export const decodeAttentionCases: OpCase[] = shapes.map((shape) => {
  const { lengths, queries = 1, heads, keyHeads, dim, valueDim = dim, cache: stored = 'float32' } = shape;
  const { pageSize = 64, type = 'float32' } = shape;
  const tokens = lengths.reduce((a, b) => a + b, 0);
  const size = { float32: 4, bfloat16: 2, float16: 2, int8: 1 }[stored];
  return {
    family: 'attention',
    op: 'decodeAttention',
    name: `${shape.name} keys=${lengths.join()} H=${heads}/${keyHeads} D=${dim} ${stored}`,
    tolerance: TOLERANCE[type],
    flops: 2 * queries * tokens * heads * (dim + valueDim),
    bytes: tokens * keyHeads * ((dim + valueDim) * size + (stored === 'int8' ? 8 : 0)),
    bench: shape.bench,
    prepare(random) {
      const pages = lengths.reduce((sum, n) => sum + Math.ceil(n / pageSize), 1);
      const cache = new KVCache({ keyHeads, headDim: dim, valueDim, type: stored, pageSize, pages });
      const from = stored === 'int8' ? 'float32' : stored;
      const sequences = lengths.map(() => cache.create());
      // In turns, so that the pages of the sequences are mixed.
      for (let at = 0; at < Math.max(0, ...lengths); at += 50) {
        for (const [i, id] of sequences.entries()) {
          const count = Math.min(50, lengths[i] - at);
          if (count <= 0) continue;
          const k = floats(random, from, [count, keyHeads, dim]);
          cache.append(id, k, floats(random, from, [count, keyHeads, valueDim]));
        }
      }
      const q = floats(random, type, [lengths.length, queries, heads, dim]);
      const options: DecodeAttentionOptions = { ...shape.options, sequences, returnLogSumExp: true };
      if (shape.sinks) options.sinks = random.normals(heads);
      if (shape.alibi) options.alibiSlopes = Float32Array.from({ length: heads }, (_, h) => 2 ** (-h - 1));
      return {
        run: (o) => outputs(decodeAttentionSync(q, cache, { ...options, ...o })),
        runAsync: async (o) => outputs(await decodeAttention(q, cache, { ...options, ...o })),
        timed: (o) => {
          const out = decodeAttentionSync(q, cache, { ...options, ...o });
          return () => decodeAttentionSync(q, cache, { ...options, ...o, out });
        },
      };
    },
  };
});
