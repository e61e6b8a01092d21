import { encodeFloats, type FloatType } from '../../../lib/dtype.ts';
import type { RouterOptions } from '../../../lib/moe/routerOptions.ts';
import { routeTopKSync } from '../../../lib/moe/routeTopK.ts';
import { routeTopKBackward, routeTopKBackwardSync } from '../../../lib/moe/routeTopKBackward.ts';
import { Tensor } from '../../../lib/tensor.ts';
import type { OpCase } from '../case.ts';
import type { Random } from '../random.ts';

interface Shape {
  name: string;
  tokens: number;
  experts: number;
  k: number;
  options?: RouterOptions;
  spread?: number;
  masked?: boolean;
  type?: FloatType;
  /** Ids drawn with repeats and -1 instead of a routing's. */
  replay?: boolean;
  bench?: boolean;
}

const v3: RouterOptions = { score: 'sigmoid', normalize: true, normalizeEpsilon: 1e-20, scale: 2.5 };
const shapes: Shape[] = [
  { name: 'softmax', tokens: 97, experts: 64, k: 8 },
  { name: 'softmax, normalised', tokens: 130, experts: 128, k: 8, options: { normalize: true } },
  {
    name: 'softmax, epsilon',
    tokens: 60,
    experts: 33,
    k: 3,
    options: { normalize: true, normalizeEpsilon: 0.01, scale: 2 },
  },
  {
    name: 'softmax, floor',
    tokens: 60,
    experts: 33,
    k: 3,
    options: { normalize: true, normalizeFloor: 0.5, scale: 2 },
  },
  { name: 'over selected', tokens: 61, experts: 32, k: 4, options: { softmaxOver: 'selected', scale: -3 } },
  { name: 'DeepSeek-V3', tokens: 70, experts: 256, k: 8, options: v3 },
  { name: 'sigmoid', tokens: 70, experts: 17, k: 1, options: { score: 'sigmoid' } },
  {
    name: 'sigmoid, floor',
    tokens: 70,
    experts: 17,
    k: 2,
    options: { score: 'sigmoid', normalize: true, normalizeFloor: 1.5 },
  },
  {
    name: 'sqrt-softplus',
    tokens: 50,
    experts: 60,
    k: 6,
    options: { score: 'sqrt-softplus', normalize: true },
  },
  { name: 'dominated', tokens: 90, experts: 40, k: 2, spread: 8 },
  {
    name: 'dominated, epsilon',
    tokens: 90,
    experts: 40,
    k: 1,
    spread: 8,
    options: { normalize: true, normalizeEpsilon: 1e-3 },
  },
  { name: 'mask', tokens: 50, experts: 40, k: 5, masked: true },
  { name: 'replay', tokens: 50, experts: 40, k: 7, replay: true },
  { name: 'replay, normalised', tokens: 50, experts: 40, k: 7, replay: true, options: { normalize: true } },
  { name: 'replay, sigmoid', tokens: 50, experts: 40, k: 7, replay: true, options: v3 },
  { name: 'k = E = 4096', tokens: 2, experts: 4096, k: 4096 },
  { name: 'bf16', tokens: 50, experts: 33, k: 3, type: 'bfloat16' },
  { name: 'fp16', tokens: 50, experts: 33, k: 3, type: 'float16', options: v3 },
  { name: 'no tokens', tokens: 0, experts: 33, k: 3 },
  { name: 'softmax', tokens: 4096, experts: 64, k: 8, bench: true },
  { name: 'DeepSeek-V3', tokens: 4096, experts: 256, k: 8, options: v3, bench: true },
];

function prepare(shape: Shape, random: Random) {
  const { tokens, experts, k } = shape;
  const type = shape.type ?? 'float32';
  const values = random.normals(tokens * experts, shape.spread ?? 2);
  const logits = new Tensor(type, encodeFloats(values, type) as never, [tokens, experts]);
  const gradWeights = new Tensor('float32', random.normals(tokens * k), [tokens, k]);
  const data = Uint8Array.from({ length: shape.masked ? tokens * experts : 0 }, () =>
    random.uniform() < 0.3 ? 0 : 1,
  );
  const mask = shape.masked ? { mask: new Tensor('uint8', data, [tokens, experts]) } : {};
  const indices = shape.replay
    ? new Tensor(
        'int32',
        Int32Array.from({ length: tokens * k }, () => random.integer(-1, 11)),
        [tokens, k],
      )
    : routeTopKSync(logits, { k, ...shape.options, ...mask, backend: 'reference' }).indices;
  return { logits, gradWeights, options: { ...shape.options, ...mask, indices } };
}

/** Backward of the routing weights: every score and divisor, dominating experts, replayed ids with repeats. */
export const routeTopKBackwardCases: OpCase[] = shapes.map((shape) => ({
  family: 'moe',
  op: 'routeTopKBackward',
  name: `${shape.name} T=${shape.tokens} E=${shape.experts} k=${shape.k}`,
  tolerance: 1e-6,
  bytes: shape.tokens * (shape.experts * (shape.type && shape.type !== 'float32' ? 6 : 8) + shape.k * 8),
  items: { unit: 'token', count: shape.tokens },
  bench: shape.bench,
  prepare(random) {
    const { logits, gradWeights, options } = prepare(shape, random);
    return {
      run: (o) => [routeTopKBackwardSync(gradWeights, logits, { ...options, ...o }) as Tensor],
      runAsync: async (o) => [(await routeTopKBackward(gradWeights, logits, { ...options, ...o })) as Tensor],
      timed: (o) => {
        const out = routeTopKBackwardSync(gradWeights, logits, { ...options, ...o });
        return () => routeTopKBackwardSync(gradWeights, logits, { ...options, ...o, out });
      },
    };
  },
}));
