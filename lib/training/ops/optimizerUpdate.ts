import type { Steps } from '../../checkpoint/steps.ts';
import type { Op } from '../../op.ts';
import { optimizerUpdateReference } from '../../reference/training/optimizerUpdate.ts';
import { perform, type RunOptions } from './perform.ts';

/** The rules, in the order of native/training/optimizer_update.h. */
export const UPDATE_RULES = ['sgd', 'adamw', 'lamb'] as const;
export type UpdateRule = (typeof UPDATE_RULES)[number];

/** One update of one parameter; formulas in native/training/optimizer_update.h. */
export interface OptimizerUpdate {
  rule: UpdateRule;
  parameter: Float32Array;
  /** The accumulated sum; zero afterwards. */
  gradient: Float32Array;
  /** sgd: the momentum buffer, null without momentum; adamw, lamb: first moment. */
  first: Float32Array | null;
  second: Float32Array | null;
  /** What the sum is multiplied by: 1 over the expected batch. */
  scale: number;
  learningRate: number;
  weightDecay: number;
  /** sgd: momentum; adamw, lamb: β₁. */
  momentum: number;
  beta2: number;
  epsilon: number;
  /** 1 / (1 − β^t). */
  correction1: number;
  correction2: number;
  nesterov: boolean;
}

const op: Op = { name: 'optimizerUpdate', reference: optimizerUpdateReference };

/** Updates a parameter and its state in place, and clears the gradient. */
export function* optimizerUpdate(u: OptimizerUpdate, options?: RunOptions): Steps<void> {
  const args = [
    UPDATE_RULES.indexOf(u.rule),
    u.parameter.length,
    u.parameter,
    u.gradient,
    u.first,
    u.second,
    u.scale,
    u.learningRate,
    u.weightDecay,
    u.momentum,
    u.beta2,
    u.epsilon,
    u.correction1,
    u.correction2,
    u.nesterov,
  ];
  yield* perform(op, args, undefined, options);
}
