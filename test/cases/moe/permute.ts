import { encodeFloats, type FloatType } from '../../../lib/dtype.ts';
import { permute, permuteSync } from '../../../lib/moe/permute.ts';
import { planDispatchSync } from '../../../lib/moe/planDispatch.ts';
import { Tensor } from '../../../lib/tensor.ts';
import type { OpCase } from '../case.ts';
import type { Random } from '../random.ts';

interface Shape {
  tokens: number;
  width: number;
  experts: number;
  k: number;
  type?: FloatType;
  masked?: boolean;
  capacity?: number;
  bench?: boolean;
}

const shapes: Shape[] = [
  { tokens: 23, width: 37, experts: 8, k: 2 },
  { tokens: 23, width: 1, experts: 5, k: 3, masked: true },
  { tokens: 40, width: 65, experts: 6, k: 2, capacity: 9, masked: true },
  { tokens: 33, width: 50, experts: 7, k: 4, type: 'bfloat16' },
  { tokens: 33, width: 51, experts: 7, k: 4, type: 'float16' },
  { tokens: 0, width: 16, experts: 4, k: 2 },
  { tokens: 5, width: 0, experts: 4, k: 2 },
  { tokens: 600, width: 700, experts: 16, k: 2 },
  { tokens: 4096, width: 2048, experts: 64, k: 8, bench: true },
  { tokens: 4096, width: 2048, experts: 64, k: 8, type: 'bfloat16', bench: true },
];

/** A plan over random ids, for the cases of permute and combine. */
export function randomPlan(shape: Omit<Shape, 'width'>, random: Random) {
  const data = Int32Array.from({ length: shape.tokens * shape.k }, () =>
    shape.masked && random.uniform() < 0.2 ? -1 : random.integer(0, shape.experts - 1),
  );
  const indices = new Tensor('int32', data, [shape.tokens, shape.k]);
  return planDispatchSync(indices, {
    numExperts: shape.experts,
    capacity: shape.capacity,
    backend: 'reference',
  });
}

/** Token rows into expert order: copies, so compared bit by bit. */
export const permuteCases: OpCase[] = shapes.map((shape) => {
  const type = shape.type ?? 'float32';
  const bytes = type === 'float32' ? 4 : 2;
  return {
    family: 'moe',
    op: 'permute',
    name: `${type} T=${shape.tokens} d=${shape.width} E=${shape.experts} k=${shape.k}${shape.capacity ? ` C=${shape.capacity}` : ''}`,
    tolerance: 0,
    bytes: 2 * shape.tokens * shape.k * shape.width * bytes,
    items: { unit: 'token', count: shape.tokens },
    bench: shape.bench,
    prepare(random) {
      const plan = randomPlan(shape, random);
      const values = random.normals(shape.tokens * shape.width);
      const x = new Tensor(type, encodeFloats(values, type) as never, [shape.tokens, shape.width]);
      return {
        run: (o) => [permuteSync(x, plan, o) as Tensor],
        runAsync: async (o) => [(await permute(x, plan, o)) as Tensor],
        compare: ([a], [e]) => {
          const same = a.data.length === e.data.length && a.data.every((v, i) => v === e.data[i]);
          return same
            ? { relative: 0, ulp: 0, mismatches: 0 }
            : { relative: 1, ulp: 1, mismatches: 1, detail: 'rows differ' };
        },
        timed: (o) => {
          const out = permuteSync(x, plan, o);
          return () => permuteSync(x, plan, { ...o, out });
        },
      };
    },
  };
});
