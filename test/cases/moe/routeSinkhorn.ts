import { encodeFloats, type FloatType } from '../../../lib/dtype.ts';
import {
  routeSinkhorn,
  routeSinkhornSync,
  type SinkhornOptions,
  type SinkhornRouting,
} from '../../../lib/moe/routeSinkhorn.ts';
import { Tensor } from '../../../lib/tensor.ts';
import type { OpCase } from '../case.ts';

interface Shape {
  name: string;
  tokens: number;
  experts: number;
  options: Omit<SinkhornOptions, 'out'>;
  spread?: number;
  type?: FloatType;
  bench?: boolean;
}

const shapes: Shape[] = [
  { name: 'top-1', tokens: 67, experts: 8, options: { k: 1 } },
  { name: 'top-3', tokens: 130, experts: 60, options: { k: 3 } },
  { name: 'sigmoid weights', tokens: 70, experts: 33, options: { k: 4, score: 'sigmoid' } },
  { name: 'evaluation', tokens: 70, experts: 33, options: { k: 4, training: false } },
  { name: 'three iterations', tokens: 70, experts: 33, options: { k: 2, maxIterations: 3 } },
  { name: 'tight', tokens: 80, experts: 20, options: { k: 2, tolerance: 1e-3, epsilon: 1e-6 } },
  { name: 'large logits', tokens: 80, experts: 20, options: { k: 2 }, spread: 2000 },
  { name: 'bf16', tokens: 70, experts: 40, options: { k: 2 }, type: 'bfloat16' },
  { name: 'fp16', tokens: 70, experts: 41, options: { k: 2 }, type: 'float16' },
  { name: 'one expert', tokens: 20, experts: 1, options: { k: 1 } },
  { name: 'k = E', tokens: 12, experts: 9, options: { k: 9 } },
  { name: 'no tokens', tokens: 0, experts: 9, options: { k: 2 } },
  { name: 'many experts', tokens: 40, experts: 1030, options: { k: 5 } },
  { name: 'several blocks', tokens: 1000, experts: 24, options: { k: 2 } },
  { name: 'top-1', tokens: 4096, experts: 64, options: { k: 1 }, bench: true },
];

function outputs(r: SinkhornRouting): Tensor[] {
  const report = new Tensor('int32', Int32Array.from([r.iterations, r.converged ? 1 : 0]), [2]);
  return [r.indices, r.weights, report] as Tensor[];
}

/** Sinkhorn routing: both weight rules, limits on the scaling, logits far beyond the range of exp. */
export const routeSinkhornCases: OpCase[] = shapes.map((shape) => {
  const { tokens, experts } = shape;
  const type = shape.type ?? 'float32';
  return {
    family: 'moe',
    op: 'routeSinkhorn',
    name: `${shape.name} T=${tokens} E=${experts} k=${shape.options.k}`,
    tolerance: 1e-6,
    bytes: tokens * (experts * (type === 'float32' ? 4 : 2) + shape.options.k * 8),
    items: { unit: 'token', count: tokens },
    bench: shape.bench,
    prepare(random) {
      const values = random.normals(tokens * experts, shape.spread ?? 2);
      const logits = new Tensor(type, encodeFloats(values, type) as never, [tokens, experts]);
      return {
        run: (o) => outputs(routeSinkhornSync(logits, { ...shape.options, ...o })),
        runAsync: async (o) => outputs(await routeSinkhorn(logits, { ...shape.options, ...o })),
        timed: (o) => {
          const { indices, weights } = routeSinkhornSync(logits, { ...shape.options, ...o });
          return () => routeSinkhornSync(logits, { ...shape.options, ...o, out: { indices, weights } });
        },
      };
    },
  };
});
