import type { Steps } from '../../../lib/checkpoint/steps.ts';
import { ELEMENTWISE } from '../../../lib/reference/training/activation.ts';
import { Tensor } from '../../../lib/tensor.ts';
import { elementwise } from '../../../lib/training/ops/activation.ts';
import type { RunOptions } from '../../../lib/training/ops/perform.ts';
import type { OpCase } from '../case.ts';
import { preparedSteps } from './steps.ts';

/** relu, tanh, and the derivatives of relu, tanh and gelu. */
export const activationCases: OpCase[] = ELEMENTWISE.flatMap((kind) =>
  [
    { count: 10007, bench: false },
    { count: 0, bench: false },
    { count: 2 ** 21, bench: true },
  ].map(({ count, bench }) => ({
    family: 'training',
    op: 'elementwise',
    name: `${kind} [${count}]`,
    tolerance: 1e-6,
    bytes: 4 * count * (kind.endsWith('backward') ? 3 : 2),
    bench,
    prepare(random) {
      const x = new Tensor('float32', random.normals(count, 2), [count]);
      const y = new Tensor('float32', random.normals(count, kind === 'tanh-backward' ? 0.3 : 3), [count]);
      const edges = [0, -0, 1e-30, 0.6249, 0.6251, -12, 90, -90, 1e4, Number.NaN];
      if (count > 100) (kind.endsWith('backward') ? y : x).data.set(edges, 50);
      const run = function* (o: RunOptions): Steps<Tensor[]> {
        return [yield* elementwise(kind, x, y, o)];
      };
      return preparedSteps(run);
    },
  })),
);
