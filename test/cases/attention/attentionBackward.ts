import { attentionSync } from '../../../lib/attention/attention.ts';
import {
  type AttentionGradients,
  attentionBackward,
  attentionBackwardSync,
} from '../../../lib/attention/attentionBackward.ts';
import { encodeFloats, type FloatType } from '../../../lib/dtype.ts';
import { type DTypeArrays, Tensor } from '../../../lib/tensor.ts';
import { type CaseSlice, type Comparison, compareOutputs, type OpCase } from '../case.ts';
import { type AttentionData, attentionPeers, decoded, drawAttention, totals } from './attention.ts';
import { type AttentionShape, attentionShapes } from './attentionShapes.ts';

/** Work of the reference beyond which a shape of the forward is left out here. */
const LARGEST = 1_500_000;

/** Every option in half precision, whose kernels differ: tiles of 64 and 128 lines, head sizes to 64, 128, 256. */
const HALF: AttentionShape[] = [
  { name: 'd128 causal', queries: 100, keys: 130, heads: 4, keyHeads: 2, dim: 128, causal: true },
  { name: 'd192 v160', queries: 70, keys: 90, heads: 1, dim: 192, valueDim: 160, window: [40, 10] },
  {
    name: 'd256 empty rows uniform',
    queries: 90,
    keys: 50,
    heads: 2,
    keyHeads: 1,
    dim: 256,
    causal: true,
    alibi: true,
    emptyRows: 'uniform',
  },
  { name: 'd300', queries: 9, keys: 40, heads: 1, dim: 300, valueDim: 9 },
  { name: 'long', queries: 150, keys: 300, heads: 1, dim: 40 },
  { name: 'bias', batch: 2, queries: 41, keys: 75, heads: 2, dim: 32, bias: 'BHQ' },
  { name: 'bias of heads', batch: 2, queries: 41, keys: 75, heads: 2, dim: 32, bias: '1HQ', causal: true },
  { name: 'sinks, empty rows', queries: 61, keys: 20, heads: 2, dim: 64, sinks: true, causal: true },
  {
    name: 'block mask',
    queries: 150,
    keys: 300,
    heads: 2,
    keyHeads: 1,
    dim: 32,
    blockMask: { pattern: '1HQ', query: 32, key: 64 },
  },
  {
    name: 'packed',
    segments: [
      [5, 5],
      [0, 7],
      [133, 143],
      [4, 0],
      [40, 90],
      [17, 9],
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
    dim: 72,
    mask: '1HQ',
    bias: '11Q',
    window: [20, 10],
    softcap: 5,
    blockMask: { pattern: '111', query: 16, key: 16 },
    blockIds: true,
  },
].flatMap((s) =>
  (['bfloat16', 'float16'] as const).map((type) => ({
    ...(s as AttentionShape),
    name: `half ${s.name}`,
    type,
  })),
);

const extra: AttentionShape[] = [
  { name: 'no query heads', queries: 3, keys: 9, heads: 0, keyHeads: 2, dim: 8 },
  { name: 'several panels', queries: 70, keys: 1100, heads: 1, dim: 16, causal: true },
  { name: 'panels and blocks', queries: 150, keys: 1100, heads: 2, keyHeads: 1, dim: 16, causal: true },
  { name: 'panels and blocks, window', queries: 250, keys: 1100, heads: 1, dim: 16, window: [250, 40] },
  {
    name: 'mask bias of one row',
    batch: 2,
    queries: 30,
    keys: 40,
    heads: 4,
    keyHeads: 2,
    dim: 8,
    bias: '111',
  },
  ...HALF,
  { name: 'decoder', queries: 2048, keys: 2048, heads: 8, dim: 128, causal: true, bench: true },
  { name: 'joint', queries: 2048, keys: 2048, heads: 12, dim: 64, bench: true },
];

function outputs(g: AttentionGradients): Tensor[] {
  const list = [g.query, g.key, g.value].map(decoded);
  if (g.bias) list.push(g.bias);
  return list;
}

/**
 * With one visible key the gradients of q and k are exactly 0, as the difference of two equal sums. Such an output
 * (all zeros in the reference) is measured against the largest norm of the others.
 */
export function compareGradients(actual: Tensor[], expected: Tensor[]): Comparison {
  const norm = (t: Tensor) => Math.sqrt((t.data as Float32Array).reduce((sum, x) => sum + x * x, 0));
  const zero = (i: number) => i !== 2 && expected[i].size > 0 && norm(expected[i]) === 0;
  const kept = expected.map((_, i) => i).filter((i) => !zero(i));
  const result = compareOutputs(
    kept.map((i) => actual[i]),
    kept.map((i) => expected[i]),
  );
  const largest = Math.max(...expected.map(norm));
  for (let i = 0; i < expected.length; i++) {
    if (zero(i) && norm(actual[i]) !== 0)
      result.relative = Math.max(result.relative, norm(actual[i]) / largest);
  }
  return result;
}

export const BACKWARD_TOLERANCE: Readonly<Record<FloatType, number>> = {
  float32: 2e-5,
  float16: 1e-3,
  bfloat16: 5e-3,
};

function workOf(shape: AttentionShape): number {
  const [queries, keys] = totals(shape);
  return (shape.batch ?? 1) * queries * keys * shape.heads * shape.dim;
}

/** The first head of a timed shape, without groups and biases: what the reference differentiates of it. */
function firstHead(
  shape: AttentionShape,
  d: AttentionData,
  upstream: Tensor<FloatType>,
  forward: { output: Tensor<FloatType>; logSumExp: Tensor },
): CaseSlice {
  const head = (t: Tensor): Tensor => {
    const [batch, length, heads, dim] = t.dims;
    const data = t.data.slice(0, batch * length * dim);
    for (let i = 0; i < batch * length; i++) {
      data.set(t.data.subarray(i * heads * dim, i * heads * dim + dim) as never, i * dim);
    }
    return new Tensor(t.type, data as never, [batch, length, 1, dim]);
  };
  const [g, q, k, v, output] = [upstream, d.q, d.k, d.v, forward.output].map(head) as Tensor<FloatType>[];
  const { dims, data } = forward.logSumExp;
  const [batch, heads, queries] = dims;
  const sums = new Float32Array(batch * queries);
  for (let b = 0; b < batch; b++) {
    sums.set(
      (data as Float32Array).subarray(b * heads * queries, b * heads * queries + queries),
      b * queries,
    );
  }
  const logSumExp = new Tensor('float32', sums, [batch, 1, queries]);
  const options = { ...d.options, output, logSumExp };
  return {
    fraction: 1 / shape.heads,
    of: (gradients) => gradients.map(head),
    prepared: {
      compare: compareGradients,
      run: (o) => outputs(attentionBackwardSync(g, q, k, v, { ...options, ...o })),
      runAsync: async (o) => outputs(await attentionBackward(g, q, k, v, { ...options, ...o })),
    },
  };
}

/** The forward's shapes that the reference differentiates quickly, and a few of their own. */
export const attentionBackwardCases: OpCase[] = [
  ...attentionShapes.filter((s) => !s.bench && workOf(s) <= LARGEST),
  ...extra,
].map((shape) => {
  const { batch = 1, heads, dim, valueDim = dim, type = 'float32' } = shape;
  const [queries, keys] = totals(shape);
  return {
    family: 'attention',
    op: 'attentionBackward',
    name: `${shape.name} B=${batch} S=${queries},${keys} H=${heads} D=${dim} ${type}`,
    tolerance: BACKWARD_TOLERANCE[type],
    flops: 5 * batch * queries * keys * heads * (dim + valueDim) * (shape.causal ? 0.5 : 1),
    bench: shape.bench,
    verify: shape.bench ? false : undefined,
    peers: shape.bench ? { pytorch: { ...attentionPeers(shape).pytorch!, backward: true } } : undefined,
    prepare(random) {
      const data = drawAttention(shape, random);
      const { q, k, v, options } = data;
      const dims = [batch, queries, heads, valueDim];
      const values = random.normals(batch * queries * heads * valueDim);
      const g = new Tensor(type, encodeFloats(values, type) as DTypeArrays[FloatType], dims);
      const backend = shape.bench ? 'auto' : 'reference';
      const { output, logSumExp } = attentionSync(q, k, v, { ...options, backend });
      const all = { ...options, output, logSumExp: logSumExp as Tensor };
      return {
        slice: shape.bench ? firstHead(shape, data, g, all) : undefined,
        compare: compareGradients,
        run: (o) => outputs(attentionBackwardSync(g, q, k, v, { ...all, ...o })),
        runAsync: async (o) => outputs(await attentionBackward(g, q, k, v, { ...all, ...o })),
        timed: (o) => {
          const out = attentionBackwardSync(g, q, k, v, { ...all, ...o });
          return () => attentionBackwardSync(g, q, k, v, { ...all, ...o, out });
        },
      };
    },
  };
});
