import type { Steps } from '../../../lib/checkpoint/steps.ts';
import { product, Tensor } from '../../../lib/tensor.ts';
import { type GroupNormShape, groupNorm, groupNormBackward } from '../../../lib/training/ops/groupNorm.ts';
import type { RunOptions } from '../../../lib/training/ops/perform.ts';
import type { OpCase } from '../case.ts';
import { normal, preparedSteps } from './steps.ts';

interface Shape {
  name: string;
  dims: number[];
  groups: number;
  shift?: number;
  bias?: boolean;
  bench?: boolean;
}

const shapes: Shape[] = [
  { name: 'images', dims: [3, 6, 5, 7], groups: 2 },
  { name: 'no bias', dims: [2, 6, 33], groups: 3, bias: false },
  { name: 'one group', dims: [2, 5, 4, 4], groups: 1 },
  { name: 'one channel per group', dims: [2, 5, 17], groups: 5 },
  { name: 'features alone', dims: [4, 40], groups: 4 },
  { name: 'long rows far from zero', dims: [1, 2, 70, 70], groups: 1, shift: 300 },
  { name: 'no samples', dims: [0, 4, 3], groups: 2 },
  { name: 'ResNet', dims: [16, 128, 28, 28], groups: 32, bench: true },
];

/** Group normalisation, forward and back. */
export const groupNormCases: OpCase[] = shapes.map((s) => ({
  family: 'training',
  op: 'groupNorm',
  name: `forward and back, ${s.name} [${s.dims.join(', ')}] in ${s.groups}`,
  // A mean of 300 costs the float32 input itself digits: x̂ then carries 300 ε.
  tolerance: s.shift === undefined ? 2e-6 : 4e-5,
  bytes: 4 * 6 * product(s.dims),
  bench: s.bench,
  prepare(random) {
    const [samples, channels, ...rest] = s.dims;
    const shape: GroupNormShape = {
      samples,
      channels,
      spatial: product(rest),
      groups: s.groups,
      epsilon: 1e-5,
    };
    const x = normal(random, s.dims);
    for (let i = 0; i < x.size; i++) x.data[i] += s.shift ?? 0;
    const g = normal(random, s.dims);
    const weight = normal(random, [channels]);
    const bias = s.bias === false ? null : normal(random, [channels]);
    const run = function* (o: RunOptions): Steps<Tensor[]> {
      const kept = yield* groupNorm(x, weight, bias, shape, o);
      const back = yield* groupNormBackward(g, weight, kept, shape, o);
      return [kept.output, kept.normalized, new Tensor('float32', kept.rstd, [kept.rstd.length]), back];
    };
    return preparedSteps(run);
  },
}));
