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
import { type AttentionShape, attentionShapes } from './attentionShapes.ts';

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
