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
  /** Discrete noise on a grid of this step; a standard deviation of 1.5 unless given. */
  granularity?: number;
  stddev?: number;
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
  { name: 'discrete', dims: [3, 41], step: 7, offset: 77, granularity: 2 ** -20 },
  { name: 'discrete, one step of the grid', dims: [200], step: 7, offset: 1, granularity: 2 },
  { name: 'discrete, coarse', dims: [200], step: 7, offset: 1, granularity: 0.25, add: true },
  { name: 'discrete, finest', dims: [90], step: 3, offset: 2 ** 40 - 40, granularity: 2 ** -22 },
  {
    name: 'discrete, not a power of two',
    dims: [200],
    step: 2 ** 33,
    offset: 3,
    granularity: 2 ** -9,
    stddev: 1.2345,
  },
  { name: 'discrete, added', dims: [777], step: 1, offset: 5, granularity: 2 ** -18, add: true },
  { name: 'discrete, counter wraps', dims: [40], step: 1, offset: 2 ** 32 - 20, granularity: 2 ** -18 },
  { name: 'discrete, no noise', dims: [99], step: 1, offset: 5, granularity: 0.125, stddev: 0, add: true },
  { name: 'discrete, empty', dims: [0], step: 1, offset: 5, granularity: 1 },
  { name: 'GPT-2 small layer', dims: [768, 3072], step: 1, offset: 0, bench: true },
  { name: 'added', dims: [768, 3072], step: 1, offset: 0, add: true, bench: true },
  { name: 'discrete', dims: [768, 3072], step: 1, offset: 0, granularity: 2 ** -20, bench: true },
];

/** Noise and added noise, at every alignment. */
export const gaussianNoiseCases: OpCase[] = shapes.map((s) => {
  const count = s.dims.reduce((a, b) => a * b, 1);
  return {
    family: 'privacy',
    op: s.add ? 'addNoise' : 'gaussianNoise',
    name: `${s.name} [${s.dims.join(', ')}] step ${s.step} offset ${s.offset}`,
    // Integers are equal everywhere.
    tolerance: s.granularity === undefined ? 1e-6 : 0,
    bytes: 4 * count * (s.add ? 2 : 1),
    items: { unit: 'sample', count },
    bench: s.bench,
    ...(s.bench && !s.add ? { peers: { pytorch: { op: 'randn', count } } } : {}),
    prepare(random) {
      const key = Uint8Array.from({ length: 32 }, () => random.integer(0, 255));
      const values = random.normals(count);
      const { step, offset, stddev = 1.5, granularity } = s;
      const discrete = granularity === undefined ? {} : { mode: 'discrete' as const, granularity };
      const options = { key, step, offset, stddev, ...discrete };
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
