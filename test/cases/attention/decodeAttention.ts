import type { AttentionResult } from '../../../lib/attention/attention.ts';
import {
  type DecodeAttentionOptions,
  decodeAttention,
  decodeAttentionSync,
} from '../../../lib/attention/decodeAttention.ts';
import { KVCache, type KVCacheType } from '../../../lib/attention/kvCache.ts';
import { encodeFloats, type FloatType } from '../../../lib/dtype.ts';
import type { OpOptions } from '../../../lib/op.ts';
import { type DTypeArrays, Tensor } from '../../../lib/tensor.ts';
import type { CaseSlice, OpCase, PreparedCase } from '../case.ts';
import type { Random } from '../random.ts';
import { decoded } from './attention.ts';

export interface DecodeShape {
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
  /** Of the cache. */
  window?: number;
}

export const decodeShapes: DecodeShape[] = [
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
  { name: 'int4 cache', lengths: [1100, 64], heads: 8, keyHeads: 2, dim: 64, cache: 'int4' },
  { name: 'int4 cache d59', lengths: [90], heads: 2, keyHeads: 2, dim: 59, valueDim: 17, cache: 'int4' },
  ...(['int8', 'int4'] as const).map((cache) => ({
    name: 'odd pages, five queries',
    lengths: [1041, 7],
    queries: 5,
    heads: 6,
    keyHeads: 2,
    dim: 20,
    valueDim: 36,
    pageSize: 7,
    cache,
    options: { windowLeft: 900 },
  })),
  ...(['float32', 'bfloat16', 'float16', 'int8', 'int4'] as const).map((cache) => ({
    name: 'ring',
    lengths: [2600, 33],
    queries: 2,
    heads: 6,
    keyHeads: 2,
    dim: 32,
    pageSize: 16,
    window: 300,
    cache,
    options: { windowLeft: 300 },
  })),
  { name: 'many rows', lengths: [1500], queries: 9, heads: 8, keyHeads: 2, dim: 32, cache: 'bfloat16' },
];

/** The table of decode throughput: 8 key heads of 128, one and four query heads each. */
for (const cache of ['float32', 'bfloat16', 'int8', 'int4'] as const) {
  for (const keys of [4096, 131072]) {
    for (const batch of [1, 4]) {
      if (cache === 'float32' && keys * batch > 131072) continue; // 4 GiB
      for (const heads of [8, 32]) {
        const lengths = Array(batch).fill(keys);
        decodeShapes.push({ name: 'decode', lengths, heads, keyHeads: 8, dim: 128, cache, bench: true });
      }
    }
  }
}

const TOLERANCE: Readonly<Record<FloatType, number>> = { float32: 5e-6, float16: 1e-3, bfloat16: 5e-3 };

function floats(random: Random, type: FloatType, dims: number[]): Tensor<FloatType> {
  const values = random.normals(dims.reduce((a, b) => a * b, 1));
  return new Tensor(type, encodeFloats(values, type) as DTypeArrays[FloatType], dims);
}

function outputs(r: AttentionResult): Tensor[] {
  return [decoded(r.output), r.logSumExp as Tensor];
}

/** Tokens that differ; longer sequences of a benchmark repeat them. */
const DRAWN = 2048;
const VECTOR_BYTES: Readonly<Record<KVCacheType, number>> = {
  float32: 4,
  bfloat16: 2,
  float16: 2,
  int8: 1,
  int4: 0.5,
};

export function prepareShape(
  shape: DecodeShape,
  random: Random,
  device: 'cpu' | 'cuda' = 'cpu',
): PreparedCase {
  const { lengths, queries = 1, heads, keyHeads, dim, valueDim = dim, cache: stored = 'float32' } = shape;
  const { pageSize = 64, type = 'float32', window } = shape;
  const pages = lengths.reduce((sum, n) => sum + Math.ceil(n / pageSize), 1);
  const cache = new KVCache({
    keyHeads,
    headDim: dim,
    valueDim,
    type: stored,
    pageSize,
    pages,
    window,
    device,
  });
  const from = stored === 'int8' || stored === 'int4' ? 'float32' : stored;
  const sequences = lengths.map(() => cache.create());
  // In turns, so that the pages of the sequences are mixed.
  const step = shape.bench ? DRAWN : 50;
  const blocks = new Map<string, [Tensor<FloatType>, Tensor<FloatType>]>();
  for (let at = 0; at < Math.max(0, ...lengths); at += step) {
    for (const [i, id] of sequences.entries()) {
      const count = Math.min(step, lengths[i] - at);
      if (count <= 0) continue;
      const name = shape.bench ? `${i} ${count}` : `${i} ${at}`;
      let block = blocks.get(name);
      if (block === undefined) {
        const k = floats(random, from, [count, keyHeads, dim]);
        block = [k, floats(random, from, [count, keyHeads, valueDim])];
        if (shape.bench) blocks.set(name, block);
      }
      cache.append(id, ...block);
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
    slice: shape.bench ? firstHead(cache, sequences[0], q, shape) : undefined,
    dispose: () => cache.dispose(),
  };
}

/** The first sequence's first key head, in a cache of its own: its bits do not depend on the others. */
function firstHead(cache: KVCache, id: number, q: Tensor<FloatType>, shape: DecodeShape): CaseSlice {
  const { heads, keyHeads, dim, lengths } = shape;
  const group = heads / keyHeads;
  const exact = new KVCache({ keyHeads: 1, headDim: dim, pages: Math.ceil(lengths[0] / 64) });
  const own = exact.create();
  const column = (t: Tensor<'float32'>) => {
    const out = new Float32Array(t.dims[0] * dim);
    for (let i = 0; i < t.dims[0]; i++)
      out.set(t.data.subarray(i * keyHeads * dim, i * keyHeads * dim + dim), i * dim);
    return new Tensor('float32', out, [t.dims[0], 1, dim]);
  };
  const drawn = cache.read(id, 0, Math.min(DRAWN, lengths[0])); // the rest repeats them
  const [keys, values] = [column(drawn.keys), column(drawn.values)];
  for (let at = 0; at < lengths[0]; at += DRAWN) exact.append(own, keys, values);
  const first = new Tensor('float32', q.data.slice(0, group * dim) as Float32Array, [1, 1, group, dim]);
  const run = (o: OpOptions) =>
    outputs(decodeAttentionSync(first, exact, { ...o, sequences: [own], returnLogSumExp: true }));
  return {
    prepared: { run, runAsync: async (o) => run(o) },
    fraction: 1 / (keyHeads * lengths.length),
    of: ([output, lse]) => [
      new Tensor('float32', (output.data as Float32Array).slice(0, group * dim), [1, 1, group, dim]),
      new Tensor('float32', (lse.data as Float32Array).slice(0, group), [1, group, 1]),
    ],
  };
}

/** Decode cases: groups, page sizes, part borders, every cache type, sliding windows. */
export const decodeAttentionCases: OpCase[] = decodeShapes.map((shape) => {
  const { lengths, queries = 1, heads, keyHeads, dim, valueDim = dim, cache: stored = 'float32' } = shape;
  const tokens = lengths.reduce((a, b) => a + b, 0);
  const scales = stored === 'int8' || stored === 'int4' ? 8 : 0;
  const large = Math.max(0, ...lengths) > 20000;
  // PyTorch's fused kernel has no 8- or 4-bit caches.
  const peer = shape.bench && scales === 0;
  return {
    family: 'attention',
    op: 'decodeAttention',
    name: `${shape.name} keys=${lengths.length > 2 ? `${lengths.length}x${lengths[0]}` : lengths.join()} H=${heads}/${keyHeads} D=${dim} ${stored}`,
    tolerance: TOLERANCE[shape.type ?? 'float32'],
    flops: 2 * queries * tokens * heads * (dim + valueDim),
    bytes: tokens * keyHeads * ((dim + valueDim) * VECTOR_BYTES[stored] + scales),
    bench: shape.bench,
    verify: large ? false : undefined,
    peers: peer
      ? {
          pytorch: {
            op: 'decode_attention',
            batch: lengths.length,
            keys: lengths[0],
            heads,
            key_heads: keyHeads,
            dim,
            type: stored,
          },
        }
      : undefined,
    prepare: (random) => prepareShape(shape, random),
  };
});
