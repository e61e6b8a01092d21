import { type Steps, step } from '../checkpoint/steps.ts';
import type { FloatType } from '../dtype.ts';
import { prepareLinear } from '../gemm/linear.ts';
import { type AsyncOpOptions, call, callSync, nativeOnly } from '../op.ts';
import type { Tensor } from '../tensor.ts';
import { prepareForward } from './experts.ts';
import type { Parts } from './load.ts';
import { prepareRoute, type RouteTopKOptions } from './routeTopK.ts';

/** The arguments of the ops one after the other (native/moe/layer_device.h). */
const op = nativeOnly('moeLayer');
/** In place of a product's arguments: none. */
const NO_PRODUCT = [null, null, null, 0, 0, null, 0, null, 0];

/**
 * Router, routing, the shared experts' gate and experts as one job on the device, with the bits of the ops one by one.
 * @param x `[tokens, hidden]` on the device
 */
export function* deviceForward(
  parts: Parts,
  routing: RouteTopKOptions,
  x: Tensor<FloatType>,
  options: AsyncOpOptions,
): Steps<Tensor<FloatType>> {
  const { router, experts, shared, sharedGate, onDevice } = parts;
  const o = { ...options, backend: 'cuda' as const };
  const between: Tensor[] = []; // the garbage collector would free them late
  try {
    const logits = prepareLinear(x, router, { ...o, bias: onDevice?.routerBias });
    between.push(logits.out);
    const route = prepareRoute(logits.out, { ...routing, ...o, selectionBias: onDevice?.selectionBias });
    between.push(route.result.indices, route.result.weights);
    const gate = sharedGate && prepareLinear(x, sharedGate, { ...o, activation: 'sigmoid' });
    if (gate !== undefined) between.push(gate.out);
    const open = gate?.out.reshape([x.dims[0]]);
    const block = { ...o, shared, sharedGate: open, outType: x.type };
    const { args, out } = prepareForward(x, route.result, experts, block);
    const all = [...logits.args, ...route.args, ...(gate?.args ?? NO_PRODUCT), ...args];
    yield* step(
      () => callSync(op, all, o),
      () => call(op, all, o),
    );
    return out;
  } finally {
    for (const t of between) t.dispose();
  }
}
