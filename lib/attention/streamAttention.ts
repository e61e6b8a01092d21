import { DTYPE_CODE, FLOAT_TYPES, type FloatType, writeFloat } from '../dtype.ts';
import { HeddleError } from '../errors.ts';
import { type AsyncOpOptions, call, checkOptions, type Op, optionInteger } from '../op.ts';
import { streamAttentionReference } from '../reference/attention/streamAttention.ts';
import { allocate, asTensor, makeTensor, type Tensor, type TensorLike } from '../tensor.ts';
import {
  BLOCK_TYPES,
  type BlockType,
  type KeyValueBlock,
  type KeyValueSource,
  openBlocks,
} from './keyValueSource.ts';
import { type AttentionOptions, type HeadVector, type Prepared, prepareAttention } from './options.ts';

export interface StreamAttentionOptions extends AsyncOpOptions {
  /** Query i of n stands at key i + totalKeys - n and sees keys up to there. Default false. */
  causal?: boolean;
  window?: AttentionOptions['window'];
  softcap?: AttentionOptions['softcap'];
  scale?: AttentionOptions['scale'];
  alibiSlopes?: HeadVector;
  sinks?: HeadVector;
  /** Position of the source's first key. Default 0. */
  keyOffset?: number;
  /**
   * Keys in all. Default: keyOffset + those of the source. Causal, window and alibiSlopes need it when the source is
   * an iterable, which does not tell how many it has.
   */
  totalKeys?: number;
  /** Tokens of a block, for sources in memory and files. Default: about 8 MiB, a multiple of 1,024. */
  blockTokens?: number;
  /** Also return each row's largest visible key. Default false. */
  returnArgmax?: boolean;
  /** Called after every block. */
  onProgress?(progress: { tokens: number; total: number | undefined }): void;
}

export interface StreamAttentionResult {
  /** q's dims with valueDim as the last, in q's type. */
  output: Tensor<FloatType>;
  /** `[heads, queries]` natural log of the softmax's denominator; -Infinity for rows that see no key. */
  logSumExp: Tensor<'float32'>;
  /** Keys that came. */
  keys: number;
  /** `[heads, queries]` each: the first visible key with the largest logit (-1: none), that logit, and its weight. */
  argmax?: { index: Float64Array; logit: Float64Array; weight: Float64Array };
}

const OPTIONS: ReadonlySet<string> = new Set([
  'causal',
  'window',
  'softcap',
  'scale',
  'alibiSlopes',
  'sinks',
  'keyOffset',
  'totalKeys',
  'blockTokens',
  'returnArgmax',
  'onProgress',
  'backend',
  'threads',
  'signal',
]);
/** Numbers of a row's state before its sums: shift, total, best logit (both in units of ln 2), its key. */
const STATE_HEAD = 4;

const op: Op = { name: 'streamAttention', reference: streamAttentionReference };

/** What all blocks have in common, from the first one. */
interface Stream {
  prepared: Prepared;
  type: BlockType;
  keyHeads: number;
  dim: number;
  valueDim: number;
  state: Float64Array;
}

function aborted(signal: AbortSignal): HeddleError {
  return new HeddleError('ERR_ABORTED', 'streamAttention was aborted', { cause: signal.reason });
}

/** The promise's value, or a rejection as soon as the signal fires. */
async function unlessAborted<T>(promise: Promise<T> | T, signal: AbortSignal | undefined): Promise<T> {
  if (signal === undefined) return promise;
  if (signal.aborted) throw aborted(signal);
  let stop: (() => void) | undefined;
  try {
    return await Promise.race([
      promise,
      new Promise<never>((_, reject) => {
        stop = () => reject(aborted(signal));
        signal.addEventListener('abort', stop, { once: true });
      }),
    ]);
  } finally {
    if (stop) signal.removeEventListener('abort', stop);
  }
}

function checkBlock(block: KeyValueBlock, index: number, s: Stream | undefined) {
  const name = `block ${index}`;
  if (block === null || typeof block !== 'object') {
    throw new HeddleError('ERR_ARGUMENT', `${name}: expected { keys, values }, got ${String(block)}`);
  }
  const k = asTensor(block.keys, `${name}: keys`, BLOCK_TYPES, 3);
  const v = asTensor(block.values, `${name}: values`, s === undefined ? [k.type] : [s.type], 3);
  if (s !== undefined && k.type !== s.type) {
    throw new HeddleError('ERR_DTYPE', `${name}: keys: expected ${s.type} as in block 0, got ${k.type}`);
  }
  const heads = s?.keyHeads ?? k.dims[1];
  const wanted = [
    [k, 'keys', k.dims[0], s?.dim ?? k.dims[2]],
    [v, 'values', k.dims[0], s?.valueDim ?? v.dims[2]],
  ] as const;
  for (const [t, part, tokens, dim] of wanted) {
    if (t.dims[0] !== tokens || t.dims[1] !== heads || t.dims[2] !== dim) {
      const expected = `[${tokens}, ${heads}, ${dim}]`;
      throw new HeddleError(
        'ERR_SHAPE',
        `${name}: ${part}: expected ${expected}, got [${t.dims.join(', ')}]`,
      );
    }
  }
  for (const part of ['keyScales', 'valueScales'] as const) {
    const scales = block[part];
    if (scales === undefined) continue;
    if (!(scales instanceof Float32Array) || scales.length !== k.dims[0] * heads) {
      throw new HeddleError('ERR_SHAPE', `${name}: ${part}: expected a Float32Array of ${k.dims[0] * heads}`);
    }
  }
  return { k, v };
}

function start(query: Tensor<FloatType>, k: Tensor, v: Tensor, options: StreamAttentionOptions): Stream {
  const [keyHeads, dim, valueDim] = [k.dims[1], k.dims[2], v.dims[2]];
  const none = (d: number) => makeTensor(query.type, allocate(query.type, 0), [1, 0, keyHeads, d]);
  const { causal, window, softcap, scale, alibiSlopes, sinks } = options;
  const given = { causal, window, softcap, scale, alibiSlopes, sinks };
  const prepared = prepareAttention(query, none(dim), none(valueDim), given);
  const [, queries, heads] = query.dims;
  const state = new Float64Array(queries * heads * (STATE_HEAD + valueDim));
  for (let i = 0; i < state.length; i += STATE_HEAD + valueDim) {
    state[i] = -Infinity;
    state[i + 2] = -Infinity;
    state[i + 3] = -1;
  }
  return { prepared, type: k.type as BlockType, keyHeads, dim, valueDim, state };
}

function finish(s: Stream, dims: readonly number[], keys: number, wantBest: boolean): StreamAttentionResult {
  const { query, args } = s.prepared;
  const [, queries, heads] = query.dims;
  const sinks = args[8];
  const output = makeTensor(query.type, allocate(query.type, queries * heads * s.valueDim), [
    ...dims.slice(0, -1),
    s.valueDim,
  ]);
  const lse = new Float32Array(heads * queries);
  const best = () => new Float64Array(heads * queries);
  const argmax = wantBest ? { index: best(), logit: best(), weight: best() } : undefined;
  for (let row = 0; row < queries * heads; row++) {
    const at = row * (STATE_HEAD + s.valueDim);
    const [shift, total, logit, index] = s.state.subarray(at, at + STATE_HEAD);
    const head = row % heads;
    const sink = sinks === null ? -Infinity : sinks[head] / Math.LN2;
    const top = Math.max(shift, sink);
    const empty = top === -Infinity && total === 0;
    const own = shift === -Infinity && total === 0 ? 0 : 2 ** (shift === -Infinity ? 0 : shift - top);
    const sum = total * own + (sink === -Infinity ? 0 : 2 ** (sink - top));
    for (let c = 0; c < s.valueDim; c++) {
      const x = empty ? 0 : (s.state[at + STATE_HEAD + c] * own) / sum;
      writeFloat(output.data, DTYPE_CODE[query.type], row * s.valueDim + c, x);
    }
    const to = head * queries + Math.floor(row / heads);
    lse[to] = empty ? -Infinity : (top === -Infinity ? 0 : top) * Math.LN2 + Math.log(sum);
    if (argmax === undefined) continue;
    argmax.index[to] = index;
    argmax.logit[to] = logit * Math.LN2;
    argmax.weight[to] = index < 0 ? 0 : 2 ** (logit - top) / sum;
  }
  const result: StreamAttentionResult = {
    output,
    logSumExp: makeTensor('float32', lse, [heads, queries]),
    keys,
  };
  if (argmax !== undefined) result.argmax = argmax;
  return result;
}

/**
 * Exact attention over keys and values that do not fit into memory: they come block by block, and at most two blocks
 * are in flight (one is read while the other is computed). Ten million keys and more.
 *
 * Products and the softmax of 1,024 keys at a time are float32, as in {@link attention}; these parts are added up in
 * float64 in key order. Results do not depend on threads, nor on the blocks when all but the last have a multiple of
 * 1,024 tokens.
 *
 * An iterable may use a block's memory again once the block after the next is asked for.
 *
 * @param q `[queries, heads, dim]` or `[1, queries, heads, dim]` float32, bfloat16 or float16
 * @throws HeddleError as {@link attention}; `ERR_SHAPE` or `ERR_DTYPE` for a block that does not fit the first,
 *   `ERR_VALUE` for more keys than totalKeys or none at all, `ERR_CHECKPOINT` for files, and what an iterable throws
 */
export async function streamAttention(
  q: TensorLike,
  source: KeyValueSource,
  options: StreamAttentionOptions = {},
): Promise<StreamAttentionResult> {
  checkOptions(options, OPTIONS, 'streamAttention');
  const given = asTensor(q, 'q', FLOAT_TYPES);
  const dims = given.dims;
  if (dims.length !== 3 && !(dims.length === 4 && dims[0] === 1)) {
    throw new HeddleError(
      'ERR_SHAPE',
      `q: expected [queries, heads, dim] or a batch of 1, got [${dims.join(', ')}]`,
    );
  }
  const query = makeTensor(given.type, given.data, dims.length === 3 ? [1, ...dims] : dims);
  const offset = optionInteger(options.keyOffset ?? 0, 0, Number.MAX_SAFE_INTEGER, 'keyOffset');
  const blockTokens =
    options.blockTokens === undefined
      ? undefined
      : optionInteger(options.blockTokens, 1, 2 ** 31 - 1, 'blockTokens');
  const { signal } = options;
  if (signal?.aborted) throw aborted(signal);
  const blocks = await openBlocks(source, blockTokens, signal);
  const { iterator } = blocks;
  let pending: Promise<IteratorResult<KeyValueBlock>> | undefined;
  const advance = () => {
    pending = Promise.resolve(iterator.next());
    pending.catch(() => {}); // it is awaited later, or not at all after an error
  };
  let stream: Stream | undefined;
  let tokens = 0;
  try {
    const known = blocks.tokens === undefined ? undefined : offset + blocks.tokens;
    const total =
      options.totalKeys === undefined
        ? known
        : optionInteger(options.totalKeys, known ?? offset, Number.MAX_SAFE_INTEGER, 'totalKeys');
    const placed =
      options.causal === true ||
      options.alibiSlopes !== undefined ||
      options.window?.some((x) => x >= 0) === true;
    if (placed && total === undefined) {
      throw new HeddleError(
        'ERR_OPTION',
        'totalKeys must be given: causal, window and alibiSlopes count from the last key',
      );
    }
    advance();
    for (let index = 0; ; index++) {
      const step = await unlessAborted(pending as Promise<IteratorResult<KeyValueBlock>>, signal);
      if (step.done) break;
      const block = step.value;
      const { k, v } = checkBlock(block, index, stream);
      advance();
      stream ??= start(query, k, v, options);
      const count = k.dims[0];
      if (total !== undefined && offset + tokens + count > total) {
        throw new HeddleError('ERR_VALUE', `block ${index}: key ${total} and later pass totalKeys`);
      }
      const args = [
        ...stream.prepared.args,
        DTYPE_CODE[stream.type],
        k.data,
        v.data,
        block.keyScales ?? null,
        block.valueScales ?? null,
        count,
        offset + tokens,
        total ?? query.dims[1],
        stream.state,
        options.returnArgmax === true,
      ];
      if (count > 0) await call(op, args, options);
      tokens += count;
      options.onProgress?.({ tokens, total: total === undefined ? undefined : total - offset });
    }
  } finally {
    // Ends a generator that has more; one that hangs must not hold this call up.
    void Promise.resolve(iterator.return?.()).catch(() => {});
  }
  if (stream === undefined)
    throw new HeddleError('ERR_VALUE', 'source: it has no block, so its dims are unknown');
  return finish(stream, dims, tokens, options.returnArgmax === true);
}
