import { decodeFloats, encodeFloats, type FloatType } from '../../../lib/dtype.ts';
import { SCORE_CODE } from '../../../lib/moe/routerOptions.ts';
import { type RouteTopKOptions, type Routing, routeTopK, routeTopKSync } from '../../../lib/moe/routeTopK.ts';
import { scores } from '../../../lib/reference/moe/router.ts';
import { Tensor } from '../../../lib/tensor.ts';
import { compareOutputs, type OpCase, type PeerSpec } from '../case.ts';
import type { Random } from '../random.ts';

/** What a routing case needs; {@link routeTopKCase} draws its data. */
export interface RoutingShape {
  name: string;
  tokens: number;
  experts: number;
  options: Omit<RouteTopKOptions, 'selectionBias' | 'mask' | 'out'>;
  bias?: boolean;
  mask?: 'experts' | 'tokens';
  type?: FloatType;
  bench?: boolean;
}

const deepseekV3 = {
  k: 8,
  score: 'sigmoid',
  groups: { count: 8, keep: 4, score: 'top2' },
  normalize: true,
  normalizeEpsilon: 1e-20,
  scale: 2.5,
} as const;

const shapes: RoutingShape[] = [
  { name: 'Mixtral', tokens: 67, experts: 8, options: { k: 2, normalize: true } },
  { name: 'Qwen3-MoE', tokens: 130, experts: 128, options: { k: 8, normalize: true } },
  { name: 'OLMoE', tokens: 97, experts: 64, options: { k: 8 } },
  { name: 'gpt-oss', tokens: 61, experts: 32, options: { k: 4, softmaxOver: 'selected' } },
  { name: 'DeepSeek-V3', tokens: 70, experts: 256, options: deepseekV3, bias: true },
  {
    name: 'DeepSeek-V2',
    tokens: 40,
    experts: 160,
    options: { k: 6, groups: { count: 8, keep: 3, score: 'max' }, scale: 16 },
  },
  { name: 'Llama 4', tokens: 33, experts: 16, options: { k: 1, score: 'sigmoid' } },
  {
    name: 'sqrt-softplus',
    tokens: 50,
    experts: 60,
    options: { k: 6, score: 'sqrt-softplus', normalize: true },
  },
  { name: 'softmax + bias', tokens: 50, experts: 60, options: { k: 6 }, bias: true },
  {
    name: 'softmax top-2 groups',
    tokens: 50,
    experts: 60,
    options: { k: 3, groups: { count: 5, keep: 2, score: 'top2' } },
  },
  {
    name: 'selected + bias',
    tokens: 50,
    experts: 33,
    options: { k: 3, softmaxOver: 'selected' },
    bias: true,
  },
  { name: 'floor', tokens: 50, experts: 33, options: { k: 3, normalize: true, normalizeFloor: 2 ** -2 } },
  { name: 'expert mask', tokens: 50, experts: 40, options: { k: 5, normalize: true }, mask: 'experts' },
  { name: 'token mask', tokens: 50, experts: 40, options: { k: 5 }, mask: 'tokens' },
  {
    name: 'masked groups',
    tokens: 50,
    experts: 40,
    options: { k: 5, groups: { count: 4, keep: 2, score: 'max' } },
    mask: 'tokens',
  },
  { name: 'one expert', tokens: 5, experts: 1, options: { k: 1, normalize: true } },
  { name: 'k = E', tokens: 9, experts: 7, options: { k: 7 } },
  { name: 'k = E = 96', tokens: 5, experts: 96, options: { k: 96, normalize: true } },
  { name: 'E = 257', tokens: 19, experts: 257, options: { k: 9, normalize: true } },
  { name: 'E = 576', tokens: 19, experts: 576, options: { k: 32 } },
  { name: 'E = 4096', tokens: 5, experts: 4096, options: { k: 16 } },
  { name: 'no tokens', tokens: 0, experts: 64, options: { k: 8 } },
  { name: 'Qwen3-MoE bf16', tokens: 130, experts: 128, options: { k: 8, normalize: true }, type: 'bfloat16' },
  { name: 'DeepSeek-V3 bf16', tokens: 45, experts: 256, options: deepseekV3, bias: true, type: 'bfloat16' },
  { name: 'OLMoE fp16', tokens: 97, experts: 61, options: { k: 8 }, type: 'float16' },
  { name: 'Mixtral', tokens: 4096, experts: 8, options: { k: 2, normalize: true }, bench: true },
  { name: 'Qwen3-MoE', tokens: 4096, experts: 128, options: { k: 8, normalize: true }, bench: true },
  {
    name: 'softmax + renormalise',
    tokens: 4096,
    experts: 64,
    options: { k: 8, normalize: true },
    bench: true,
  },
  { name: 'OLMoE', tokens: 4096, experts: 64, options: { k: 8 }, bench: true },
  { name: 'DeepSeek-V3', tokens: 4096, experts: 256, options: deepseekV3, bias: true, bench: true },
  {
    name: 'gpt-oss bf16',
    tokens: 4096,
    experts: 32,
    options: { k: 4, softmaxOver: 'selected' },
    type: 'bfloat16',
    bench: true,
  },
  { name: 'one token', tokens: 1, experts: 128, options: { k: 8, normalize: true }, bench: true },
];

function outputs(r: Routing): Tensor[] {
  return [r.indices, r.weights] as Tensor[];
}

function prepare(shape: RoutingShape, random: Random) {
  const { tokens, experts } = shape;
  const type = shape.type ?? 'float32';
  const values = random.normals(tokens * experts, 2);
  const logits = new Tensor(type, encodeFloats(values, type) as never, [tokens, experts]);
  const options: RouteTopKOptions = { ...shape.options };
  if (shape.bias) options.selectionBias = random.normals(experts, 0.1);
  if (shape.mask) {
    const dims = shape.mask === 'experts' ? [experts] : [tokens, experts];
    const data = Uint8Array.from({ length: dims.reduce((a, b) => a * b) }, () =>
      random.uniform() < 0.3 ? 0 : 1,
    );
    options.mask = new Tensor('uint8', data, dims);
  }
  return { logits, options };
}

/** What PyTorch code for the same routing is given. */
function pytorchSpec({ tokens, experts, options, type }: RoutingShape): PeerSpec {
  const { k, groups } = options;
  const common = { tokens, experts, k, type: type ?? 'float32' };
  if (groups) {
    return {
      op: 'route_grouped',
      ...common,
      groups: groups.count,
      keep: groups.keep,
      scale: options.scale ?? 1,
    };
  }
  if (options.softmaxOver === 'selected') return { op: 'route_topk_softmax', ...common };
  return { op: 'route_softmax_topk', ...common, normalize: options.normalize ?? false };
}

function peersOf(shape: RoutingShape): OpCase['peers'] {
  if (!shape.bench) return undefined;
  const { tokens, experts, options, type } = shape;
  const peers: OpCase['peers'] = { pytorch: pytorchSpec(shape) };
  const plain = !options.groups && !options.score && !options.softmaxOver && !type;
  if (plain) {
    const normalize = options.normalize ?? false;
    peers.onnxruntime = { op: 'route_softmax_topk', tokens, experts, k: options.k, normalize };
  }
  return peers;
}

/** The case of one shape. */
export const routeTopKCase = (shape: RoutingShape): OpCase => ({
  family: 'moe',
  op: 'routeTopK',
  name: `${shape.name} T=${shape.tokens} E=${shape.experts} k=${shape.options.k}`,
  tolerance: 1e-6,
  bytes:
    shape.tokens * (shape.experts * (shape.type && shape.type !== 'float32' ? 2 : 4) + shape.options.k * 8),
  items: { unit: 'token', count: shape.tokens },
  bench: shape.bench,
  peers: peersOf(shape),
  prepare(random) {
    const { logits, options } = prepare(shape, random);
    return {
      run: (o) => outputs(routeTopKSync(logits, { ...options, ...o })),
      runAsync: async (o) => outputs(await routeTopK(logits, { ...options, ...o })),
      timed: (o) => {
        const all = { ...options, ...o };
        const out = routeTopKSync(logits, all);
        return () => routeTopKSync(logits, { ...all, out });
      },
      compare: (actual, expected) =>
        compareRouting(acceptNearTies(actual, expected, choiceScores(logits, options), options), expected),
    };
  },
});

/** Selection scores in float64: what the definition compares, before groups. */
function choiceScores(logits: Tensor, options: RouteTopKOptions): (row: number) => Float64Array {
  const experts = logits.dims[1];
  const values = decodeFloats(logits.data, logits.type as FloatType);
  const bias = options.selectionBias as Float32Array | undefined;
  const code = SCORE_CODE[options.score ?? 'softmax'];
  return (row) => {
    const l = Float64Array.from(values.subarray(row * experts, (row + 1) * experts));
    const c = options.softmaxOver === 'selected' ? l : scores(l, code);
    return c.map((x, e) => x + (bias?.[e] ?? 0));
  };
}

// Scores closer than this are equal to float32 rounding (a few units in the last place of values near 1).
const NEAR = 5e-7;

/**
 * Rows whose choice float32 cannot tell from the reference's: ids that differ only where their float64 scores agree,
 * or where the last group kept and the first one dropped do. Such rows are taken from the reference.
 */
function acceptNearTies(
  actual: Tensor[],
  expected: Tensor[],
  scoresOf: (row: number) => Float64Array,
  { k, groups, mask }: RouteTopKOptions,
): Tensor[] {
  const [ids, weights] = actual.map((t) => new Tensor(t.type, t.data.slice() as never, t.dims));
  const [refIds, refWeights] = expected;
  for (let row = 0; row < ids.dims[0]; row++) {
    const differ = Array.from({ length: k }, (_, j) => row * k + j).filter(
      (i) => ids.data[i] !== refIds.data[i],
    );
    if (differ.length === 0 || mask !== undefined) continue;
    const c = scoresOf(row);
    const close = (i: number) => Math.abs(c[Number(ids.data[i])] - c[Number(refIds.data[i])]) <= NEAR;
    if (!(differ.every(close) || (groups && groupsTie(c, groups)))) continue;
    ids.data.set(refIds.data.subarray(row * k, (row + 1) * k) as never, row * k);
    weights.data.set(refWeights.data.subarray(row * k, (row + 1) * k) as never, row * k);
  }
  return [ids, weights] as Tensor[];
}

function groupsTie(
  c: Float64Array,
  { count, keep, score }: NonNullable<RouteTopKOptions['groups']>,
): boolean {
  if (keep >= count) return false;
  const size = c.length / count;
  const totals = Array.from({ length: count }, (_, g) => {
    const best = Array.from(c.subarray(g * size, (g + 1) * size)).sort((a, b) => b - a);
    return score === 'top2' ? best[0] + best[1] : best[0];
  }).sort((a, b) => b - a);
  return totals[keep - 1] - totals[keep] <= NEAR;
}

/** Routing cases: every published variant, odd sizes, every logit type. */
export const routeTopKCases: OpCase[] = shapes.map(routeTopKCase);

/**
 * Selection may legitimately differ from float64 where two scores agree to float32 rounding. Such a swap shows as
 * different ids with weights that are equal to rounding; anything else is a mismatch.
 */
export function compareRouting(actual: Tensor[], expected: Tensor[]) {
  const c = compareOutputs(actual, expected);
  if (c.mismatches === 0) return c;
  const [ids, weights] = actual;
  const [refIds, refWeights] = expected;
  c.mismatches = 0;
  c.detail = undefined;
  for (let i = 0; i < ids.data.length; i++) {
    if (ids.data[i] === refIds.data[i]) continue;
    const w = Number(weights.data[i]);
    const r = Number(refWeights.data[i]);
    if (Math.abs(w - r) <= 1e-6 * Math.abs(r)) continue;
    c.mismatches++;
    c.detail ??= `id ${i}: ${ids.data[i]} (weight ${w}), expected ${refIds.data[i]} (weight ${r})`;
  }
  return c;
}
