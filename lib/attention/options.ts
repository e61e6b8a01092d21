import { DeviceData, isOnDevice } from '../device.ts';
import { DTYPE_CODE, FLOAT_TYPES, type FloatType } from '../dtype.ts';
import { HeddleError } from '../errors.ts';
import { optionChoice, optionFlag, optionInteger, optionNumber } from '../op.ts';
import { asTensor, makeTensor, Tensor, type TensorLike } from '../tensor.ts';
import { type AttentionArguments, N } from './layout.ts';

/** Per-head numbers: a float32 tensor `[heads]` or the array itself. */
export type HeadVector = TensorLike | Float32Array;

/** Integers per position: an int32 tensor or, for one row of them, the array itself. */
export type IdArray = TensorLike | Int32Array;

/** Element strides `[batch, sequence, head, element]`. */
export type Strides = readonly [number, number, number, number];

/** What a query sees and how its logits are formed: the options of every attention op. */
export interface AttentionOptions {
  /** Query i sees keys up to i + keys - queries: the diagonal ends in the bottom right corner. Default false. */
  causal?: boolean;
  /**
   * Keys visible to the `[left, right]` of the diagonal besides the diagonal itself; -1 = unbounded. transformers
   * and onnxruntime count the token itself: their window W is `[W - 1, 0]` here.
   */
  window?: readonly [number, number];
  /** Logits become `softcap * tanh(logits / softcap)`; 0 = off. Default 0. */
  softcap?: number;
  /** Factor of the products. Default 1 / sqrt(head dim). */
  scale?: number;
  /** Added to the logits: float32, bfloat16 or float16 `[batch | 1, heads | 1, queries | 1, keys]`. */
  bias?: TensorLike;
  /** ALiBi: `-slope[head] * |i + keys - queries - j|` is added to the logits. */
  alibiSlopes?: HeadVector;
  /** A logit per head that takes part in the softmax without a value (gpt-oss). */
  sinks?: HeadVector;
  /** uint8 `[batch | 1, heads | 1, queries | 1, keys]`: 0 = not visible. */
  mask?: TensorLike;
  /** Visibility of whole blocks; blocks that nobody sees cost nothing. */
  blockMask?: {
    /** uint8 `[batch | 1, heads | 1, ceil(queries / query), ceil(keys / key)]`: 0 = not visible. */
    mask: TensorLike;
    /** Queries per block. */
    query: number;
    /** Keys per block. */
    key: number;
  };
  /**
   * Packed sequences of different lengths: int32 offsets, 0 first, the total last. The batch must be 1. Causal,
   * window and ALiBi count inside a sequence; bias, mask and blockMask are indexed by packed positions.
   */
  segments?: { query: IdArray; key: IdArray };
  /**
   * Positions of the same id >= 0 see each other whatever causal and window say: the image blocks of Gemma 3, the
   * prefix of PaliGemma. int32 `[batch | 1, queries]` and `[batch | 1, keys]`.
   */
  blockIds?: { query: IdArray; key: IdArray };
  /** A row that sees no key: 0, or the mean of all values of its sequence. Default 'zero'. */
  emptyRows?: 'zero' | 'uniform';
  /** Element strides of inputs that are not contiguous; `data` starts at element [0, 0, 0, 0]. */
  strides?: { query?: Strides; key?: Strides; value?: Strides };
}

export const ATTENTION_OPTION_NAMES = [
  'causal',
  'window',
  'softcap',
  'scale',
  'bias',
  'alibiSlopes',
  'sinks',
  'mask',
  'blockMask',
  'segments',
  'blockIds',
  'emptyRows',
  'strides',
] as const;

/** Largest head dim. */
export const MAX_HEAD_DIM = 512;
export const EMPTY_ROWS = ['zero', 'uniform'] as const;

const shown = (dims: readonly number[]) => `[${dims.join(', ')}]`;

export function shapeError(name: string, expected: string, dims: readonly number[]): HeddleError {
  return new HeddleError('ERR_SHAPE', `${name}: expected ${expected}, got ${shown(dims)}`);
}

export function checkKeys(value: unknown, keys: readonly string[], name: string): void {
  if (value === null || typeof value !== 'object') {
    throw new HeddleError('ERR_OPTION', `${name} must be an object with ${keys.join(', ')}`);
  }
  for (const key in value) {
    if (!keys.includes(key)) {
      throw new HeddleError('ERR_OPTION', `${name}: unknown property '${key}'; known: ${keys.join(', ')}`);
    }
  }
}

/** Element strides of a contiguous tensor. */
export function contiguousStrides(dims: readonly number[]): number[] {
  const strides = new Array<number>(dims.length).fill(1);
  for (let i = dims.length - 2; i >= 0; i--) strides[i] = strides[i + 1] * dims[i + 1];
  return strides;
}

const COUNTS = ['no', 'one', 'two', 'three', 'four', 'five'];

/** All data of a strided argument in one dim; on the device, `data` may be a `subarray` of a tensor's. */
function flatView(value: TensorLike, length: number, name: string, device?: 'device'): Tensor<FloatType> {
  const data = value?.data;
  if (device !== undefined && data instanceof DeviceData) {
    const view = makeTensor(value.type as FloatType, data as never, [length]);
    return asTensor<FloatType>(view, name, FLOAT_TYPES, 1, device);
  }
  return asTensor<FloatType>({ ...value, data, type: value?.type, dims: [length] }, name, FLOAT_TYPES);
}

/**
 * A float tensor of a rank, contiguous or with strides that stay inside its data.
 * @param device whether it may be on the device, as in `asTensor`
 */
export function asInput(
  value: TensorLike,
  strides: readonly number[] | undefined,
  name: string,
  rank = 4,
  device?: 'device',
): { tensor: Tensor<FloatType>; strides: readonly number[] } {
  if (strides === undefined) {
    const tensor = asTensor(value, name, FLOAT_TYPES, rank, device);
    return { tensor, strides: contiguousStrides(tensor.dims) };
  }
  if (
    !Array.isArray(strides) ||
    strides.length !== rank ||
    strides.some((x) => !Number.isSafeInteger(x) || x < 0)
  ) {
    throw new HeddleError('ERR_OPTION', `strides of ${name} must be ${COUNTS[rank]} integers of at least 0`);
  }
  const length = (value?.data as { length?: number } | undefined)?.length ?? 0;
  const flat = flatView(value, length, name, device);
  const dims = value.dims;
  if (!Array.isArray(dims) || dims.length !== rank || dims.some((x) => !Number.isSafeInteger(x) || x < 0)) {
    throw new HeddleError('ERR_SHAPE', `${name}: dims must be ${COUNTS[rank]} non-negative integers`);
  }
  if (!dims.includes(0)) {
    const last = dims.reduce((sum, d, i) => sum + (d - 1) * strides[i], 0);
    if (last >= length) {
      throw new HeddleError(
        'ERR_SHAPE',
        `${name}: dims ${shown(dims)} with strides ${shown(strides)} need ${last + 1} elements, data has ${length}`,
      );
    }
  }
  return { tensor: makeTensor(flat.type, flat.data, dims), strides };
}

export function headVector(
  value: HeadVector | undefined,
  heads: number,
  name: string,
  device?: 'device',
): Float32Array | null {
  if (value === undefined) return null;
  const t =
    value instanceof Float32Array
      ? makeTensor('float32', value, [value.length])
      : asTensor(value, name, ['float32'], 1, device);
  if (t.dims[0] !== heads) throw shapeError(name, `[${heads}]`, t.dims);
  return t.data;
}

/** Strides over batch, head and query of a tensor that may be broadcast along them. */
function broadcast(t: Tensor, full: readonly number[], name: string): [number, number, number] {
  const d = t.dims;
  const fits = d.length === 4 && d[3] === full[3] && [0, 1, 2].every((i) => d[i] === full[i] || d[i] === 1);
  if (!fits) {
    throw shapeError(name, `[${full[0]} or 1, ${full[1]} or 1, ${full[2]} or 1, ${full[3]}]`, d);
  }
  const step = [d[1] * d[2] * d[3], d[2] * d[3], d[3]];
  return [0, 1, 2].map((i) => (d[i] === 1 ? 0 : step[i])) as [number, number, number];
}

function offsets(value: IdArray, total: number, name: string): Int32Array {
  const t =
    value instanceof Int32Array
      ? makeTensor('int32', value, [value.length])
      : asTensor(value, name, ['int32'], 1);
  const o = t.data;
  if (o.length < 1 || o[0] !== 0 || o[o.length - 1] !== total) {
    throw new HeddleError('ERR_VALUE', `${name}: offsets must start at 0 and end at ${total}`);
  }
  for (let i = 1; i < o.length; i++) {
    if (o[i] < o[i - 1]) {
      throw new HeddleError('ERR_VALUE', `${name}[${i}] is ${o[i]}: offsets must not decrease`);
    }
  }
  return o;
}

function ids(value: IdArray, batch: number, length: number, name: string): [Int32Array, number] {
  const t =
    value instanceof Int32Array
      ? makeTensor('int32', value, [1, value.length])
      : asTensor(value, name, ['int32'], 2);
  if ((t.dims[0] !== batch && t.dims[0] !== 1) || t.dims[1] !== length) {
    throw shapeError(name, `[${batch} or 1, ${length}]`, t.dims);
  }
  return [t.data, t.dims[0] === 1 ? 0 : length];
}

export function windowOf(o: Pick<AttentionOptions, 'window' | 'causal'>): [number, number] {
  let left = -1;
  let right = -1;
  if (o.window !== undefined) {
    if (!Array.isArray(o.window) || o.window.length !== 2) {
      throw new HeddleError('ERR_OPTION', 'window must be [left, right]');
    }
    left = optionInteger(o.window[0], -1, 2 ** 31 - 1, 'window[0]');
    right = optionInteger(o.window[1], -1, 2 ** 31 - 1, 'window[1]');
  }
  return [left, optionFlag(o.causal, false, 'causal') ? 0 : right];
}

/** Validated inputs: what the op receives, and the tensors whose memory the result may not overlap. */
export interface Prepared {
  args: AttentionArguments;
  inputs: Tensor[];
  query: Tensor<FloatType>;
  key: Tensor<FloatType>;
  value: Tensor<FloatType>;
  /** By the names that messages use, for `placeOf`. */
  named: Record<string, Tensor | null>;
}

/**
 * Checks q, k, v and the options that {@link AttentionOptions} names; the caller has refused unknown ones.
 * @param device whether tensors may be on the device, as in `asTensor`; offsets and ids are on the CPU
 */
export function prepareAttention(
  q: TensorLike,
  k: TensorLike,
  v: TensorLike,
  options: AttentionOptions | undefined,
  device?: 'device',
): Prepared {
  const o = options ?? {};
  if (o.strides !== undefined) checkKeys(o.strides, ['query', 'key', 'value'], 'strides');
  const query = asInput(q, o.strides?.query, 'q', 4, device);
  const key = asInput(k, o.strides?.key, 'k', 4, device);
  const value = asInput(v, o.strides?.value, 'v', 4, device);
  const [batch, queries, heads, dim] = query.tensor.dims;
  const [, keys, keyHeads] = key.tensor.dims;
  const valueDim = value.tensor.dims[3];
  for (const [t, name] of [
    [key.tensor, 'k'],
    [value.tensor, 'v'],
  ] as const) {
    if (t.type !== query.tensor.type) {
      throw new HeddleError('ERR_DTYPE', `${name}: expected ${query.tensor.type} as q, got ${t.type}`);
    }
  }
  const kd = key.tensor.dims;
  if (kd[0] !== batch || kd[3] !== dim) throw shapeError('k', `[${batch}, keys, heads, ${dim}]`, kd);
  const vd = value.tensor.dims;
  if (vd[0] !== batch || vd[1] !== keys || vd[2] !== keyHeads) {
    throw shapeError('v', `[${batch}, ${keys}, ${keyHeads}, value dim]`, vd);
  }
  if (keyHeads === 0 ? heads !== 0 : heads % keyHeads !== 0) {
    throw new HeddleError(
      'ERR_SHAPE',
      `q: the number of heads must be a multiple of the ${keyHeads} heads of k, got ${heads}`,
    );
  }
  for (const [d, name] of [
    [dim, 'q'],
    [valueDim, 'v'],
  ] as const) {
    if (d < 1 || d > MAX_HEAD_DIM) {
      throw new HeddleError('ERR_SHAPE', `${name}: the head dim must be 1 to ${MAX_HEAD_DIM}, got ${d}`);
    }
  }
  if (queries > 2 ** 31 - 1 || keys > 2 ** 31 - 1) {
    throw new HeddleError('ERR_SHAPE', `${queries > keys ? 'q' : 'k'}: at most 2147483647 positions`);
  }

  const n = new Float64Array(N.count);
  n.set([batch, queries, keys, heads, keyHeads, dim, valueDim]);
  n.set(query.strides, N.queryStrides);
  n.set(key.strides, N.keyStrides);
  n.set(value.strides, N.valueStrides);
  n.set(windowOf(o), N.left);
  n[N.scale] = optionNumber(o.scale, -Infinity, 1 / Math.sqrt(dim), 'scale');
  n[N.softcap] = optionNumber(o.softcap, 0, 0, 'softcap');
  n[N.uniformEmpty] = optionChoice(o.emptyRows, EMPTY_ROWS, 'zero', 'emptyRows') === 'uniform' ? 1 : 0;

  const inputs: Tensor[] = [query.tensor, key.tensor, value.tensor];
  const full = [batch, heads, queries, keys];
  let bias: Tensor<FloatType> | null = null;
  if (o.bias !== undefined) {
    bias = asTensor(o.bias, 'bias', FLOAT_TYPES, undefined, device);
    n.set(broadcast(bias, full, 'bias'), N.biasStrides);
    inputs.push(bias);
  }
  let mask: Tensor<'uint8'> | null = null;
  if (o.mask !== undefined) {
    mask = asTensor(o.mask, 'mask', ['uint8'], undefined, device);
    n.set(broadcast(mask, full, 'mask'), N.maskStrides);
    inputs.push(mask);
  }
  let blocks: Tensor<'uint8'> | null = null;
  if (o.blockMask !== undefined) {
    checkKeys(o.blockMask, ['mask', 'query', 'key'], 'blockMask');
    const bq = optionInteger(o.blockMask.query, 1, 2 ** 31 - 1, 'blockMask.query');
    const bk = optionInteger(o.blockMask.key, 1, 2 ** 31 - 1, 'blockMask.key');
    blocks = asTensor(o.blockMask.mask, 'blockMask.mask', ['uint8'], undefined, device);
    const grid = [batch, heads, Math.ceil(queries / bq), Math.ceil(keys / bk)];
    n.set(broadcast(blocks, grid, 'blockMask.mask'), N.blockStrides);
    n.set([bq, bk], N.blockQuery);
    inputs.push(blocks);
  }
  let queryIds: Int32Array | null = null;
  let keyIds: Int32Array | null = null;
  if (o.blockIds !== undefined) {
    checkKeys(o.blockIds, ['query', 'key'], 'blockIds');
    [queryIds, n[N.queryIdStride]] = ids(o.blockIds.query, batch, queries, 'blockIds.query');
    [keyIds, n[N.keyIdStride]] = ids(o.blockIds.key, batch, keys, 'blockIds.key');
  }
  let queryOffsets: Int32Array | null = null;
  let keyOffsets: Int32Array | null = null;
  if (o.segments !== undefined) {
    checkKeys(o.segments, ['query', 'key'], 'segments');
    if (batch !== 1) {
      throw new HeddleError('ERR_SHAPE', `q: segments need a batch of 1, got ${batch}`);
    }
    queryOffsets = offsets(o.segments.query, queries, 'segments.query');
    keyOffsets = offsets(o.segments.key, keys, 'segments.key');
    if (queryOffsets.length !== keyOffsets.length) {
      throw new HeddleError(
        'ERR_SHAPE',
        `segments.key: expected ${queryOffsets.length} offsets as in segments.query, got ${keyOffsets.length}`,
      );
    }
    n[N.segments] = queryOffsets.length - 1;
  }
  const alibi = headVector(o.alibiSlopes, heads, 'alibiSlopes', device);
  const sinks = headVector(o.sinks, heads, 'sinks', device);
  for (const x of [alibi, sinks]) if (x !== null) inputs.push(makeTensor('float32', x, [x.length]));
  for (const x of [queryIds, keyIds, queryOffsets, keyOffsets]) {
    if (x !== null) inputs.push(makeTensor('int32', x, [x.length]));
  }
  const args: AttentionArguments = [
    n,
    DTYPE_CODE[query.tensor.type],
    query.tensor.data,
    key.tensor.data,
    value.tensor.data,
    bias === null ? null : bias.data,
    bias === null ? 0 : DTYPE_CODE[bias.type],
    alibi,
    sinks,
    mask === null ? null : mask.data,
    blocks === null ? null : blocks.data,
    queryIds,
    keyIds,
    queryOffsets,
    keyOffsets,
  ];
  const named: Prepared['named'] = {
    q: query.tensor,
    k: key.tensor,
    v: value.tensor,
    bias,
    mask,
    'blockMask.mask': blocks,
  };
  // Numbers per head may stay on the host: they are few, and copied with the call.
  for (const name of ['alibiSlopes', 'sinks'] as const) {
    const x = o[name];
    if (x instanceof Tensor && isOnDevice(x)) named[name] = x;
  }
  return { args, inputs, query: query.tensor, key: key.tensor, value: value.tensor, named };
}
