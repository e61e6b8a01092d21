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
import type { Random } from './random.ts';

interface Shape {
  rows: number;
  n: number;
  k: number;
  type?: WeightType;
  groupSize?: number;
  /** int4 with zero points. */
  zeros?: boolean;
  /** int4 with the scale search: plain, or weighted by a calibration. */
  search?: 'plain' | 'calibrated';
  /** Source in float8_e4m3 with block scales. */
  float8?: boolean;
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
  { rows: 3, n: 40, k: 64, activation: 'tanh' },
  { rows: 3, n: 40, k: 64, activation: 'relu' },
  { rows: 3, n: 40, k: 64, activation: 'relu-squared' },
  { rows: 300, n: 40, k: 20 },
  { rows: 0, n: 40, k: 20 },
  { rows: 5, n: 40, k: 33, type: 'bfloat16', xType: 'bfloat16' },
  { rows: 31, n: 48, k: 70, type: 'int8', bias: true },
  { rows: 31, n: 48, k: 128, type: 'int4', groupSize: 64 },
  { rows: 31, n: 48, k: 96, type: 'mxfp4' },
  { rows: 31, n: 48, k: 96, type: 'int4', zeros: true },
  { rows: 3, n: 33, k: 192, type: 'int4', groupSize: 64, zeros: true },
  { rows: 17, n: 70, k: 256, type: 'int4', groupSize: 128, zeros: true, search: 'calibrated' },
  { rows: 9, n: 48, k: 96, type: 'int4', search: 'plain' },
  { rows: 9, n: 48, k: 128, type: 'int4', groupSize: 64, search: 'calibrated' },
  { rows: 1, n: 33, k: 5, type: 'float8' },
  { rows: 29, n: 300, k: 131, type: 'float8', bias: true, activation: 'silu' },
  { rows: 16, n: 260, k: 384, float8: true },
  { rows: 5, n: 130, k: 129, float8: true, xType: 'bfloat16' },
  { rows: 5, n: 40, k: 160, float8: true, type: 'int8' },
  { rows: 5, n: 40, k: 160, float8: true, type: 'bfloat16' },
  // Routers: few outputs of many inputs.
  { rows: 9, n: 40, k: 608, bias: true, activation: 'sigmoid' },
  { rows: 3, n: 1, k: 1030 },
  { rows: 2, n: 33, k: 2080, type: 'int4', zeros: true, bias: true },
  { rows: 2, n: 20, k: 2112, type: 'int8' },
  { rows: 2, n: 20, k: 1100, type: 'float8', activation: 'tanh' },
];

/** Options, and what a name says of them. */
function variantOf(s: Shape): string {
  const words: string[] = [s.type ?? (s.float8 ? 'float8' : 'float32')];
  if (s.zeros) words.push('zero points');
  if (s.search) words.push(`search ${s.search}`);
  if (s.float8) words.push('from float8');
  return words.join(', ');
}

/** E4M3 codes without NaN, with the scales of their blocks. */
export function float8Source(
  random: Random,
  n: number,
  k: number,
): { weight: Tensor<'float8_e4m3'>; scale: Tensor<'float32'> } {
  const codes = Uint8Array.from(
    { length: n * k },
    () => random.integer(0, 126) | (random.integer(0, 1) << 7),
  );
  const blocks = [Math.ceil(n / 128), Math.ceil(k / 128)];
  const scale = Float32Array.from({ length: blocks[0] * blocks[1] }, () => 2e-4 * (0.5 + random.uniform()));
  return { weight: new Tensor('float8_e4m3', codes, [n, k]), scale: new Tensor('float32', scale, blocks) };
}

/** Products with packed matrices of every type. */
export const linearCases: OpCase[] = shapes.map((s) => {
  const type = s.type ?? (s.float8 ? 'float8' : 'float32');
  return {
    family: 'core',
    op: 'linear',
    name: `${s.rows} x ${s.k} -> ${s.n} ${variantOf(s)}${s.activation ? ` ${s.activation}` : ''}${s.bias ? ' bias' : ''}`,
    tolerance: type === 'float32' || type === 'float8' ? 5e-6 : 5e-3,
    flops: 2 * s.rows * s.n * s.k,
    prepare(random) {
      const values = random.normals(s.n * s.k, s.k ** -0.5);
      // Zero points matter where a group's mean is not zero.
      if (s.zeros) for (let i = 0; i < values.length; i++) values[i] += ((i >> 5) % 5) * 0.5 * s.k ** -0.5;
      const float8 = s.float8 ? float8Source(random, s.n, s.k) : undefined;
      const w = float8?.weight ?? new Tensor('float32', values, [s.n, s.k]);
      const calibration =
        s.search === 'calibrated'
          ? Float32Array.from({ length: s.k }, () => random.uniform() ** 4)
          : undefined;
      const rounding = {
        type: s.type,
        groupSize: s.groupSize,
        symmetric: s.zeros ? false : undefined,
        search: s.search ? true : undefined,
        calibration,
        scale: float8?.scale,
      };
      const xType = s.xType ?? 'float32';
      const x = new Tensor(xType, encodeFloats(random.normals(s.rows * s.k), xType) as never, [s.rows, s.k]);
      const bias = s.bias ? new Tensor('float32', random.normals(s.n), [s.n]) : undefined;
      const packed = new Map<string, PackedMatrix>();
      const pack = (o: OpOptions) => {
        const backend = o.backend ?? 'auto';
        const m = packed.get(backend) ?? packMatrixSync(w, { ...rounding, backend });
        packed.set(backend, m);
        return m;
      };
      const options = { bias, activation: s.activation };
      return {
        run: (o) => [linearSync(x, pack(o), { ...o, ...options })],
        runAsync: async (o) => [await linear(x, pack(o), { ...o, ...options })],
        dispose: () => {
          for (const m of packed.values()) m.dispose();
          packed.clear();
        },
      };
    },
  };
});
