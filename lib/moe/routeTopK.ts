import { allocateAt, type Location, placeOf, readElement } from '../device.ts';
import { DTYPE_CODE, type FloatType } from '../dtype.ts';
import { HeddleError } from '../errors.ts';
import {
  type AsyncOpOptions,
  call,
  callSync,
  checkOptions,
  checkOut,
  type Op,
  type OpOptions,
  optionChoice,
  optionInteger,
} from '../op.ts';
import { routeTopKReference } from '../reference/moe/routeTopK.ts';
import { asTensor, makeTensor, type Tensor, type TensorLike } from '../tensor.ts';
import { ROUTER_OPTION_NAMES, type RouterOptions, routerArguments } from './routerOptions.ts';

/** Experts chosen for each token and their weights. */
export interface Routing {
  /** `[tokens, k]` expert ids in descending order of score; -1 where fewer than k experts could be selected. */
  indices: Tensor<'int32'>;
  /** `[tokens, k]` weights; 0 beside an id of -1. */
  weights: Tensor<'float32'>;
}

/** Group-limited routing (DeepSeek-V2, V3): only the best `keep` of `count` equal groups of experts may be selected. */
export interface ExpertGroups {
  /** Number of groups; must divide the number of experts. */
  count: number;
  /** Groups that stay; `k <= keep * experts / count`. */
  keep: number;
  /** Group score: the largest selection score (V2) or the sum of the two largest (V3). */
  score: 'max' | 'top2';
}

export interface RouteTopKOptions extends RouterOptions {
  /** Experts per token, 1 to the number of experts. */
  k: number;
  /** `[experts]` float32, added to the scores for selection only, never to the weights (DeepSeek-V3). */
  selectionBias?: TensorLike | Float32Array;
  groups?: ExpertGroups;
  /** uint8 `[experts]` or `[tokens, experts]`: 0 = the expert does not exist for this token. */
  mask?: TensorLike;
  out?: Routing;
}

/** Largest number of experts. */
export const MAX_EXPERTS = 4096;

const LOGIT_TYPES: readonly FloatType[] = ['float32', 'bfloat16', 'float16'];
const GROUP_SCORES = ['max', 'top2'] as const;
const SHARED = [...ROUTER_OPTION_NAMES, 'out', 'backend', 'threads', 'signal'];
const ROUTE_OPTIONS: ReadonlySet<string> = new Set(['k', 'selectionBias', 'groups', 'mask', ...SHARED]);
const REPLAY_OPTIONS: ReadonlySet<string> = new Set(SHARED);
const GROUP_OPTIONS: ReadonlySet<string> = new Set(['count', 'keep', 'score']);

const op: Op = {
  name: 'routeTopK',
  reference: routeTopKReference,
  invalid: (index, args) => {
    const [, , , experts, k] = args;
    const given = readElement(args[args.length - 3], index);
    const at = `[${Math.floor(index / k)}, ${index % k}]`;
    return new HeddleError('ERR_VALUE', `indices${at} is ${given}: expected -1 to ${experts - 1}`);
  },
};

/** Checks logits `[tokens, experts]`; `device` as for `asTensor`. */
export function checkLogits(logits: TensorLike, device?: 'device'): Tensor<FloatType> {
  const l = asTensor(logits, 'logits', LOGIT_TYPES, 2, device);
  const experts = l.dims[1];
  if (experts < 1 || experts > MAX_EXPERTS) {
    throw new HeddleError('ERR_SHAPE', `logits: 1 to ${MAX_EXPERTS} experts are supported, got ${experts}`);
  }
  return l;
}

// Elements up to which ids and weights share one buffer.
const SHARED_RESULT = 64;

/** `out` checked, or a new result where `place` says. */
export function routingResult(
  tokens: number,
  k: number,
  out: Routing | undefined,
  inputs: Tensor[],
  place: Location = 'cpu',
): Routing {
  const dims = [tokens, k];
  if (out === undefined) {
    const n = tokens * k;
    if (place === 'cuda') {
      const indices = makeTensor('int32', allocateAt(place, 'int32', n), dims);
      try {
        return { indices, weights: makeTensor('float32', allocateAt(place, 'float32', n), [tokens, k]) };
      } catch (error) {
        indices.dispose();
        throw error;
      }
    }
    // A token's results share one buffer: making two costs more than routing it.
    const shared = n <= SHARED_RESULT ? new ArrayBuffer(8 * n) : null;
    const ids = shared ? new Int32Array(shared, 0, n) : new Int32Array(n);
    const values = shared ? new Float32Array(shared, 4 * n, n) : new Float32Array(n);
    return { indices: makeTensor('int32', ids, dims), weights: makeTensor('float32', values, [tokens, k]) };
  }
  const indices = asTensor(out.indices, 'out.indices', ['int32'], undefined, 'device');
  const weights = asTensor(out.weights, 'out.weights', ['float32'], undefined, 'device');
  checkOut(indices, dims, inputs, 'out.indices');
  checkOut(weights, dims, [...inputs, indices], 'out.weights');
  return { indices, weights };
}

function asBias(value: TensorLike | Float32Array, experts: number): Tensor<'float32'> {
  const t =
    value instanceof Float32Array
      ? makeTensor('float32', value, [value.length])
      : asTensor(value, 'selectionBias', ['float32'], 1, 'device');
  if (t.dims[0] !== experts) {
    throw new HeddleError('ERR_SHAPE', `selectionBias: expected [${experts}], got [${t.dims[0]}]`);
  }
  return t;
}

/** Checks a mask `[experts]` or `[tokens, experts]`; `device` as for `asTensor`. */
export function asMask(
  value: TensorLike,
  tokens: number,
  experts: number,
  device?: 'device',
): Tensor<'uint8'> {
  const t = asTensor(value, 'mask', ['uint8'], undefined, device);
  const d = t.dims;
  const fits =
    (d.length === 1 && d[0] === experts) || (d.length === 2 && d[0] === tokens && d[1] === experts);
  if (!fits) {
    throw new HeddleError(
      'ERR_SHAPE',
      `mask: expected [${experts}] or [${tokens}, ${experts}], got [${d.join(', ')}]`,
    );
  }
  return t;
}

function checkGroups(groups: ExpertGroups, experts: number, k: number): [number, number, boolean] {
  checkOptions(groups, GROUP_OPTIONS, 'groups');
  const count = optionInteger(groups.count, 1, experts, 'groups.count');
  if (experts % count !== 0) {
    throw new HeddleError('ERR_OPTION', `groups.count must divide the ${experts} experts, got ${count}`);
  }
  const keep = optionInteger(groups.keep, 1, count, 'groups.keep');
  const top2 = optionChoice(groups.score, GROUP_SCORES, 'max', 'groups.score') === 'top2';
  if (top2 && experts / count < 2) {
    throw new HeddleError(
      'ERR_OPTION',
      `groups.score 'top2' needs at least 2 experts per group, got ${experts / count}`,
    );
  }
  if (k > (keep * experts) / count) {
    throw new HeddleError(
      'ERR_OPTION',
      `k must be at most groups.keep * experts / groups.count = ${(keep * experts) / count}, got ${k}`,
    );
  }
  return [count, keep, top2];
}

/** @internal Checks the arguments and makes the result. */
export function prepareRoute(
  logits: TensorLike,
  options: RouteTopKOptions,
): { args: unknown[]; result: Routing } {
  checkOptions(options, ROUTE_OPTIONS, 'routeTopK');
  const l = checkLogits(logits, 'device');
  const tokens = l.dims[0];
  const experts = l.dims[1];
  if (options === undefined) throw new HeddleError('ERR_ARGUMENT', 'routeTopK: options with k are required');
  const k = optionInteger(options.k, 1, experts, 'k');
  const router = routerArguments(options);
  const bias = options.selectionBias === undefined ? null : asBias(options.selectionBias, experts);
  const mask = options.mask === undefined ? null : asMask(options.mask, tokens, experts, 'device');
  const groups = options.groups === undefined ? undefined : checkGroups(options.groups, experts, k);
  const inputs: Tensor[] = [l];
  if (bias) inputs.push(bias);
  if (mask) inputs.push(mask);
  const place = placeOf('routeTopK', options, {
    logits: l,
    selectionBias: bias,
    mask,
    'out.indices': options.out?.indices as Tensor | undefined,
    'out.weights': options.out?.weights as Tensor | undefined,
  });
  const result = routingResult(tokens, k, options.out, inputs, place);
  const args = [
    l.data,
    DTYPE_CODE[l.type],
    tokens,
    experts,
    k,
    ...router,
    bias === null ? null : bias.data,
    groups === undefined ? 0 : groups[0],
    groups === undefined ? 0 : groups[1],
    groups === undefined ? false : groups[2],
    mask === null ? null : mask.data,
    mask !== null && mask.dims.length === 2 ? experts : 0,
    null,
    result.indices.data,
    result.weights.data,
  ];
  return { args, result };
}

function prepareReplay(indices: TensorLike, logits: TensorLike, options: ReplayOptions | undefined) {
  checkOptions(options, REPLAY_OPTIONS, 'routeWith');
  const l = checkLogits(logits, 'device');
  const ids = asTensor(indices, 'indices', ['int32'], 2, 'device');
  const [tokens, k] = ids.dims;
  const experts = l.dims[1];
  if (tokens !== l.dims[0]) {
    throw new HeddleError('ERR_SHAPE', `indices: expected ${l.dims[0]} tokens as in logits, got ${tokens}`);
  }
  if (k < 1 || k > experts) {
    throw new HeddleError('ERR_SHAPE', `indices: expected 1 to ${experts} ids per token, got ${k}`);
  }
  const place = placeOf('routeWith', options, {
    logits: l,
    indices: ids,
    'out.indices': options?.out?.indices as Tensor | undefined,
    'out.weights': options?.out?.weights as Tensor | undefined,
  });
  const result = routingResult(tokens, k, options?.out, [l, ids], place);
  const args = [
    l.data,
    DTYPE_CODE[l.type],
    tokens,
    experts,
    k,
    ...routerArguments(options),
    null,
    0,
    0,
    false,
    null,
    0,
    ids.data,
    result.indices.data,
    result.weights.data,
  ];
  return { args, result };
}

/**
 * Token-choice routing: the k experts of each token and their weights.
 *
 * Covers Mixtral, Qwen-MoE and OLMoE (`{ k, normalize }`), gpt-oss (`{ k, softmaxOver: 'selected' }`), DeepSeek-V3
 * (`{ k, score: 'sigmoid', selectionBias, groups, normalize: true, normalizeEpsilon: 1e-20, scale }`), DeepSeek-V2
 * (`groups.score: 'max'`) and Llama 4 (`{ k: 1, score: 'sigmoid' }`).
 *
 * Ties go to the lower expert id. A NaN logit counts as -Infinity; a row with +Infinity shares its weight among
 * those experts; a row without any finite logit is uniform. Groups outside the best are excluded, never merely
 * zeroed. Each row's result is bitwise the same in any batch and on any number of threads.
 *
 * @param logits `[tokens, experts]` float32, bfloat16 or float16; up to 4,096 experts
 * @returns indices int32 `[tokens, k]`, weights float32 `[tokens, k]`
 * @throws HeddleError `ERR_ARGUMENT`, `ERR_SHAPE`, `ERR_DTYPE`, `ERR_OPTION`, `ERR_BACKEND`, `ERR_ABORTED`
 */
export async function routeTopK(
  logits: TensorLike,
  options: RouteTopKOptions & AsyncOpOptions,
): Promise<Routing> {
  const { args, result } = prepareRoute(logits, options);
  await call(op, args, options);
  return result;
}

/** {@link routeTopK} on the calling thread (and helpers, when `threads` > 1). */
export function routeTopKSync(logits: TensorLike, options: RouteTopKOptions & OpOptions): Routing {
  const { args, result } = prepareRoute(logits, options);
  callSync(op, args, options);
  return result;
}

export interface ReplayOptions extends RouterOptions {
  out?: Routing;
}

/**
 * Routing replay: the weights that {@link routeTopK} would give to experts chosen earlier (in another run, or by
 * another model), recomputed from these logits.
 *
 * @param indices int32 `[tokens, k]`, each -1 (weight 0) or an expert id; k may not exceed the experts
 * @param logits `[tokens, experts]` float32, bfloat16 or float16
 * @returns a copy of the indices, and weights float32 `[tokens, k]`
 * @throws HeddleError as {@link routeTopK}; `ERR_VALUE` for an id out of range
 */
export async function routeWith(
  indices: TensorLike,
  logits: TensorLike,
  options?: ReplayOptions & AsyncOpOptions,
): Promise<Routing> {
  const { args, result } = prepareReplay(indices, logits, options);
  await call(op, args, options);
  return result;
}

/** {@link routeWith} on the calling thread. */
export function routeWithSync(
  indices: TensorLike,
  logits: TensorLike,
  options?: ReplayOptions & OpOptions,
): Routing {
  const { args, result } = prepareReplay(indices, logits, options);
  callSync(op, args, options);
  return result;
}
