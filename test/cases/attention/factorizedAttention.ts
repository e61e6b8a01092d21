import {
  type FactorizedAttentionForwardOptions,
  type FactorizedAttentionResult,
  factorizedAttention,
  factorizedAttentionSync,
} from '../../../lib/attention/factorizedAttention.ts';
import type { AttentionAxis } from '../../../lib/attention/factorizedOptions.ts';
import type { KeptTokens } from '../../../lib/attention/keptTokens.ts';
import { encodeFloats, type FloatType } from '../../../lib/dtype.ts';
import { type DTypeArrays, Tensor } from '../../../lib/tensor.ts';
import type { CaseSlice, OpCase, PeerName, PeerSpec } from '../case.ts';
import type { Random } from '../random.ts';
import { decoded, TOLERANCE } from './attention.ts';

/** Sizes and options of one case. */
export interface FactorizedShape {
  name: string;
  axis: AttentionAxis;
  batch?: number;
  frames: number;
  patches: number;
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
  alibi?: boolean;
  sinks?: boolean;
  /** Which dims are not broadcast, of batch, sequences, heads, queries: 'BSHQ', '11H1', … */
  bias?: string;
  mask?: string;
  /** Draw q, k, v from one buffer `[batch, tokens, 3, heads, dim]`; with a class token it comes first. */
  fused?: boolean;
  classToken?: boolean;
  /** Share of tokens kept; `equal` keeps as many in each batch entry, as a tensor of rank 4. */
  keep?: { share: number; equal?: boolean };
  bench?: boolean;
}

const small = { batch: 2, frames: 5, patches: 7, heads: 4, keyHeads: 2, dim: 16 };

const long = { patches: 35, heads: 2, dim: 16, valueDim: 24, batch: 1 };

export const factorizedShapes: FactorizedShape[] = [
  ...(['joint', 'time', 'space', 'split-heads'] as const).flatMap((axis): FactorizedShape[] => [
    { name: axis, axis, ...small },
    { name: 'causal', axis, ...small, causal: true },
    { name: 'window', axis, ...small, window: [2, 1] },
    { name: 'one frame', axis, ...small, frames: 1 },
    { name: 'one patch', axis, ...small, patches: 1 },
    { name: 'no batch', axis, ...small, batch: 0 },
    { name: 'no frames', axis, ...small, frames: 0 },
    { name: 'no patches', axis, ...small, patches: 0 },
    { name: 'sinks, ALiBi, softcap', axis, ...small, sinks: true, alibi: true, softcap: 3, scale: 0.4 },
    // Joint attention is longer than a panel with fewer frames, and the host shim is slow.
    { name: 'longer than a panel', axis, ...long, frames: axis === 'joint' ? 16 : 37 },
    { name: 'fused', axis, ...small, keyHeads: 4, fused: true, causal: axis === 'time' },
    { name: 'bf16', axis, ...small, type: 'bfloat16' },
    { name: 'fp16', axis, ...small, dim: 13, type: 'float16', causal: true },
    { name: 'kept half', axis, ...small, keep: { share: 0.5 } },
    { name: 'kept a tenth, bf16', axis, ...small, keep: { share: 0.1 }, type: 'bfloat16' },
    { name: 'kept equal', axis, ...small, keep: { share: 0.4, equal: true } },
    { name: 'kept none', axis, ...small, keep: { share: 0 } },
  ]),
  { name: 'kept, causal', axis: 'time', ...small, keep: { share: 0.5 }, causal: true, emptyRows: 'uniform' },
  { name: 'kept, window', axis: 'space', ...small, keep: { share: 0.7 }, window: [1, 0] },
  ...(['joint', 'time', 'space'] as const).flatMap((axis): FactorizedShape[] => [
    { name: 'bias of all', axis, ...small, bias: 'BSHQ' },
    { name: 'bias of heads', axis, ...small, bias: '11HQ' },
    { name: 'mask', axis, ...small, mask: 'BSHQ', emptyRows: 'uniform' },
    { name: 'mask of keys', axis, ...small, mask: 'BS11' },
  ]),
  { name: 'class token', axis: 'time', ...small, classToken: true },
  { name: 'class token', axis: 'space', ...small, classToken: true },
  { name: 'class token, fused', axis: 'space', ...small, keyHeads: 4, classToken: true, fused: true },
  { name: 'class token, bf16', axis: 'space', ...small, classToken: true, type: 'bfloat16' },
  { name: 'class token, fp16', axis: 'space', ...small, classToken: true, type: 'float16' },
  { name: 'class token, bias', axis: 'space', ...small, classToken: true, bias: '1SHQ', softcap: 2 },
  { name: 'class token, mask', axis: 'space', ...small, classToken: true, mask: 'B1HQ', sinks: true },
  { name: 'class token, no patches', axis: 'space', ...small, patches: 0, classToken: true },
  { name: 'class token, no frames', axis: 'space', ...small, frames: 0, classToken: true },
  { name: 'ViT-B time', axis: 'time', batch: 1, frames: 64, patches: 196, heads: 12, dim: 64, bench: true },
  { name: 'ViT-B time', axis: 'time', batch: 2, frames: 32, patches: 196, heads: 12, dim: 64, bench: true },
  { name: 'ViT-B time', axis: 'time', batch: 4, frames: 16, patches: 196, heads: 12, dim: 64, bench: true },
  { name: 'ViT-B space', axis: 'space', batch: 1, frames: 64, patches: 196, heads: 12, dim: 64, bench: true },
  {
    name: 'ViT-B time',
    axis: 'time',
    batch: 1,
    frames: 64,
    patches: 196,
    heads: 12,
    dim: 64,
    type: 'bfloat16',
    bench: true,
  },
  {
    name: 'ViT-B space',
    axis: 'space',
    batch: 1,
    frames: 64,
    patches: 196,
    heads: 12,
    dim: 64,
    type: 'bfloat16',
    bench: true,
  },
];

/** Inputs and options of a shape, drawn. */
export interface FactorizedData {
  q: Tensor<FloatType>;
  k: Tensor<FloatType>;
  v: Tensor<FloatType>;
  options: Omit<FactorizedAttentionForwardOptions, 'out'>;
}

const product = (dims: readonly number[]) => dims.reduce((a, b) => a * b, 1);

function tensorOf(type: FloatType, values: Float32Array, dims: number[]): Tensor<FloatType> {
  return new Tensor(type, encodeFloats(values, type) as DTypeArrays[FloatType], dims);
}

/** Kept tokens drawn; each batch entry keeps another number unless they are to be equal. */
export function drawTokens(
  random: Random,
  batch: number,
  frames: number,
  patches: number,
  share: number,
  equal = false,
): KeptTokens {
  const all = frames * patches;
  const indices: number[] = [];
  const batchOffsets = [0];
  for (let b = 0; b < batch; b++) {
    const order = Array.from({ length: all }, (_, i) => [random.uniform(), i]).sort((x, y) => x[0] - y[0]);
    const count = Math.min(all, Math.round(all * share) + (equal || share === 0 ? 0 : b));
    indices.push(
      ...order
        .slice(0, count)
        .map((x) => x[1])
        .sort((x, y) => x - y),
    );
    batchOffsets.push(indices.length);
  }
  return { indices: Int32Array.from(indices), batchOffsets: Int32Array.from(batchOffsets), frames, patches };
}

/** Draws q, k, v and every option that the shape names. */
export function drawFactorized(shape: FactorizedShape, random: Random): FactorizedData {
  const { axis, batch = 1, frames, patches, heads, keyHeads = heads, dim, valueDim = dim } = shape;
  const { type = 'float32' } = shape;
  const options: FactorizedData['options'] = { axis, returnLogSumExp: true };
  for (const name of ['causal', 'window', 'softcap', 'scale', 'emptyRows'] as const) {
    const skip = (name === 'causal' || name === 'window') && axis === 'joint' && shape.keep;
    if (shape[name] !== undefined && !skip) Object.assign(options, { [name]: shape[name] });
  }
  const draw = (dims: number[]) => tensorOf(type, random.normals(product(dims)), dims);
  let lead = [batch, frames, patches];
  if (shape.keep) {
    const { share, equal } = shape.keep;
    options.tokens = drawTokens(random, batch, frames, patches, share, equal);
    const total = options.tokens.indices.length;
    lead = equal ? [batch, total / batch] : [total];
  }
  let [q, k, v] = [
    draw([...lead, heads, dim]),
    draw([...lead, keyHeads, dim]),
    draw([...lead, keyHeads, valueDim]),
  ];
  if (shape.classToken) {
    const one = (h: number, d: number) => draw([batch, 1, h, d]);
    options.classToken = {
      mode: 'time-skip-space-mean',
      query: one(heads, dim),
      key: one(keyHeads, dim),
      value: one(keyHeads, valueDim),
    };
  }
  if (shape.fused) {
    const before = shape.classToken ? 1 : 0;
    const row = 3 * heads * dim;
    const tokens = before + frames * patches;
    const data = draw([batch, tokens, 3, heads, dim]).data;
    const part = (i: number, token: number, dims: number[]) =>
      ({ type, data: data.subarray(token * row + i * heads * dim), dims }) as unknown as Tensor<FloatType>;
    const strides = [tokens * row, patches * row, row, dim, 1];
    [q, k, v] = [0, 1, 2].map((i) => part(i, before, [...lead, heads, dim]));
    options.strides = { query: strides, key: strides, value: strides };
    if (shape.classToken) {
      const [query, key, value] = [0, 1, 2].map((i) => part(i, 0, [batch, 1, heads, dim]));
      const one = [tokens * row, row, dim, 1] as const;
      const oneStrides = { query: one, key: one, value: one };
      options.classToken = { mode: 'time-skip-space-mean', query, key, value, strides: oneStrides };
    }
  }
  const [sequences, length] =
    axis === 'time' ? [patches, frames] : axis === 'space' ? [frames, patches] : [1, frames * patches];
  const places = length + (shape.classToken && axis === 'space' ? 1 : 0);
  const dimsOf = (pattern: string) =>
    [batch, sequences, heads, places, places].map((x, i) => (pattern[i] === '1' ? 1 : x));
  if (shape.bias) options.bias = draw(dimsOf(shape.bias));
  if (shape.mask) {
    const dims = dimsOf(shape.mask);
    const bits = Uint8Array.from({ length: product(dims) }, () => (random.uniform() < 0.6 ? 1 : 0));
    options.mask = new Tensor('uint8', bits, dims);
  }
  if (shape.alibi) options.alibiSlopes = Float32Array.from({ length: heads }, (_, h) => 2 ** (-h - 1));
  if (shape.sinks) options.sinks = random.normals(heads);
  return { q, k, v, options };
}

function outputs(r: FactorizedAttentionResult): Tensor[] {
  const list = [decoded(r.output), r.logSumExp as Tensor];
  if (r.classToken) list.push(decoded(r.classToken));
  return list;
}

/** Pairs of tokens that attend to each other, times the heads. */
export function pairsOf(shape: FactorizedShape): number {
  const { axis, batch = 1, frames, patches, heads } = shape;
  const joint = axis === 'joint' ? frames * patches : 0;
  const time = axis === 'time' ? frames : axis === 'split-heads' ? frames / 2 : 0;
  const space = axis === 'space' ? patches : axis === 'split-heads' ? patches / 2 : 0;
  return batch * frames * patches * heads * (joint + time + space);
}

export function factorizedName(shape: FactorizedShape): string {
  const { axis, batch = 1, frames, patches, heads, dim, type = 'float32' } = shape;
  return `${shape.name} ${axis} B=${batch} T=${frames} N=${patches} H=${heads} D=${dim} ${type}`;
}

/** The last sequence of a timed shape: what the reference computes of it. */
function lastSequence(shape: FactorizedShape, d: FactorizedData): CaseSlice {
  const { axis, batch = 1, frames, patches, heads, dim, valueDim = dim } = shape;
  const time = axis === 'time';
  const [steps, width] = time ? [frames, 1] : [1, patches];
  const tokens = batch * frames * patches;
  const first = time ? tokens - (frames - 1) * patches - 1 : tokens - patches;
  const rows = Array.from({ length: steps * width }, (_, i) => first + (time ? i * patches : i));
  const pick = (data: ArrayLike<number>, size: number) =>
    rows.flatMap((r) => Array.from({ length: heads * size }, (_, j) => data[r * heads * size + j]));
  const part = (t: Tensor<FloatType>, size: number) => {
    const data = t.data.slice(0, rows.length * heads * size);
    data.set(pick(t.data, size));
    return new Tensor(t.type, data as never, [1, steps, width, heads, size]);
  };
  const [q, k, v] = [part(d.q, dim), part(d.k, dim), part(d.v, valueDim)];
  return {
    fraction: rows.length / tokens,
    of([output, lse]) {
      const values = Float32Array.from(pick(output.data as Float32Array, valueDim));
      const sums = Float32Array.from({ length: heads * rows.length }, (_, i) => {
        const token = rows[i % rows.length] - (batch - 1) * frames * patches;
        const head = (batch - 1) * heads + Math.floor(i / rows.length);
        return Number(lse.data[head * frames * patches + token]);
      });
      return [
        new Tensor('float32', values, [1, steps, width, heads, valueDim]),
        new Tensor('float32', sums, [1, heads, steps, width]),
      ];
    },
    prepared: {
      run: (o) => outputs(factorizedAttentionSync(q, k, v, { ...d.options, ...o })),
      runAsync: async (o) => outputs(await factorizedAttention(q, k, v, { ...d.options, ...o })),
    },
  };
}

/** scaled_dot_product_attention on views; onnxruntime is given sequences that already lie together. */
function peersOf(shape: FactorizedShape): Partial<Record<PeerName, PeerSpec>> {
  const { axis, batch = 1, frames, patches, heads, dim, type = 'float32' } = shape;
  const time = axis === 'time';
  const length = time ? frames : patches;
  const count = batch * (time ? patches : frames);
  const spec = { op: 'attention', batch: count, queries: length, keys: length, heads, dim };
  const pytorch = { ...spec, key_heads: heads, type, layout: time && batch === 1 ? 'frames' : 'sequence' };
  return type === 'float32' ? { pytorch, onnxruntime: { ...spec, causal: false } } : { pytorch };
}

/** Every axis with every option, type and kind of tokens. */
export const factorizedAttentionCases: OpCase[] = factorizedShapes.map((shape) => {
  const { dim, valueDim = dim, type = 'float32' } = shape;
  return {
    family: 'attention',
    op: 'factorizedAttention',
    name: factorizedName(shape),
    tolerance: TOLERANCE[type],
    flops: 2 * pairsOf(shape) * (dim + valueDim),
    bench: shape.bench,
    verify: shape.bench ? false : undefined,
    peers: shape.bench ? peersOf(shape) : undefined,
    prepare(random) {
      const data = drawFactorized(shape, random);
      const { q, k, v, options } = data;
      return {
        slice: shape.bench ? lastSequence(shape, data) : undefined,
        run: (o) => outputs(factorizedAttentionSync(q, k, v, { ...options, ...o })),
        runAsync: async (o) => outputs(await factorizedAttention(q, k, v, { ...options, ...o })),
        timed: (o) => {
          const all = { ...options, ...o };
          const out = factorizedAttentionSync(q, k, v, all);
          return () => factorizedAttentionSync(q, k, v, { ...all, out });
        },
      };
    },
  };
});
