import { expertCapacity } from '../../../lib/moe/expertCapacity.ts';
import {
  type DispatchPlan,
  type DropRule,
  type PlanDispatchOptions,
  planDispatch,
  planDispatchSync,
} from '../../../lib/moe/planDispatch.ts';
import { Tensor } from '../../../lib/tensor.ts';
import type { OpCase } from '../case.ts';
import type { Random } from '../random.ts';

interface Shape {
  name: string;
  tokens: number;
  experts: number;
  k: number;
  drop?: DropRule;
  factor?: number;
  capacity?: number;
  /** Share of routes that are -1. */
  masked?: number;
  /** Skews the load: ids are drawn as the square of a uniform number. */
  skewed?: boolean;
  /** Weights with many ties and some NaN. */
  coarse?: boolean;
  /** Global experts, every second one local. */
  global?: number;
  bench?: boolean;
}

const shapes: Shape[] = [
  { name: 'dropless', tokens: 67, experts: 8, k: 2 },
  { name: 'skewed', tokens: 130, experts: 60, k: 6, skewed: true },
  { name: 'masked', tokens: 97, experts: 16, k: 3, masked: 0.3 },
  { name: 'all masked', tokens: 9, experts: 4, k: 2, masked: 1 },
  { name: 'position', tokens: 90, experts: 12, k: 3, drop: 'position', factor: 1, skewed: true, masked: 0.1 },
  { name: 'slot', tokens: 90, experts: 12, k: 3, drop: 'slot', factor: 1, skewed: true, masked: 0.1 },
  { name: 'weight', tokens: 90, experts: 12, k: 3, drop: 'weight', factor: 1, skewed: true, masked: 0.1 },
  {
    name: 'batch-priority',
    tokens: 90,
    experts: 12,
    k: 3,
    drop: 'batch-priority',
    factor: 0.8,
    skewed: true,
  },
  { name: 'weight, ties and NaN', tokens: 90, experts: 5, k: 2, drop: 'weight', factor: 0.6, coarse: true },
  {
    name: 'batch-priority, ties and NaN',
    tokens: 90,
    experts: 5,
    k: 2,
    drop: 'batch-priority',
    factor: 0.6,
    coarse: true,
  },
  { name: 'capacity 0', tokens: 11, experts: 5, k: 2, drop: 'slot', capacity: 0 },
  { name: 'capacity never reached', tokens: 11, experts: 5, k: 2, drop: 'weight', capacity: 1000 },
  { name: 'expert map', tokens: 70, experts: 4, k: 3, global: 8 },
  { name: 'expert map, slot', tokens: 70, experts: 4, k: 3, global: 8, drop: 'slot', factor: 0.3 },
  { name: 'one expert', tokens: 30, experts: 1, k: 1 },
  { name: 'empty experts', tokens: 3, experts: 257, k: 2 },
  { name: 'no tokens', tokens: 0, experts: 8, k: 2, drop: 'position', capacity: 3 },
  { name: 'several chunks', tokens: 9000, experts: 32, k: 4, skewed: true, masked: 0.05 },
  {
    name: 'several chunks, weight',
    tokens: 9000,
    experts: 32,
    k: 4,
    skewed: true,
    drop: 'weight',
    factor: 1,
  },
  { name: 'E = 4096', tokens: 2600, experts: 4096, k: 8, drop: 'slot', factor: 1 },
  { name: 'dropless', tokens: 1, experts: 128, k: 8, bench: true },
  { name: 'dropless', tokens: 4096, experts: 128, k: 8, bench: true },
  { name: 'dropless', tokens: 32768, experts: 256, k: 8, bench: true },
  { name: 'position', tokens: 4096, experts: 64, k: 8, drop: 'position', factor: 1, bench: true },
  { name: 'weight', tokens: 4096, experts: 64, k: 8, drop: 'weight', factor: 1, bench: true },
  { name: 'batch-priority', tokens: 4096, experts: 64, k: 8, drop: 'batch-priority', factor: 1, bench: true },
];

function outputs(p: DispatchPlan): Tensor[] {
  return [p.order, p.offsets, p.inverse, p.dropped] as Tensor[];
}

function prepare(shape: Shape, random: Random) {
  const { tokens, experts, k } = shape;
  const ids = shape.global ?? experts;
  const data = Int32Array.from({ length: tokens * k }, () => {
    const u = random.uniform();
    if (random.uniform() < (shape.masked ?? 0)) return -1;
    return Math.floor((shape.skewed ? u * u : u) * ids);
  });
  const options: PlanDispatchOptions = { numExperts: experts };
  if (shape.drop) {
    options.drop = shape.drop;
    options.capacity =
      shape.capacity ??
      expertCapacity({ tokens, k, numExperts: experts, factor: shape.factor ?? 1, style: 'megatron' });
  }
  if (shape.drop === 'weight' || shape.drop === 'batch-priority') {
    const weights = Float32Array.from({ length: tokens * k }, () => {
      const u = random.uniform();
      if (!shape.coarse) return u;
      return u < 0.1 ? NaN : Math.round(u * 4) / 4;
    });
    options.weights = new Tensor('float32', weights, [tokens, k]);
  }
  if (shape.global) {
    options.expertMap = Int32Array.from({ length: shape.global }, (_, i) => (i % 2 === 0 ? i / 2 : -1));
  }
  return { indices: new Tensor('int32', data, [tokens, k]), options };
}

/** Dispatch plans: every drop rule, skewed loads, masks and maps, more than one chunk. Integers: no tolerance. */
export const planDispatchCases: OpCase[] = shapes.map((shape) => ({
  family: 'moe',
  op: 'planDispatch',
  name: `${shape.name} T=${shape.tokens} E=${shape.experts} k=${shape.k}`,
  tolerance: 0,
  bytes: shape.tokens * shape.k * 16,
  items: { unit: 'token', count: shape.tokens },
  bench: shape.bench,
  prepare(random) {
    const { indices, options } = prepare(shape, random);
    return {
      run: (o) => outputs(planDispatchSync(indices, { ...options, ...o })),
      runAsync: async (o) => outputs(await planDispatch(indices, { ...options, ...o })),
    };
  },
}));
