import { decodeFloats, encodeFloats, type FloatType } from '../../../lib/dtype.ts';
import { combine, combineSync } from '../../../lib/moe/combine.ts';
import { Tensor } from '../../../lib/tensor.ts';
import { type Comparison, compareOutputs, type OpCase } from '../case.ts';
import { randomPlan } from './permute.ts';

interface Shape {
  tokens: number;
  width: number;
  experts: number;
  k: number;
  type?: FloatType;
  wide?: boolean;
  masked?: boolean;
  capacity?: number;
  unweighted?: boolean;
  bench?: boolean;
}

const shapes: Shape[] = [
  { tokens: 23, width: 37, experts: 8, k: 2 },
  { tokens: 23, width: 1, experts: 5, k: 3, masked: true },
  { tokens: 40, width: 131, experts: 6, k: 2, capacity: 9, masked: true },
  { tokens: 31, width: 64, experts: 40, k: 32 },
  { tokens: 31, width: 77, experts: 9, k: 4, unweighted: true },
  { tokens: 33, width: 83, experts: 7, k: 4, type: 'bfloat16' },
  { tokens: 33, width: 83, experts: 7, k: 4, type: 'bfloat16', wide: true },
  { tokens: 33, width: 83, experts: 7, k: 4, type: 'float16' },
  { tokens: 33, width: 83, experts: 7, k: 4, type: 'float16', wide: true },
  { tokens: 0, width: 16, experts: 4, k: 2 },
  { tokens: 5, width: 0, experts: 4, k: 2 },
  { tokens: 300, width: 700, experts: 16, k: 2 },
  { tokens: 4096, width: 2048, experts: 64, k: 8, bench: true },
  { tokens: 4096, width: 2048, experts: 64, k: 8, type: 'bfloat16', bench: true },
];

/**
 * Half results: each element must be the rounding of a value within 1e-6 (of the result's root mean square) of the
 * exact sum, so that only a sum beside a rounding boundary may come out one step apart.
 */
function compareRounded(actual: Tensor, exact: Tensor): Comparison {
  const values = exact.data as Float32Array;
  const slack = 1e-6 * Math.sqrt(values.reduce((a, b) => a + b * b, 0) / Math.max(1, values.length));
  const type = actual.type as FloatType;
  const low = decodeFloats(
    encodeFloats(
      values.map((v) => v - slack),
      type,
    ),
    type,
  );
  const high = decodeFloats(
    encodeFloats(
      values.map((v) => v + slack),
      type,
    ),
    type,
  );
  const result: Comparison = { relative: 0, ulp: 0, mismatches: 0 };
  decodeFloats(actual.data, type).forEach((v, i) => {
    if (v >= low[i] && v <= high[i]) return;
    result.mismatches++;
    result.detail ??= `output[${i}]: ${v}, expected the rounding of ${values[i]}`;
  });
  return result;
}

/** Expert outputs back to tokens: every row type, dropped and masked routes, many slots. */
export const combineCases: OpCase[] = shapes.map((shape) => {
  const type = shape.type ?? 'float32';
  const bytes = type === 'float32' ? 4 : 2;
  return {
    family: 'moe',
    op: 'combine',
    name: `${type}${shape.wide ? ' to float32' : ''}${shape.unweighted ? ' unweighted' : ''} T=${shape.tokens} d=${shape.width} E=${shape.experts} k=${shape.k}${shape.capacity ? ` C=${shape.capacity}` : ''}`,
    tolerance: 1e-6,
    flops: 2 * shape.tokens * shape.k * shape.width,
    bytes: shape.tokens * (shape.k + 1) * shape.width * bytes,
    items: { unit: 'token', count: shape.tokens },
    bench: shape.bench,
    prepare(random) {
      const plan = randomPlan(shape, random);
      const routes = plan.order.dims[0];
      const values = random.normals(routes * shape.width);
      const y = new Tensor(type, encodeFloats(values, type) as never, [routes, shape.width]);
      const weights = shape.unweighted
        ? undefined
        : new Tensor('float32', random.normals(shape.tokens * shape.k), [shape.tokens, shape.k]);
      const options = shape.wide ? { outType: 'float32' as const } : {};
      return {
        run: (o) => [combineSync(y, plan, weights, { ...options, ...o }) as Tensor],
        runAsync: async (o) => [(await combine(y, plan, weights, { ...options, ...o })) as Tensor],
        compare: ([a], [e]) => {
          if (a.type === 'float32') return compareOutputs([a], [e]);
          return compareRounded(
            a,
            combineSync(y, plan, weights, { backend: 'reference', outType: 'float32' }) as Tensor,
          );
        },
        timed: (o) => {
          const out = combineSync(y, plan, weights, { ...options, ...o });
          return () => combineSync(y, plan, weights, { ...options, ...o, out });
        },
      };
    },
  };
});
