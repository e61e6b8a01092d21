import { allocateAt, isOnDevice, placeOf } from '../device.ts';
import type { FloatType } from '../dtype.ts';
import { FLOAT_TYPES } from '../dtype.ts';
import { HeddleError } from '../errors.ts';
import {
  type AsyncOpOptions,
  call,
  callSync,
  checkOptions,
  checkOut,
  type Op,
  type OpOptions,
  optionInteger,
} from '../op.ts';
import { decodeAttentionReference } from '../reference/attention/decodeAttention.ts';
import { allocate, asTensor, makeTensor, type Tensor, type TensorLike } from '../tensor.ts';
import type { AttentionResult } from './attention.ts';
import { KVCache } from './kvCache.ts';
import { CACHE_CODE } from './kvLayout.ts';
import { N } from './layout.ts';
import { type AttentionOptions, type HeadVector, prepareAttention } from './options.ts';

export interface DecodeAttentionOptions {
  /** The cache's sequence of each batch entry. */
  sequences: readonly number[];
  /** Keys visible to the left of each query besides itself; -1 = all. Default -1. */
  windowLeft?: number;
  softcap?: AttentionOptions['softcap'];
  scale?: AttentionOptions['scale'];
  alibiSlopes?: HeadVector;
  sinks?: HeadVector;
  /** Also return the log-sum-exp `[batch, heads, queries]`. Default false. */
  returnLogSumExp?: boolean;
  out?: AttentionResult;
}

const OPTIONS: ReadonlySet<string> = new Set([
  'sequences',
  'windowLeft',
  'softcap',
  'scale',
  'alibiSlopes',
  'sinks',
  'returnLogSumExp',
  'out',
  'backend',
  'threads',
  'signal',
]);

const op: Op = { name: 'decodeAttention', reference: decodeAttentionReference };

function prepare(q: TensorLike, cache: KVCache, options: DecodeAttentionOptions & OpOptions) {
  checkOptions(options, OPTIONS, 'decodeAttention');
  if (!(cache instanceof KVCache)) {
    throw new HeddleError('ERR_ARGUMENT', 'cache: expected a KVCache');
  }
  const query = asTensor(q, 'q', FLOAT_TYPES, 4, 'device');
  checkCacheDevice(query, cache, options);
  const [batch, queries, heads, dim] = query.dims;
  const sequences = options?.sequences;
  if (!Array.isArray(sequences) || sequences.length !== batch) {
    throw new HeddleError(
      'ERR_OPTION',
      `sequences must be an array of ${batch} ids, one per batch entry of q`,
    );
  }
  if (dim !== cache.headDim) {
    throw new HeddleError('ERR_SHAPE', `q: expected the cache's head dim ${cache.headDim}, got ${dim}`);
  }
  const left = optionInteger(options.windowLeft ?? -1, -1, 2 ** 31 - 1, 'windowLeft');
  // The keys live in the cache: an empty tensor stands for them while the shared options are checked.
  const none = (d: number) => makeTensor(query.type, allocate(query.type, 0), [batch, 0, cache.keyHeads, d]);
  const { softcap, scale, alibiSlopes, sinks } = options;
  const shared = { causal: true, softcap, scale, alibiSlopes, sinks };
  const onDevice = isOnDevice(query);
  const { args, inputs } = prepareAttention(
    query,
    none(dim),
    none(cache.valueDim),
    shared,
    onDevice ? 'device' : undefined,
  );
  args[0][N.left] = left;
  for (const id of sequences) {
    if (cache.length(id) < queries) {
      throw new HeddleError(
        'ERR_VALUE',
        `q: ${queries} queries, but sequence ${id} has ${cache.length(id)} tokens: append theirs first`,
      );
    }
    const oldest = left < 0 ? 0 : Math.max(0, cache.length(id) - queries - left);
    if (oldest < cache.start(id)) {
      throw new HeddleError(
        'ERR_VALUE',
        `windowLeft: ${queries} queries with ${left === -1 ? 'no window' : left} need keys from ${oldest} on, but sequence ${id} has those from ${cache.start(id)} on (the cache's window is ${cache.window})`,
      );
    }
  }
  const dims = [batch, queries, heads, cache.valueDim];
  const lseDims = [batch, heads, queries];
  const given = options.out;
  let output: Tensor<FloatType> | null = null;
  let logSumExp: Tensor<'float32'> | null = null;
  if (given !== undefined) {
    output = asTensor(given.output, 'out.output', [query.type], undefined, 'device');
    checkOut(output, dims, inputs, 'out.output');
  }
  if (given?.logSumExp !== undefined) {
    logSumExp = asTensor(given.logSumExp, 'out.logSumExp', ['float32'], undefined, 'device');
    checkOut(logSumExp, lseDims, output === null ? inputs : [...inputs, output], 'out.logSumExp');
  }
  const results = { 'out.output': output, 'out.logSumExp': logSumExp };
  const place = placeOf('decodeAttention', options, { q: query, ...results });
  if (output === null) {
    const count = batch * queries * heads * cache.valueDim;
    output = makeTensor(query.type, allocateAt(place, query.type, count), dims);
  }
  if (logSumExp === null && options.returnLogSumExp === true) {
    logSumExp = makeTensor('float32', allocateAt(place, 'float32', batch * heads * queries), lseDims);
  }
  const result: AttentionResult = logSumExp === null ? { output } : { output, logSumExp };
  const { pools, table, starts, lengths } = cache.beginRead(sequences);
  const list = [
    ...args,
    CACHE_CODE[pools.type],
    pools.keys,
    pools.values,
    pools.keyScales,
    pools.valueScales,
    pools.pageSize,
    table,
    batch === 0 ? 0 : table.length / batch,
    starts,
    lengths,
    output.data,
    result.logSumExp?.data ?? null,
  ];
  return { args: list, result };
}

/** Pages on the device are read there, and only there; q goes to them, never they to q. */
function checkCacheDevice(
  query: Tensor,
  cache: KVCache,
  options: (DecodeAttentionOptions & OpOptions) | undefined,
): void {
  if (cache.device === 'cpu' && isOnDevice(query)) {
    throw new HeddleError(
      'ERR_ARGUMENT',
      "decodeAttention: q is on cuda but the cache is on cpu; make the cache with device 'cuda' or await q.to('cpu')",
    );
  }
  const backend = options?.backend;
  if (cache.device === 'cuda' && backend !== undefined && backend !== 'auto' && backend !== 'cuda') {
    throw new HeddleError(
      'ERR_BACKEND',
      `decodeAttention: the cache is on cuda, which backend ${backend} cannot read; use backend cuda`,
    );
  }
}

/**
 * Attention of the newest tokens over a {@link KVCache}: query i of n sees its sequence's tokens up to the one that
 * stands n - 1 - i before the end. Append their keys and values first.
 *
 * Keys are split into parts of fixed size, computed in parallel and merged in a fixed order: a sequence's result is
 * bitwise the same in any batch, on any number of threads, and whether its pages are shared or not. In a cache with a
 * `window` the result has the same bits as in one that keeps everything. While a call is
 * running its sequences may be extended, truncated or freed: it reads the tokens that were there when it began.
 * A cache on the device is read there, without copies of its pages; q may be there or on the CPU, and results are where
 * q is.
 *
 * @param q `[batch, queries, heads, headDim]` float32, bfloat16 or float16; heads a multiple of the cache's
 * @throws HeddleError as {@link attention}; `ERR_ARGUMENT` for a sequence that does not exist, or for q on the
 *   device and a cache that is not; `ERR_DISPOSED`
 */
export async function decodeAttention(
  q: TensorLike,
  cache: KVCache,
  options: DecodeAttentionOptions & AsyncOpOptions,
): Promise<AttentionResult> {
  const { args, result } = prepare(q, cache, options);
  try {
    await call(op, args, options);
  } finally {
    cache.endRead();
  }
  return result;
}

/** {@link decodeAttention} on the calling thread (and helpers, when `threads` > 1). */
export function decodeAttentionSync(
  q: TensorLike,
  cache: KVCache,
  options: DecodeAttentionOptions & OpOptions,
): AttentionResult {
  const { args, result } = prepare(q, cache, options);
  try {
    callSync(op, args, options);
  } finally {
    cache.endRead();
  }
  return result;
}
