import { runAsync, runSync, type Steps } from '../../../lib/checkpoint/steps.ts';
import { product, Tensor } from '../../../lib/tensor.ts';
import type { RunOptions } from '../../../lib/training/ops/perform.ts';
import type { PreparedCase } from '../case.ts';
import type { Random } from '../random.ts';

/** A prepared case of an op that is written as steps. */
export function preparedSteps(run: (options: RunOptions) => Steps<Tensor[]>): PreparedCase {
  return { run: (o) => runSync(run(o)), runAsync: (o) => runAsync(run(o)) };
}

/** Standard normal values in these dims. */
export const normal = (random: Random, dims: number[]) =>
  new Tensor('float32', random.normals(product(dims)), dims);
