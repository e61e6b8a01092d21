import { encodeFloats, type FloatType } from '../../../lib/dtype.ts';
import {
  type ImportanceLossOptions,
  importanceLoss,
  importanceLossSync,
  type LoadBalancingLossOptions,
  loadBalancingLoss,
  loadBalancingLossSync,
  loadLoss,
  loadLossSync,
  type RouterLoss,
  type RouterLossOptions,
  routerZLoss,
  routerZLossSync,
  routeTopKSync,
} from '../../../lib/moe/index.ts';
import { Tensor } from '../../../lib/tensor.ts';
import type { OpCase } from '../case.ts';
import type { Random } from '../random.ts';

interface Shape {
  op: 'loadBalancingLoss' | 'routerZLoss' | 'importanceLoss' | 'loadLoss';
  name: string;
  tokens: number;
  experts: number;
  k?: number;
  options?: LoadBalancingLossOptions & ImportanceLossOptions & RouterLossOptions;
  masked?: boolean;
  type?: FloatType;
  bench?: boolean;
}

const gradient = true;
const shapes: Shape[] = [
  { op: 'loadBalancingLoss', name: 'Switch', tokens: 67, experts: 8, k: 1, options: { gradient } },
  {
    op: 'loadBalancingLoss',
    name: 'transformers, padding',
    tokens: 130,
    experts: 60,
    k: 6,
    masked: true,
    options: { gradient, normalization: 'tokens', coefficient: 0.01 },
  },
  {
    op: 'loadBalancingLoss',
    name: 'DeepSeek-V3',
    tokens: 90,
    experts: 40,
    k: 4,
    options: { gradient, score: 'sigmoid', normalize: true },
  },
  {
    op: 'loadBalancingLoss',
    name: 'sqrt-softplus',
    tokens: 90,
    experts: 33,
    k: 4,
    options: { gradient, score: 'sqrt-softplus' },
  },
  {
    op: 'loadBalancingLoss',
    name: 'sqrt-softplus, normalised',
    tokens: 90,
    experts: 33,
    k: 4,
    options: { gradient, score: 'sqrt-softplus', normalize: true },
  },
  {
    op: 'loadBalancingLoss',
    name: 'given scores',
    tokens: 30,
    experts: 19,
    k: 2,
    options: { gradient, score: 'none' },
  },
  {
    op: 'loadBalancingLoss',
    name: 'bf16',
    tokens: 70,
    experts: 33,
    k: 3,
    type: 'bfloat16',
    options: { gradient },
  },
  { op: 'loadBalancingLoss', name: 'value only', tokens: 1000, experts: 65, k: 8 },
  { op: 'loadBalancingLoss', name: 'E = 4096', tokens: 5, experts: 4096, k: 2, options: { gradient } },
  { op: 'loadBalancingLoss', name: 'no tokens', tokens: 0, experts: 4, k: 2, options: { gradient } },
  { op: 'routerZLoss', name: 'plain', tokens: 67, experts: 8, options: { gradient } },
  {
    op: 'routerZLoss',
    name: 'padding',
    tokens: 130,
    experts: 61,
    masked: true,
    options: { gradient, coefficient: 1e-3 },
  },
  { op: 'routerZLoss', name: 'fp16', tokens: 70, experts: 33, type: 'float16', options: { gradient } },
  { op: 'routerZLoss', name: 'value only', tokens: 1000, experts: 257 },
  { op: 'routerZLoss', name: 'no tokens', tokens: 0, experts: 4, options: { gradient } },
  { op: 'importanceLoss', name: 'softmax', tokens: 67, experts: 8, options: { gradient } },
  { op: 'importanceLoss', name: 'padding', tokens: 1000, experts: 60, masked: true, options: { gradient } },
  {
    op: 'importanceLoss',
    name: 'sigmoid',
    tokens: 90,
    experts: 40,
    options: { gradient, score: 'sigmoid', coefficient: 3 },
  },
  {
    op: 'importanceLoss',
    name: 'sigmoid, normalised',
    tokens: 90,
    experts: 40,
    options: { gradient, score: 'sigmoid', normalize: true },
  },
  { op: 'importanceLoss', name: 'no tokens', tokens: 0, experts: 4, options: { gradient } },
  { op: 'loadLoss', name: 'padding', tokens: 130, experts: 60, k: 6, masked: true },
  { op: 'loadLoss', name: 'no tokens', tokens: 0, experts: 4, k: 2 },
  { op: 'loadBalancingLoss', name: 'value', tokens: 4096, experts: 64, k: 8, bench: true },
  {
    op: 'loadBalancingLoss',
    name: 'gradient',
    tokens: 4096,
    experts: 64,
    k: 8,
    options: { gradient },
    bench: true,
  },
  { op: 'routerZLoss', name: 'gradient', tokens: 4096, experts: 64, options: { gradient }, bench: true },
  { op: 'importanceLoss', name: 'gradient', tokens: 4096, experts: 64, options: { gradient }, bench: true },
];

function outputs(r: RouterLoss): Tensor[] {
  const value = new Tensor('float64', Float64Array.of(r.value), [1]) as Tensor;
  return r.gradient === undefined ? [value] : [value, r.gradient as Tensor];
}

function prepare(shape: Shape, random: Random) {
  const { tokens, experts } = shape;
  const type = shape.type ?? 'float32';
  let values = random.normals(tokens * experts, 2);
  if (shape.options?.score === 'none') values = values.map(Math.abs);
  const logits = new Tensor(type, encodeFloats(values, type) as never, [tokens, experts]);
  const options = { ...shape.options };
  if (shape.masked) {
    const mask = Uint8Array.from({ length: tokens }, () => (random.uniform() < 0.3 ? 0 : 1));
    options.mask = new Tensor('uint8', mask, [tokens]);
  }
  const k = shape.k ?? 1;
  const { indices } = routeTopKSync(logits, { k, backend: 'reference' });
  indices.data.forEach((_, i) => {
    if (random.uniform() < 0.1) indices.data[i] = -1;
  });
  return { logits, indices, options };
}

/** Auxiliary losses and their gradients: every score and normalisation, padding, masked routes. */
export const routerLossCases: OpCase[] = shapes.map((shape) => ({
  family: 'moe',
  op: shape.op,
  name: `${shape.name} T=${shape.tokens} E=${shape.experts}${shape.k ? ` k=${shape.k}` : ''}`,
  tolerance: 1e-6,
  bytes: shape.tokens * shape.experts * (shape.options?.gradient ? 12 : 4),
  items: { unit: 'token', count: shape.tokens },
  bench: shape.bench,
  prepare(random) {
    const { logits, indices, options } = prepare(shape, random);
    const load = { ...options, numExperts: shape.experts };
    const sync = {
      loadBalancingLoss: (o: object) => loadBalancingLossSync(logits, indices, { ...options, ...o }),
      routerZLoss: (o: object) => routerZLossSync(logits, { ...options, ...o }),
      importanceLoss: (o: object) => importanceLossSync(logits, { ...options, ...o }),
      loadLoss: (o: object) => loadLossSync(indices, { ...load, ...o }),
    }[shape.op];
    const later = {
      loadBalancingLoss: (o: object) => loadBalancingLoss(logits, indices, { ...options, ...o }),
      routerZLoss: (o: object) => routerZLoss(logits, { ...options, ...o }),
      importanceLoss: (o: object) => importanceLoss(logits, { ...options, ...o }),
      loadLoss: (o: object) => loadLoss(indices, { ...load, ...o }),
    }[shape.op];
    return {
      run: (o) => outputs(sync(o)),
      runAsync: async (o) => outputs(await later(o)),
      timed: (o) => {
        const out = sync(o).gradient;
        return () => sync(out === undefined ? o : { ...o, out });
      },
    };
  },
}));
