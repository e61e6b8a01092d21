import {
  type RotaryEmbeddingOptions,
  rotaryEmbedding,
  rotaryEmbeddingSync,
} from '../../../lib/attention/rotaryEmbedding.ts';
import { encodeFloats, type FloatType } from '../../../lib/dtype.ts';
import { type DTypeArrays, Tensor } from '../../../lib/tensor.ts';
import type { OpCase } from '../case.ts';
import { decoded } from './attention.ts';

interface RotaryShape {
  name: string;
  /** `[batch, sequence, heads, dim]`. */
  dims: [number, number, number, number];
  options?: Omit<RotaryEmbeddingOptions, 'positions' | 'out'>;
  /** Draw positions for this many axes, up to the given limit. */
  axes?: number;
  limit?: number;
  type?: FloatType;
  bench?: boolean;
}

const shapes: RotaryShape[] = [
  { name: 'Llama', dims: [2, 37, 4, 64] },
  { name: 'offset', dims: [1, 5, 2, 128], options: { offset: 131000, base: 500000 } },
  { name: 'GPT-J', dims: [1, 20, 3, 64], options: { interleaved: true, rotaryDim: 32 } },
  { name: 'partial', dims: [1, 20, 3, 80], options: { rotaryDim: 20 } },
  { name: 'odd dim', dims: [1, 9, 2, 37] },
  { name: 'd2', dims: [1, 9, 2, 2] },
  { name: 'd512', dims: [1, 3, 1, 512] },
  { name: 'far positions', dims: [2, 30, 2, 64], axes: 1, limit: 2 ** 31 - 1 },
  { name: 'Qwen2-VL', dims: [2, 30, 2, 128], options: { sections: [16, 24, 24], base: 1e6 }, axes: 3 },
  {
    name: 'V-JEPA 2',
    dims: [1, 30, 2, 64],
    options: { axes: 3, interleaved: true, tiledAngles: true },
    axes: 3,
  },
  { name: '2-D', dims: [1, 30, 2, 64], options: { axes: 2 }, axes: 2 },
  {
    name: 'YaRN',
    dims: [1, 20, 2, 64],
    options: { scaling: { type: 'yarn', factor: 16, originalLength: 4096 } },
    axes: 1,
  },
  { name: 'bf16', dims: [1, 20, 2, 64], type: 'bfloat16' },
  { name: 'fp16 interleaved', dims: [1, 20, 2, 50], type: 'float16', options: { interleaved: true } },
  { name: 'no tokens', dims: [1, 0, 2, 64] },
  { name: 'Llama', dims: [1, 4096, 32, 128], bench: true },
  { name: 'Llama', dims: [1, 4096, 32, 128], type: 'bfloat16', bench: true },
  { name: 'GPT-J', dims: [1, 4096, 16, 256], options: { interleaved: true, rotaryDim: 64 }, bench: true },
];

const TOLERANCE: Readonly<Record<FloatType, number>> = { float32: 1e-6, float16: 1e-3, bfloat16: 5e-3 };

/** Rotary cases: every layout, odd dims, positions of billions. */
export const rotaryEmbeddingCases: OpCase[] = shapes.map((shape) => {
  const { dims, type = 'float32' } = shape;
  const size = dims.reduce((a, b) => a * b, 1);
  return {
    family: 'attention',
    op: 'rotaryEmbedding',
    name: `${shape.name} [${dims}] ${type}`,
    tolerance: TOLERANCE[type],
    bytes: 2 * size * (type === 'float32' ? 4 : 2),
    bench: shape.bench,
    prepare(random) {
      const x = new Tensor(type, encodeFloats(random.normals(size), type) as DTypeArrays[FloatType], dims);
      const options: RotaryEmbeddingOptions = { ...shape.options };
      if (shape.axes) {
        const count = shape.axes * dims[0] * dims[1];
        const limit = shape.limit ?? 5000;
        const data = Int32Array.from({ length: count }, () => random.integer(0, limit));
        const lead = shape.axes === 1 ? [] : [shape.axes];
        options.positions = new Tensor('int32', data, [...lead, dims[0], dims[1]]);
      }
      return {
        run: (o) => [decoded(rotaryEmbeddingSync(x, { ...options, ...o }))],
        runAsync: async (o) => [decoded(await rotaryEmbedding(x, { ...options, ...o }))],
        timed: (o) => {
          const out = rotaryEmbeddingSync(x, { ...options, ...o });
          return () => rotaryEmbeddingSync(x, { ...options, ...o, out });
        },
      };
    },
  };
});
