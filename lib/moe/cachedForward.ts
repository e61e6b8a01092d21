import { type Steps, step } from '../checkpoint/steps.ts';
import type { FloatType } from '../dtype.ts';
import { call, callSync } from '../op.ts';
import { allocate, type Tensor, type TensorLike } from '../tensor.ts';
import type { CacheOptions, ExpertCache } from './expertCache.ts';
import { type ExpertsForwardOptions, forwardOp, prepareForward } from './experts.ts';
import type { Routing } from './routeTopK.ts';

/** Places of `expertsForward`'s arguments (native/binding/experts.cpp). */
const SHARED = 1;
const TOKENS = 5;
const K = 6;
const INDICES = 7;
const OUT = 9;
const ROUTES = 11;

/**
 * `expertsForward` over a cache. Experts that do not fit together run in groups, each writing the outputs of its own
 * routes; they are combined at the end, in the one order, so the result has the bits of a fully packed layer.
 * Scratch then grows by tokens × k × hidden values.
 */
export function* cachedForward(
  cache: ExpertCache,
  x: TensorLike,
  routing: Routing,
  forward: ExpertsForwardOptions,
  options: CacheOptions,
): Steps<Tensor<FloatType>> {
  const { weights } = cache;
  const { out, args } = prepareForward(x, routing, weights, forward);
  const o = { ...options, backend: weights.backend };
  const run = (change: Record<number, unknown>) => {
    const a = Object.assign([...args, null], change);
    return step(
      () => callSync(forwardOp, a, o),
      () => call(forwardOp, a, o),
    );
  };
  const ids = args[INDICES] as Int32Array;
  const left = new Set(ids);
  left.delete(-1);

  let group = yield* cache.acquire(left, options);
  if (group.length === left.size) {
    try {
      yield* run({});
    } finally {
      cache.release(group);
    }
    return out;
  }
  const own = new Int32Array(ids.length);
  let routes: Float32Array | Float64Array;
  for (;;) {
    try {
      const size = (args[TOKENS] as number) * (args[K] as number) * weights.hiddenSize;
      // The reference combines what it computed, in float64.
      routes ??= allocate(weights.backend === 'reference' ? 'float64' : 'float32', size);
      const members = new Set(group);
      for (let r = 0; r < ids.length; r++) own[r] = members.has(ids[r]) ? ids[r] : -1;
      yield* run({ [SHARED]: null, [INDICES]: own, [OUT]: null, [ROUTES]: routes });
    } finally {
      cache.release(group);
    }
    for (const e of group) left.delete(e);
    if (left.size === 0) break;
    group = yield* cache.acquire(left, options);
  }
  yield* run({ [ROUTES]: routes });
  return out;
}
