import { encodeFloats, type FloatType } from '../../../lib/dtype.ts';
import { addResidual, addResidualSync } from '../../../lib/nn/addResidual.ts';
import { gelu, geluSync } from '../../../lib/nn/gelu.ts';
import { meanTokens, meanTokensSync } from '../../../lib/nn/meanTokens.ts';
import { type DTypeArrays, Tensor } from '../../../lib/tensor.ts';
import { decoded } from '../attention/attention.ts';
import type { OpCase } from '../case.ts';
import type { Random } from '../random.ts';

const TOLERANCE: Readonly<Record<FloatType, number>> = { float32: 1e-6, float16: 1e-3, bfloat16: 5e-3 };

function tensor(random: Random, dims: readonly number[], type: FloatType): Tensor<FloatType> {
  const values = random.normals(
    dims.reduce((a, b) => a * b, 1),
    2,
  );
  return new Tensor(type, encodeFloats(values, type) as DTypeArrays[FloatType], dims);
}

const sizeOf = (dims: readonly number[], type: FloatType) =>
  dims.reduce((a, b) => a * b, 1) * (type === 'float32' ? 4 : 2);

interface Shape {
  dims: number[];
  type?: FloatType;
  bench?: boolean;
}

const geluShapes: (Shape & { tanh?: boolean })[] = [
  { dims: [3, 50] },
  { dims: [1000, 77] },
  { dims: [3, 51], tanh: true },
  { dims: [0] },
  { dims: [] },
  { dims: [40, 33], type: 'bfloat16' },
  { dims: [40, 33], type: 'float16', tanh: true },
  { dims: [16384, 3072], bench: true },
];

const geluCases: OpCase[] = geluShapes.map(({ dims, type = 'float32', tanh, bench }) => ({
  family: 'nn',
  op: 'gelu',
  name: `[${dims}] ${type}${tanh ? ' tanh' : ''}`,
  tolerance: TOLERANCE[type],
  bytes: 2 * sizeOf(dims, type),
  bench,
  prepare(random) {
    const x = tensor(random, dims, type);
    const options = { approximate: tanh ? ('tanh' as const) : undefined };
    return {
      run: (o) => [decoded(geluSync(x, { ...options, ...o }))],
      runAsync: async (o) => [decoded(await gelu(x, { ...options, ...o }))],
      timed: (o) => {
        const out = geluSync(x, { ...options, ...o });
        return () => geluSync(x, { ...options, ...o, out });
      },
    };
  },
}));

const residualShapes: (Shape & { gate?: 'number' | 'one' | 'columns' })[] = [
  { dims: [3, 50] },
  { dims: [3, 50], gate: 'number' },
  { dims: [2, 5, 33], gate: 'one' },
  { dims: [2, 5, 33], gate: 'columns' },
  { dims: [3, 40000], gate: 'columns' },
  { dims: [0, 7] },
  { dims: [40, 33], type: 'bfloat16', gate: 'columns' },
  { dims: [40, 33], type: 'float16' },
  { dims: [16384, 768], bench: true },
];

const residualCases: OpCase[] = residualShapes.map(({ dims, type = 'float32', gate, bench }) => ({
  family: 'nn',
  op: 'addResidual',
  name: `[${dims}] ${type}${gate ? ` gate ${gate}` : ''}`,
  tolerance: TOLERANCE[type],
  bytes: 3 * sizeOf(dims, type),
  bench,
  prepare(random) {
    const [x, y] = [tensor(random, dims, type), tensor(random, dims, type)];
    const width = gate === 'columns' ? dims[dims.length - 1] : 1;
    const options = { gate: gate === 'number' ? 0.3 : gate && tensor(random, [width], 'float32') };
    return {
      run: (o) => [decoded(addResidualSync(x, y, { ...options, ...o }))],
      runAsync: async (o) => [decoded(await addResidual(x, y, { ...options, ...o }))],
      timed: (o) => {
        const out = addResidualSync(x, y, { ...options, ...o });
        return () => addResidualSync(x, y, { ...options, ...o, out });
      },
    };
  },
}));

const meanShapes: Shape[] = [
  { dims: [2, 10, 50] },
  { dims: [1, 1, 7] },
  { dims: [3, 200, 129] },
  { dims: [0, 4, 8] },
  { dims: [2, 130, 33], type: 'bfloat16' },
  { dims: [2, 5, 20], type: 'float16' },
  { dims: [8, 1568, 768], bench: true },
];

const meanCases: OpCase[] = meanShapes.map(({ dims, type = 'float32', bench }) => ({
  family: 'nn',
  op: 'meanTokens',
  name: `[${dims}] ${type}`,
  tolerance: TOLERANCE[type],
  bytes: sizeOf(dims, type),
  bench,
  prepare(random) {
    const x = tensor(random, dims, type);
    return {
      run: (o) => [decoded(meanTokensSync(x, o))],
      runAsync: async (o) => [decoded(await meanTokens(x, o))],
      timed: (o) => {
        const out = meanTokensSync(x, o);
        return () => meanTokensSync(x, { ...o, out });
      },
    };
  },
}));

/** What stands between the products of a transformer block. */
export const elementwiseCases: OpCase[] = [...geluCases, ...residualCases, ...meanCases];
