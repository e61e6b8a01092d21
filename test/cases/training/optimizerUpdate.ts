import type { Steps } from '../../../lib/checkpoint/steps.ts';
import { Tensor } from '../../../lib/tensor.ts';
import { type OptimizerUpdate, optimizerUpdate } from '../../../lib/training/ops/optimizerUpdate.ts';
import type { RunOptions } from '../../../lib/training/ops/perform.ts';
import type { OpCase } from '../case.ts';
import type { Random } from '../random.ts';
import { preparedSteps } from './steps.ts';

type Settings = Partial<Omit<OptimizerUpdate, 'parameter' | 'gradient' | 'second'>>;

interface Shape {
  name: string;
  rule: OptimizerUpdate['rule'];
  count: number;
  settings?: Settings;
  bench?: boolean;
}

const shapes: Shape[] = [
  { name: 'plain', rule: 'sgd', count: 1001, settings: { first: null } },
  { name: 'momentum and decay', rule: 'sgd', count: 40000, settings: { momentum: 0.9, weightDecay: 0.1 } },
  { name: 'nesterov', rule: 'sgd', count: 37, settings: { momentum: 0.8, nesterov: true } },
  { name: 'nothing', rule: 'sgd', count: 0, settings: { first: null } },
  { name: 'one element', rule: 'adamw', count: 1 },
  { name: 'odd', rule: 'adamw', count: 20011, settings: { weightDecay: 0.1 } },
  { name: 'odd', rule: 'lamb', count: 50003, settings: { weightDecay: 0.1 } },
  { name: 'one element', rule: 'lamb', count: 1 },
  { name: 'nothing', rule: 'lamb', count: 0 },
  { name: 'GPT-2 fc', rule: 'sgd', count: 768 * 3072, settings: { momentum: 0.9 }, bench: true },
  { name: 'GPT-2 fc', rule: 'adamw', count: 768 * 3072, bench: true },
  { name: 'GPT-2 fc', rule: 'lamb', count: 768 * 3072, bench: true },
];

/** Bytes that one element moves. */
const BYTES = { sgd: 24, adamw: 32, lamb: 52 };

function update(s: Shape, random: Random): OptimizerUpdate {
  const adam = s.rule !== 'sgd';
  return {
    rule: s.rule,
    parameter: random.normals(s.count),
    gradient: random.normals(s.count),
    first: random.normals(s.count, 0.1),
    second: adam ? random.normals(s.count).map((x) => x * x) : null,
    scale: 0.25,
    learningRate: 0.1,
    weightDecay: 0,
    momentum: adam ? 0.9 : 0,
    beta2: adam ? 0.99 : 0,
    epsilon: 1e-8,
    correction1: 2.5,
    correction2: 20,
    nesterov: false,
    ...s.settings,
  };
}

/** Every rule of the optimisers' update. */
export const optimizerUpdateCases: OpCase[] = shapes.map((s) => ({
  family: 'training',
  op: 'optimizerUpdate',
  name: `${s.rule}, ${s.name} [${s.count}]`,
  tolerance: 1e-6,
  bytes: BYTES[s.rule] * s.count,
  bench: s.bench,
  prepare(random) {
    const given = update(s, random);
    const tensor = (x: Float32Array) => new Tensor('float32', x, [x.length]);
    const run = function* (o: RunOptions): Steps<Tensor[]> {
      const [parameter, gradient] = [given.parameter.slice(), given.gradient.slice()];
      const first = given.first?.slice() ?? null;
      const second = given.second?.slice() ?? null;
      yield* optimizerUpdate({ ...given, parameter, gradient, first, second }, o);
      return [parameter, gradient, first, second].filter((x) => x !== null).map(tensor);
    };
    return preparedSteps(run);
  },
}));
