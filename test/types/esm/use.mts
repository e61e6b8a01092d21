// The published types as an ESM program sees them (self-reference through package.json "exports"). Compiled only.
import { type Defaults, HeddleError, type Info, info, setDefaults, Tensor, type TensorLike } from 'heddle';
import { type RouteTopKOptions, type Routing, routeTopK, routeTopKSync, routeWith } from 'heddle/moe';

const logits = new Tensor('float32', new Float32Array(8), [2, 4]);
const like: TensorLike = { type: 'bfloat16', data: new Uint16Array(8), dims: [2, 4] };
const options: RouteTopKOptions = { k: 2, normalize: true, groups: { count: 2, keep: 1, score: 'top2' } };

export async function use(signal: AbortSignal): Promise<Routing> {
  const { indices, weights } = await routeTopK(logits, { ...options, signal, threads: 2, backend: 'cpu' });
  const ids: Int32Array = indices.data;
  const w: Float32Array = weights.data;
  await routeWith(indices, like, { normalize: true });
  const state: Info = info();
  const defaults: Defaults = { backend: state.backend, threads: ids.length + w.length, isa: 'auto' };
  setDefaults(defaults);
  try {
    return routeTopKSync(like, options);
  } catch (error) {
    if (error instanceof HeddleError && error.code === 'ERR_SHAPE') console.error(error.message);
    throw error;
  }
}

// @ts-expect-error: k is required
routeTopKSync(logits, { normalize: true });
// @ts-expect-error: no such score
routeTopKSync(logits, { k: 1, score: 'tanh' });
// @ts-expect-error: data must fit the type
new Tensor('float32', new Int32Array(1), [1]);
// @ts-expect-error: only the asynchronous form takes a signal
routeTopKSync(logits, { k: 1, signal: AbortSignal.timeout(1) });
