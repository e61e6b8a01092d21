import { type AsyncOpOptions, call, callSync, type Op, type OpOptions } from '../op.ts';
import { routerZLossReference } from '../reference/moe/routerLoss.ts';
import type { TensorLike } from '../tensor.ts';
import { LOSS_OPTIONS, prepareLoss, type RouterLoss, type RouterLossOptions } from './routerLoss.ts';

const OPTIONS: ReadonlySet<string> = new Set(LOSS_OPTIONS);
const op: Op = { name: 'routerZLoss', reference: routerZLossReference };

function prepare(logits: TensorLike, options: RouterLossOptions | undefined) {
  return prepareLoss({ name: 'routerZLoss', allowed: OPTIONS, logits: logits ?? null }, options);
}

/**
 * Router z-loss: the mean over tokens of logsumexp(logits)², which keeps logits small (ST-MoE). NaN and infinite
 * logits count as in `routeTopK`: a row whose largest logit is infinite counts as its limit, shifted to 0.
 *
 * @param logits `[tokens, experts]` float32, bfloat16 or float16
 * @throws HeddleError `ERR_ARGUMENT`, `ERR_SHAPE`, `ERR_DTYPE`, `ERR_OPTION`, `ERR_BACKEND`, `ERR_ABORTED`
 */
export async function routerZLoss(
  logits: TensorLike,
  options?: RouterLossOptions & AsyncOpOptions,
): Promise<RouterLoss> {
  const { args, finish } = prepare(logits, options);
  await call(op, args, options);
  return finish();
}

/** {@link routerZLoss} on the calling thread (and helpers, when `threads` > 1). */
export function routerZLossSync(logits: TensorLike, options?: RouterLossOptions & OpOptions): RouterLoss {
  const { args, finish } = prepare(logits, options);
  callSync(op, args, options);
  return finish();
}
