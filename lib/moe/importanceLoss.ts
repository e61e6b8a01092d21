import { type AsyncOpOptions, call, callSync, type Op, type OpOptions } from '../op.ts';
import { importanceLossReference } from '../reference/moe/routerLoss.ts';
import type { TensorLike } from '../tensor.ts';
import {
  LOSS_OPTIONS,
  type LossScoreOptions,
  prepareLoss,
  type RouterLoss,
  type RouterLossOptions,
  SCORE_OPTIONS,
} from './routerLoss.ts';

export interface ImportanceLossOptions extends RouterLossOptions, LossScoreOptions {}

const OPTIONS: ReadonlySet<string> = new Set([...SCORE_OPTIONS, ...LOSS_OPTIONS]);
const op: Op = { name: 'importanceLoss', reference: importanceLossReference };

function prepare(logits: TensorLike, options: ImportanceLossOptions | undefined) {
  return prepareLoss({ name: 'importanceLoss', allowed: OPTIONS, logits: logits ?? null }, options);
}

/**
 * Importance loss: the squared coefficient of variation of the experts' importance, which is their probability summed
 * over the tokens (Shazeer et al. 2017, V-MoE). The variance is the population's (divided by E). `loadLoss` is the same
 * of the counts.
 *
 * The gradient of a batch that is balanced already is a difference of nearly equal numbers: below a coefficient of
 * variation of 0.001 its relative error against float64 exceeds 1e-6.
 *
 * @param logits `[tokens, experts]` float32, bfloat16 or float16 (probabilities with `score: 'none'`)
 * @throws HeddleError `ERR_ARGUMENT`, `ERR_SHAPE`, `ERR_DTYPE`, `ERR_OPTION`, `ERR_BACKEND`, `ERR_ABORTED`
 */
export async function importanceLoss(
  logits: TensorLike,
  options?: ImportanceLossOptions & AsyncOpOptions,
): Promise<RouterLoss> {
  const { args, finish } = prepare(logits, options);
  await call(op, args, options);
  return finish();
}

/** {@link importanceLoss} on the calling thread (and helpers, when `threads` > 1). */
export function importanceLossSync(
  logits: TensorLike,
  options?: ImportanceLossOptions & OpOptions,
): RouterLoss {
  const { args, finish } = prepare(logits, options);
  callSync(op, args, options);
  return finish();
}
