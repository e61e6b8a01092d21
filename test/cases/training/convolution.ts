import type { Steps } from '../../../lib/checkpoint/steps.ts';
import { outputSize } from '../../../lib/privacy/convGeometry.ts';
import { product, type Tensor } from '../../../lib/tensor.ts';
import {
  type ConvolutionShape,
  convolution,
  convolutionInputGradient,
} from '../../../lib/training/ops/convolution.ts';
import type { RunOptions } from '../../../lib/training/ops/perform.ts';
import type { OpCase } from '../case.ts';
import { normal, preparedSteps } from './steps.ts';

interface Shape {
  name: string;
  /** `[B, C_in, …]`. */
  input: number[];
  outChannels: number;
  kernel: number[];
  stride?: number[];
  padding?: number[];
  dilation?: number[];
  groups?: number;
  bench?: boolean;
}

const shapes: Shape[] = [
  {
    name: '1 axis',
    input: [3, 5, 23],
    outChannels: 7,
    kernel: [4],
    stride: [3],
    padding: [2],
    dilation: [2],
  },
  { name: '2 axes', input: [3, 4, 9, 11], outChannels: 6, kernel: [3, 3], padding: [1, 1] },
  { name: 'MNIST', input: [2, 1, 28, 28], outChannels: 16, kernel: [8, 8], stride: [2, 2], padding: [3, 3] },
  { name: 'stride leaves a rest', input: [2, 16, 13, 13], outChannels: 33, kernel: [4, 4], stride: [2, 2] },
  { name: 'groups', input: [2, 6, 7, 5], outChannels: 9, kernel: [2, 3], groups: 3, padding: [1, 0] },
  { name: 'depthwise', input: [2, 4, 6, 6], outChannels: 8, kernel: [3, 3], groups: 4 },
  { name: 'pointwise', input: [2, 40, 3, 3], outChannels: 70, kernel: [1, 1] },
  {
    name: '3 axes',
    input: [2, 2, 4, 5, 6],
    outChannels: 4,
    kernel: [2, 3, 2],
    stride: [2, 1, 1],
    padding: [1, 0, 2],
    dilation: [1, 2, 1],
    groups: 2,
  },
  { name: 'one of everything', input: [1, 1, 1], outChannels: 1, kernel: [1] },
  { name: 'no samples', input: [0, 2, 5], outChannels: 2, kernel: [3] },
  {
    name: 'Fashion-MNIST 1',
    input: [16, 1, 28, 28],
    outChannels: 16,
    kernel: [8, 8],
    stride: [2, 2],
    padding: [3, 3],
    bench: true,
  },
  {
    name: 'Fashion-MNIST 2',
    input: [16, 16, 13, 13],
    outChannels: 32,
    kernel: [4, 4],
    stride: [2, 2],
    bench: true,
  },
  {
    name: 'ResNet',
    input: [1, 32, 28, 28],
    outChannels: 32,
    kernel: [3, 3],
    padding: [1, 1],
    bench: true,
  },
];

function shapeOf(s: Shape): ConvolutionShape {
  const [samples, inChannels, ...size] = s.input;
  const stride = s.stride ?? s.kernel.map(() => 1);
  const padding = s.padding ?? s.kernel.map(() => 0);
  const dilation = s.dilation ?? s.kernel.map(() => 1);
  const { kernel, outChannels, groups = 1 } = s;
  const outSize = size.map((n, i) => outputSize(n, kernel[i], stride[i], padding[i], dilation[i]));
  return { samples, inChannels, outChannels, groups, size, outSize, kernel, stride, padding, dilation };
}

function caseOf(s: Shape, gradient: boolean): OpCase {
  const shape = shapeOf(s);
  const taps = (shape.inChannels / shape.groups) * product(s.kernel);
  return {
    family: 'training',
    op: gradient ? 'convolutionInputGradient' : 'convolution',
    name: `${s.name} [${s.input.join(', ')}] ${s.outChannels} x ${s.kernel.join(' x ')}`,
    tolerance: 5e-6,
    flops: 2 * shape.samples * s.outChannels * product(shape.outSize) * taps,
    items: { unit: 'sample', count: shape.samples },
    bench: s.bench,
    prepare(random) {
      const weight = normal(random, [s.outChannels, shape.inChannels / shape.groups, ...s.kernel]);
      const bias = normal(random, [s.outChannels]);
      const x = normal(random, gradient ? [shape.samples, s.outChannels, ...shape.outSize] : s.input);
      const run = function* (o: RunOptions): Steps<Tensor[]> {
        return [
          gradient
            ? yield* convolutionInputGradient(x, weight, shape, o)
            : yield* convolution(x, weight, s.name === 'pointwise' ? null : bias, shape, o),
        ];
      };
      return preparedSteps(run);
    },
  };
}

/** Convolutions and their input's gradient: axes, strides, groups, tiles that do not divide. */
export const convolutionCases: OpCase[] = [
  ...shapes.map((s) => caseOf(s, false)),
  ...shapes.map((s) => caseOf(s, true)),
];
