import { allocateAt, placeOf, readElement } from '../device.ts';
import { HeddleError } from '../errors.ts';
import {
  type AsyncOpOptions,
  call,
  callSync,
  checkOptions,
  type Op,
  type OpOptions,
  optionChoice,
  optionInteger,
} from '../op.ts';
import { planDispatchReference } from '../reference/moe/planDispatch.ts';
import { asTensor, makeTensor, type Tensor, type TensorLike } from '../tensor.ts';
import { MAX_EXPERTS } from './routeTopK.ts';

/** Which routes an expert over its capacity keeps; see {@link PlanDispatchOptions.drop}. */
export type DropRule = 'position' | 'slot' | 'weight' | 'batch-priority';

/** Where every route goes. A route is one choice of one token; its flat id is `token * k + slot`. */
export interface DispatchPlan {
  /** Experts that receive tokens here (the local ones, with an expert map). */
  readonly numExperts: number;
  readonly numTokens: number;
  /** Routes per token. */
  readonly k: number;
  /** Routes an expert may keep, or `null` when nothing is dropped. */
  readonly capacity: number | null;
  /** `[routes]`: flat ids of the kept routes, sorted by expert, ascending within one. */
  readonly order: Tensor<'int32'>;
  /** `[numExperts + 1]`: expert e's routes are `order[offsets[e]]` up to, not including, `order[offsets[e + 1]]`. */
  readonly offsets: Tensor<'int32'>;
  /** `[numTokens, k]`: a route's place in `order`, or -1 when it is masked or dropped. */
  readonly inverse: Tensor<'int32'>;
  /** Flat ids of the routes dropped for capacity, ascending. */
  readonly dropped: Tensor<'int32'>;
}

export interface PlanDispatchOptions {
  /** Experts that receive tokens here, 1 to 4,096. */
  numExperts: number;
  /** Most routes one expert keeps; see {@link expertCapacity}. Default: no limit, nothing is dropped. */
  capacity?: number;
  /**
   * Which routes stay where an expert has more than `capacity`:
   * - `'position'` (default): the first ones, token by token (MegaBlocks, Megatron, DeepSpeed)
   * - `'slot'`: all first choices before second choices (GShard, Tutel, V-MoE)
   * - `'weight'`: those with the largest weights, ties to the lower route (Megatron and DeepSpeed "probs")
   * - `'batch-priority'`: as `'slot'`, tokens in descending order of their largest weight (V-MoE)
   */
  drop?: DropRule;
  /** float32 `[tokens, k]`; needed by `drop: 'weight'` and `'batch-priority'`. NaN ranks below all others. */
  weights?: TensorLike;
  /** int32 `[global experts]`, always on the CPU: the local expert of each global id, or -1 where it lives elsewhere. */
  expertMap?: TensorLike | Int32Array;
}

const DROP_CODE: Readonly<Record<DropRule, number>> = {
  position: 0,
  slot: 1,
  weight: 2,
  'batch-priority': 3,
};
const DROPS = Object.keys(DROP_CODE) as DropRule[];
const MAX_ROUTES = 2 ** 31 - 1;
const OPTIONS: ReadonlySet<string> = new Set([
  'numExperts',
  'capacity',
  'drop',
  'weights',
  'expertMap',
  'backend',
  'threads',
  'signal',
]);

const op: Op = {
  name: 'planDispatch',
  reference: planDispatchReference,
  invalid: (index, args) => {
    const [indices, , k, , globalExperts] = args;
    const at = `[${Math.floor(index / k)}, ${index % k}]`;
    return new HeddleError(
      'ERR_VALUE',
      `indices${at} is ${readElement(indices, index)}: expected -1 to ${globalExperts - 1}`,
    );
  },
};

function asExpertMap(value: TensorLike | Int32Array, experts: number): Int32Array {
  const map = value instanceof Int32Array ? value : asTensor(value, 'expertMap', ['int32'], 1).data;
  for (let i = 0; i < map.length; i++) {
    if (map[i] < -1 || map[i] >= experts) {
      throw new HeddleError('ERR_VALUE', `expertMap[${i}] is ${map[i]}: expected -1 to ${experts - 1}`);
    }
  }
  return map;
}

function checkDrop(
  options: PlanDispatchOptions,
  tokens: number,
  k: number,
): [number, Tensor<'float32'> | null] {
  const drop = optionChoice(options.drop, DROPS, 'position', 'drop');
  if (options.drop !== undefined && options.capacity === undefined) {
    throw new HeddleError('ERR_OPTION', `drop '${drop}' needs a capacity`);
  }
  const weighted = drop === 'weight' || drop === 'batch-priority';
  if (weighted !== (options.weights !== undefined)) {
    throw new HeddleError(
      'ERR_OPTION',
      weighted
        ? `drop '${drop}' needs weights`
        : "weights are used only by drop 'weight' and 'batch-priority'; leave them out",
    );
  }
  if (options.weights === undefined) return [DROP_CODE[drop], null];
  const weights = asTensor(options.weights, 'weights', ['float32'], 2, 'device');
  if (weights.dims[0] !== tokens || weights.dims[1] !== k) {
    throw new HeddleError(
      'ERR_SHAPE',
      `weights: expected [${tokens}, ${k}] as indices, got [${weights.dims.join(', ')}]`,
    );
  }
  return [DROP_CODE[drop], weights];
}

function prepare(indices: TensorLike, options: PlanDispatchOptions) {
  checkOptions(options, OPTIONS, 'planDispatch');
  const ids = asTensor(indices, 'indices', ['int32'], 2, 'device');
  const [tokens, k] = ids.dims;
  if (options === undefined) {
    throw new HeddleError('ERR_ARGUMENT', 'planDispatch: options with numExperts are required');
  }
  const experts = optionInteger(options.numExperts, 1, MAX_EXPERTS, 'numExperts');
  if (k < 1) throw new HeddleError('ERR_SHAPE', 'indices: expected at least 1 route per token, got 0');
  const routes = tokens * k;
  if (routes > MAX_ROUTES) {
    throw new HeddleError('ERR_SHAPE', `indices: at most ${MAX_ROUTES} routes are supported, got ${routes}`);
  }
  const limited = options.capacity !== undefined;
  const capacity = limited ? optionInteger(options.capacity, 0, MAX_ROUTES, 'capacity') : -1;
  const [drop, weights] = checkDrop(options, tokens, k);
  const map = options.expertMap === undefined ? null : asExpertMap(options.expertMap, experts);
  const place = placeOf('planDispatch', options, { indices: ids, weights });
  const order = allocateAt(place, 'int32', routes);
  const offsets = allocateAt(place, 'int32', experts + 1);
  const inverse = allocateAt(place, 'int32', routes);
  const dropped = allocateAt(place, 'int32', limited ? routes : 0);
  // Routes dropped and kept: known only afterwards, and needed here wherever the plan is.
  const counts = new Int32Array(2);
  const args = [
    ids.data,
    tokens,
    k,
    experts,
    map === null ? experts : map.length,
    map,
    capacity,
    drop,
    weights === null ? null : weights.data,
    order,
    offsets,
    inverse,
    dropped,
    counts,
  ];
  const finish = (): DispatchPlan => {
    const [lost, kept] = counts;
    // A copy on the CPU, so that a short list does not keep a long array; a view on the device.
    const list = place === 'cpu' ? dropped.slice(0, lost) : dropped.subarray(0, lost);
    return {
      numExperts: experts,
      numTokens: tokens,
      k,
      capacity: limited ? capacity : null,
      order: makeTensor('int32', kept === routes ? order : order.subarray(0, kept), [kept]),
      offsets: makeTensor('int32', offsets, [experts + 1]),
      inverse: makeTensor('int32', inverse, [tokens, k]),
      dropped: makeTensor('int32', list, [lost]),
    };
  };
  return { args, finish };
}

/**
 * Plans which token goes to which expert: a stable counting sort of the routes by expert, with an optional capacity
 * per expert. {@link permute} then brings the tokens into that order and {@link combine} brings the experts' outputs
 * back.
 *
 * An id of -1 is a masked route: it is ignored. With `expertMap` the ids are global, `numExperts` counts the local
 * experts, and routes to experts elsewhere are masked. A token may name an expert more than once. Dropped routes are
 * not redistributed, and weights are not renormalised after a drop. The plan does not depend on the threads. Its
 * sizes follow from the data, so there is no `out`.
 *
 * @param indices int32 `[tokens, k]`, each -1 or an expert id
 * @throws HeddleError `ERR_ARGUMENT`, `ERR_SHAPE`, `ERR_DTYPE`, `ERR_OPTION`, `ERR_BACKEND`, `ERR_ABORTED`;
 *   `ERR_VALUE` for an id out of range (naming it) or a map entry out of range
 */
export async function planDispatch(
  indices: TensorLike,
  options: PlanDispatchOptions & AsyncOpOptions,
): Promise<DispatchPlan> {
  const { args, finish } = prepare(indices, options);
  await call(op, args, options);
  return finish();
}

/** {@link planDispatch} on the calling thread (and helpers, when `threads` > 1). */
export function planDispatchSync(
  indices: TensorLike,
  options: PlanDispatchOptions & OpOptions,
): DispatchPlan {
  const { args, finish } = prepare(indices, options);
  callSync(op, args, options);
  return finish();
}

/** Checks a plan that came from a caller: its shapes here, its contents in the op that uses them. */
export function checkPlan(plan: DispatchPlan): DispatchPlan {
  if (plan === null || typeof plan !== 'object' || !('order' in plan) || !('inverse' in plan)) {
    throw new HeddleError('ERR_ARGUMENT', 'plan: expected a DispatchPlan from planDispatch');
  }
  const tokens = optionInteger(plan.numTokens, 0, MAX_ROUTES, 'plan.numTokens');
  const k = optionInteger(plan.k, 1, MAX_ROUTES, 'plan.k');
  const order = asTensor(plan.order, 'plan.order', ['int32'], 1, 'device');
  const inverse = asTensor(plan.inverse, 'plan.inverse', ['int32'], 2, 'device');
  if (inverse.dims[0] !== tokens || inverse.dims[1] !== k) {
    throw new HeddleError(
      'ERR_SHAPE',
      `plan.inverse: expected [${tokens}, ${k}], got [${inverse.dims.join(', ')}]`,
    );
  }
  return { ...plan, order, inverse };
}
