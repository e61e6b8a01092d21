import { product, Tensor } from '../../../lib/tensor.ts';
import {
  type CrossEntropyOptions,
  type CrossEntropyResult,
  crossEntropy,
  crossEntropySync,
} from '../../../lib/training/crossEntropy.ts';
import type { OpCase } from '../case.ts';

interface Shape {
  name: string;
  dims: number[];
  options?: CrossEntropyOptions;
  /** Every so manieth label is missing. */
  missing?: number;
  spread?: number;
  bench?: boolean;
}

const shapes: Shape[] = [
  { name: 'images', dims: [33, 10] },
  { name: 'tokens, some without a label', dims: [3, 7, 50], missing: 3 },
  { name: 'sums, scaled', dims: [3, 7, 50], missing: 3, options: { reduction: 'sum', scale: 1024 } },
  { name: 'confident', dims: [20, 40], spread: 60 },
  { name: 'one class', dims: [4, 1] },
  { name: 'no samples', dims: [0, 10] },
  { name: 'GPT-2', dims: [1, 256, 50257], bench: true },
];

const outputs = (r: CrossEntropyResult) => [r.losses, r.gradient, r.prediction] as Tensor[];

/** Losses, gradients and predictions. */
export const crossEntropyCases: OpCase[] = shapes.map((s) => ({
  family: 'training',
  op: 'crossEntropy',
  name: `${s.name} [${s.dims.join(', ')}]`,
  tolerance: 2e-6,
  bytes: 8 * product(s.dims),
  bench: s.bench,
  prepare(random) {
    const lead = s.dims.slice(0, -1);
    const classes = s.dims[s.dims.length - 1];
    const logits = new Tensor('float32', random.normals(product(s.dims), s.spread ?? 2), s.dims);
    const ids = Int32Array.from({ length: product(lead) }, (_, i) =>
      s.missing !== undefined && i % s.missing === 0 ? -1 : random.integer(0, classes - 1),
    );
    const labels = new Tensor('int32', ids, lead);
    return {
      run: (o) => outputs(crossEntropySync(logits, labels, { ...s.options, ...o })),
      runAsync: async (o) => outputs(await crossEntropy(logits, labels, { ...s.options, ...o })),
    };
  },
}));
