import {
  addNoise,
  addNoiseSync,
  gaussianNoise,
  gaussianNoiseSync,
} from '../../../lib/privacy/gaussianNoise.ts';
import { makeTensor, Tensor } from '../../../lib/tensor.ts';
import type { OpCase } from '../case.ts';

interface Shape {
  name: string;
  dims: number[];
  step: number;
  offset: number;
  add?: boolean;
  bench?: boolean;
}

const shapes: Shape[] = [
  { name: 'whole groups', dims: [4, 512], step: 0, offset: 0 },
  { name: 'shard in the middle of a group', dims: [1001], step: 7, offset: 77 },
  { name: 'inside one group', dims: [3], step: 7, offset: 130 },
  { name: 'high step and offset', dims: [300], step: 2 ** 40 + 3, offset: 2 ** 45 + 11 },
  { name: 'counter wraps', dims: [512], step: 1, offset: 2 ** 35 - 256 },
  { name: 'empty', dims: [0], step: 1, offset: 5 },
  { name: 'added', dims: [777], step: 1, offset: 5, add: true },
  { name: 'GPT-2 small layer', dims: [768, 3072], step: 1, offset: 0, bench: true },
  { name: 'added', dims: [768, 3072], step: 1, offset: 0, add: true, bench: true },
];

/** Noise and added noise, at every alignment. */
export const gaussianNoiseCases: OpCase[] = shapes.map((s) => {
  const count = s.dims.reduce((a, b) => a * b, 1);
  return {
    family: 'privacy',
    op: s.add ? 'addNoise' : 'gaussianNoise',
    name: `${s.name} [${s.dims.join(', ')}] step ${s.step} offset ${s.offset}`,
    tolerance: 1e-6,
    bytes: 4 * count * (s.add ? 2 : 1),
    items: { unit: 'sample', count },
    bench: s.bench,
    prepare(random) {
      const key = Uint8Array.from({ length: 32 }, () => random.integer(0, 255));
      const values = random.normals(count);
      const options = { key, step: s.step, offset: s.offset, stddev: 1.5 };
      const fresh = () => makeTensor('float32', values.slice(), s.dims);
      return {
        run: (o) => [
          s.add
            ? addNoiseSync(fresh(), { ...options, ...o })
            : gaussianNoiseSync(s.dims, { ...options, ...o }),
        ],
        runAsync: async (o) => [
          await (s.add
            ? addNoise(fresh(), { ...options, ...o })
            : gaussianNoise(s.dims, { ...options, ...o })),
        ],
        timed: (o) => {
          const out = new Tensor('float32', new Float32Array(count), s.dims);
          return s.add
            ? () => addNoiseSync(out, { ...options, ...o })
            : () => gaussianNoiseSync(s.dims, { ...options, ...o, out });
        },
      };
    },
  };
});
