import { encodeFloats, type FloatType } from '../../lib/dtype.ts';
import {
  type LinearActivation,
  linear,
  linearSync,
  type PackedMatrix,
  packMatrixSync,
  type WeightType,
} from '../../lib/gemm/linear.ts';
import type { OpOptions } from '../../lib/op.ts';
import { Tensor } from '../../lib/tensor.ts';
import type { OpCase } from './case.ts';

interface Shape {
  rows: number;
  n: number;
  k: number;
  type?: WeightType;
  groupSize?: number;
  bias?: boolean;
  activation?: LinearActivation;
  xType?: FloatType;
}

const shapes: Shape[] = [
  { rows: 1, n: 64, k: 52 },
  { rows: 2, n: 33, k: 17, bias: true },
  { rows: 29, n: 65, k: 100, bias: true, activation: 'silu' },
  { rows: 15, n: 31, k: 7, activation: 'gelu' },
  { rows: 15, n: 32, k: 7, activation: 'gelu-tanh' },
  { rows: 3, n: 1, k: 64, activation: 'sigmoid' },
  { rows: 3, n: 40, k: 64, activation: 'relu' },
  { rows: 3, n: 40, k: 64, activation: 'relu-squared' },
  { rows: 300, n: 40, k: 20 },
  { rows: 0, n: 40, k: 20 },
  { rows: 5, n: 40, k: 33, type: 'bfloat16', xType: 'bfloat16' },
  { rows: 31, n: 48, k: 70, type: 'int8', bias: true },
  { rows: 31, n: 48, k: 128, type: 'int4', groupSize: 64 },
  { rows: 31, n: 48, k: 96, type: 'mxfp4' },
];

/** Products with packed matrices of every type. */
export const linearCases: OpCase[] = shapes.map((s) => {
  const type = s.type ?? 'float32';
  return {
    family: 'core',
    op: 'linear',
    name: `${s.rows} x ${s.k} -> ${s.n} ${type}${s.activation ? ` ${s.activation}` : ''}${s.bias ? ' bias' : ''}`,
    tolerance: type === 'float32' ? 5e-6 : 5e-3,
    flops: 2 * s.rows * s.n * s.k,
    prepare(random) {
      const w = new Tensor('float32', random.normals(s.n * s.k, s.k ** -0.5), [s.n, s.k]);
      const xType = s.xType ?? 'float32';
      const x = new Tensor(xType, encodeFloats(random.normals(s.rows * s.k), xType) as never, [s.rows, s.k]);
      const bias = s.bias ? new Tensor('float32', random.normals(s.n), [s.n]) : undefined;
      const packed = new Map<string, PackedMatrix>();
      const pack = (o: OpOptions) => {
        const backend = o.backend ?? 'auto';
        const m = packed.get(backend) ?? packMatrixSync(w, { type, groupSize: s.groupSize, backend });
        packed.set(backend, m);
        return m;
      };
      const options = { bias, activation: s.activation };
      return {
        run: (o) => [linearSync(x, pack(o), { ...o, ...options })],
        runAsync: async (o) => [await linear(x, pack(o), { ...o, ...options })],
      };
    },
  };
});
