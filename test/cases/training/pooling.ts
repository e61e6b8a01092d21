import type { Steps } from '../../../lib/checkpoint/steps.ts';
import { outputSize } from '../../../lib/privacy/convGeometry.ts';
import { Tensor } from '../../../lib/tensor.ts';
import type { RunOptions } from '../../../lib/training/ops/perform.ts';
import { type PoolingShape, pooling, poolingBackward } from '../../../lib/training/ops/pooling.ts';
import type { OpCase } from '../case.ts';
import { normal, preparedSteps } from './steps.ts';

interface Shape {
  name: string;
  input: number[];
  kernel: number[];
  stride: number[];
  padding: number[];
  bench?: boolean;
}

const shapes: Shape[] = [
  { name: 'overlapping', input: [2, 3, 14, 13], kernel: [2, 2], stride: [1, 1], padding: [0, 0] },
  { name: 'padding, a rest', input: [2, 2, 7, 8], kernel: [3, 2], stride: [2, 3], padding: [1, 1] },
  { name: 'whole plane', input: [1, 4, 5, 6], kernel: [5, 6], stride: [1, 1], padding: [0, 0] },
  { name: 'no samples', input: [0, 4, 5, 6], kernel: [2, 2], stride: [2, 2], padding: [0, 0] },
  {
    name: 'Fashion-MNIST',
    input: [64, 16, 14, 14],
    kernel: [2, 2],
    stride: [1, 1],
    padding: [0, 0],
    bench: true,
  },
];

function caseOf(s: Shape, average: boolean): OpCase {
  const [samples, channels, ...size] = s.input;
  const { kernel, stride, padding } = s;
  const outSize = size.map((n, i) => outputSize(n, kernel[i], stride[i], padding[i]));
  const shape: PoolingShape = { average, planes: samples * channels, size, outSize, kernel, stride, padding };
  return {
    family: 'training',
    op: 'pooling',
    name: `${average ? 'average' : 'max'}, forward and back, ${s.name} [${s.input.join(', ')}]`,
    tolerance: 1e-6,
    items: { unit: 'sample', count: samples },
    bench: s.bench,
    prepare(random) {
      const x = normal(random, s.input);
      // Ties go to the first; a NaN wins.
      for (let i = 0; i + 1 < Math.min(40, x.size); i += 4) x.data[i + 1] = x.data[i];
      if (x.size > 60) x.data[60] = Number.NaN;
      const g = normal(random, [samples, channels, ...outSize]);
      const run = function* (o: RunOptions): Steps<Tensor[]> {
        const { output, index } = yield* pooling(x, shape, o);
        const back = yield* poolingBackward(g, index, shape, o);
        return index === null ? [output, back] : [output, back, new Tensor('int32', index, [index.length])];
      };
      return preparedSteps(run);
    },
  };
}

/** Max and average pooling with ties, NaN and padding. */
export const poolingCases: OpCase[] = [
  ...shapes.map((s) => caseOf(s, false)),
  ...shapes.map((s) => caseOf(s, true)),
];
