import {
  type AttentionForwardOptions,
  type AttentionResult,
  attention,
  attentionSync,
} from '../../../lib/attention/attention.ts';
import { decodeFloats, encodeFloats, type FloatType } from '../../../lib/dtype.ts';
import { type DType, type DTypeArrays, Tensor } from '../../../lib/tensor.ts';
import type { CaseSlice, OpCase, PeerName, PeerSpec } from '../case.ts';
import type { Random } from '../random.ts';

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

/** Inputs and options of a shape, drawn. */
export interface AttentionData {
  q: Tensor<FloatType>;
  k: Tensor<FloatType>;
  v: Tensor<FloatType>;
  options: Omit<AttentionForwardOptions, 'out'>;
}

function tensorOf(type: FloatType, values: Float32Array, dims: number[]): Tensor<FloatType> {
  return new Tensor(type, encodeFloats(values, type) as DTypeArrays[FloatType], dims);
}

const product = (dims: readonly number[]) => dims.reduce((a, b) => a * b, 1);

export function totals(shape: AttentionShape): [number, number] {
  if (!shape.segments) return [shape.queries, shape.keys];
  return [0, 1].map((i) => shape.segments!.reduce((sum, s) => sum + s[i], 0)) as [number, number];
}

/** Draws q, k, v and every option that the shape names. */
export function drawAttention(shape: AttentionShape, random: Random): AttentionData {
  const { batch = 1, heads, keyHeads = heads, dim, valueDim = dim, type = 'float32' } = shape;
  const [queries, keys] = totals(shape);
  const options: AttentionData['options'] = { returnLogSumExp: true };
  for (const name of ['causal', 'window', 'softcap', 'scale', 'emptyRows'] as const) {
    if (shape[name] !== undefined) Object.assign(options, { [name]: shape[name] });
  }
  const draw = (dims: number[]) => tensorOf(type, random.normals(product(dims)), dims);
  let q: Tensor<FloatType>;
  let k: Tensor<FloatType>;
  let v: Tensor<FloatType>;
  if (shape.fused) {
    const all = draw([batch, queries, 3, heads, dim]).data;
    const strides = [queries * 3 * heads * dim, 3 * heads * dim, dim, 1] as const;
    const part = (i: number) =>
      ({ type, data: all.subarray(i * heads * dim), dims: [batch, queries, heads, dim] }) as never;
    [q, k, v] = [part(0), part(1), part(2)];
    options.strides = { query: strides, key: strides, value: strides };
  } else {
    q = draw([batch, queries, heads, dim]);
    k = draw([batch, keys, keyHeads, dim]);
    v = draw([batch, keys, keyHeads, valueDim]);
  }
  const pattern = (letters: string, full: number[]) => full.map((n, i) => (letters[i] === '1' ? 1 : n));
  const bits = (dims: number[], share: number) =>
    new Tensor(
      'uint8',
      Uint8Array.from({ length: product(dims) }, () => (random.uniform() < share ? 1 : 0)),
      dims,
    );
  if (shape.bias) {
    const dims = pattern(`${shape.bias}K`, [batch, heads, queries, keys]);
    options.bias = tensorOf(shape.biasType ?? 'float32', random.normals(product(dims)), dims);
  }
  if (shape.mask) options.mask = bits(pattern(`${shape.mask}K`, [batch, heads, queries, keys]), 0.6);
  if (shape.blockMask) {
    const { pattern: letters, query, key } = shape.blockMask;
    const dims = pattern(`${letters}K`, [batch, heads, Math.ceil(queries / query), Math.ceil(keys / key)]);
    options.blockMask = { mask: bits(dims, 0.4), query, key };
  }
  if (shape.alibi) options.alibiSlopes = Float32Array.from({ length: heads }, (_, h) => 2 ** (-h - 1));
  if (shape.sinks) options.sinks = random.normals(heads);
  if (shape.segments) {
    const offsets = (i: number) =>
      Int32Array.from([0, ...shape.segments!.map((_, s) => sumTo(shape.segments!, s, i))]);
    options.segments = { query: offsets(0), key: offsets(1) };
  }
  if (shape.blockIds) {
    // Text with two image blocks; keys end where queries end.
    const id = (j: number) => (j % 45 >= 10 && j % 45 < 30 ? Math.floor(j / 45) : -1);
    options.blockIds = {
      query: Int32Array.from({ length: queries }, (_, i) => id(i + Math.max(0, keys - queries))),
      key: Int32Array.from({ length: keys }, (_, j) => id(j)),
    };
  }
  return { q, k, v, options };
}

function sumTo(segments: [number, number][], last: number, i: number): number {
  return segments.slice(0, last + 1).reduce((sum, s) => sum + s[i], 0);
}

/** Half-precision tensors as float32, so that cases compare numbers. */
export function decoded(t: Tensor<DType>): Tensor {
  if (t.type !== 'bfloat16' && t.type !== 'float16') return t;
  return new Tensor('float32', decodeFloats(t.data, t.type), t.dims);
}

function outputs(r: AttentionResult): Tensor[] {
  return [decoded(r.output), r.logSumExp as Tensor];
}

export const TOLERANCE: Readonly<Record<FloatType, number>> = {
  float32: 5e-6,
  float16: 1e-3,
  bfloat16: 5e-3,
};

/** The last queries of a timed shape: what the reference computes of it. */
function lastQueries(shape: AttentionShape, d: AttentionData): CaseSlice {
  const { batch = 1, heads, keyHeads = heads, dim, valueDim = dim } = shape;
  const [queries, keys] = totals(shape);
  const last = shape.segments?.at(-1);
  const rows = last ? last[0] : Math.min(queries, 16);
  // Keys before every row's window change nothing; without them the reference does not walk all of them.
  const reach = shape.causal && shape.window ? shape.window[0] + rows : keys;
  const seen = last ? last[1] : Math.min(keys, reach);
  const tail = (t: Tensor<FloatType>, length: number, n: number, size: number) =>
    new Tensor(t.type, t.data.slice(t.data.length - length * n * size) as never, [1, length, n, size]);
  const q = tail(d.q, rows, heads, dim);
  const [k, v] = [tail(d.k, seen, keyHeads, dim), tail(d.v, seen, keyHeads, valueDim)];
  const { segments: _, ...options } = d.options;
  const pairs = shape.segments?.reduce((sum, [a, b]) => sum + a * b, 0) ?? batch * queries * keys;
  return {
    fraction: (rows * seen) / pairs,
    of([output, lse]) {
      const values = output.data.slice(output.data.length - rows * heads * valueDim) as Float32Array;
      const sums = Float32Array.from({ length: heads * rows }, (_, i) =>
        Number(lse.data[((batch - 1) * heads + Math.floor(i / rows) + 1) * queries - rows + (i % rows)]),
      );
      return [
        new Tensor('float32', values, [1, rows, heads, valueDim]),
        new Tensor('float32', sums, [1, heads, rows]),
      ];
    },
    prepared: {
      run: (o) => outputs(attentionSync(q, k, v, { ...options, ...o })),
      runAsync: async (o) => outputs(await attention(q, k, v, { ...options, ...o })),
    },
  };
}

/** Largest window as a dense mask, PyTorch's only way: it then computes every pair, here some 20 s for a call. */
const DENSE_MASK = 2 ** 27;

/** The same work in PyTorch and, for fp32 without windows and groups, in onnxruntime; packed lengths are padded. */
export function attentionPeers(shape: AttentionShape): Partial<Record<PeerName, PeerSpec>> {
  const { heads, keyHeads = heads, dim, type = 'float32', causal = false, window } = shape;
  const longest = (i: number) => Math.max(...(shape.segments ?? []).map((s) => s[i]));
  const [queries, keys] = shape.segments ? [longest(0), longest(1)] : [shape.queries, shape.keys];
  const batch = shape.segments?.length ?? shape.batch ?? 1;
  const spec: PeerSpec = { op: 'attention', batch, queries, keys, heads, dim, causal };
  const pytorch = { ...spec, key_heads: keyHeads, window: window?.[0] ?? 0, type };
  if (window && queries * keys > DENSE_MASK) return {};
  if (type !== 'float32' || keyHeads !== heads || window) return { pytorch };
  return { pytorch, onnxruntime: spec };
}

/** Attention cases: flash-attention's and FlashInfer's shapes, every option, every type. */
export const attentionCases: OpCase[] = attentionShapes.map((shape) => {
  const { batch = 1, heads, dim, valueDim = dim, type = 'float32' } = shape;
  const [queries, keys] = totals(shape);
  const window = shape.window?.[0] ?? keys;
  // Of causal pairs, those inside the window; of packed ones, those of one sequence.
  const seen = shape.segments?.reduce((sum, [a, b]) => sum + a * b, 0) ?? batch * queries * keys;
  const share = shape.causal ? (window < keys ? (window / keys) * (1 - window / keys / 2) : 0.5) : 1;
  return {
    family: 'attention',
    op: 'attention',
    verify: shape.bench ? false : undefined,
    peers: shape.bench ? attentionPeers(shape) : undefined,
    name: `${shape.name} B=${batch} S=${queries},${keys} H=${heads} D=${dim} ${type}`,
    tolerance: TOLERANCE[type],
    flops: 2 * seen * heads * (dim + valueDim) * share,
    bench: shape.bench,
    prepare(random) {
      const data = drawAttention(shape, random);
      const { q, k, v, options } = data;
      return {
        slice: shape.bench ? lastQueries(shape, data) : undefined,
        run: (o) => outputs(attentionSync(q, k, v, { ...options, ...o })),
        runAsync: async (o) => outputs(await attention(q, k, v, { ...options, ...o })),
        timed: (o) => {
          const all = { ...options, ...o };
          const out = attentionSync(q, k, v, all);
          return () => attentionSync(q, k, v, { ...all, out });
        },
      };
    },
  };
});
