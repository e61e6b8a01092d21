import { allocateAt, placeOf } from '../device.ts';
import type { FloatType } from '../dtype.ts';
import {
  type AsyncOpOptions,
  call,
  callSync,
  checkOptions,
  checkOut,
  type Op,
  type OpOptions,
} from '../op.ts';
import { attentionReference } from '../reference/attention/attention.ts';
import { asTensor, makeTensor, type Tensor, type TensorLike } from '../tensor.ts';
import { ATTENTION_OPTION_NAMES, type AttentionOptions, prepareAttention } from './options.ts';

/** What {@link attention} returns. */
export interface AttentionResult {
  /** `[batch, queries, heads, value dim]` in q's type. */
  output: Tensor<FloatType>;
  /** `[batch, heads, queries]` natural log of the softmax's denominator (sink included); -Infinity for empty rows. */
  logSumExp?: Tensor<'float32'>;
}

export interface AttentionForwardOptions extends AttentionOptions {
  /** Also return the log-sum-exp of each row, which {@link attentionBackward} and merges need. Default false. */
  returnLogSumExp?: boolean;
  out?: AttentionResult;
}

const OPTIONS: ReadonlySet<string> = new Set([
  ...ATTENTION_OPTION_NAMES,
  'returnLogSumExp',
  'out',
  'backend',
  'threads',
  'signal',
]);

const op: Op = { name: 'attention', reference: attentionReference };

function prepare(
  q: TensorLike,
  k: TensorLike,
  v: TensorLike,
  options: AttentionForwardOptions | undefined,
): { args: unknown[]; result: AttentionResult } {
  checkOptions(options, OPTIONS, 'attention');
  const { args, inputs, query, value, named } = prepareAttention(q, k, v, options, 'device');
  const [batch, queries, heads] = query.dims;
  const dims = [batch, queries, heads, value.dims[3]];
  const lseDims = [batch, heads, queries];
  const out = options?.out;
  let output: Tensor<FloatType> | null = null;
  let logSumExp: Tensor<'float32'> | null = null;
  if (out !== undefined) {
    output = asTensor(out.output, 'out.output', [query.type], undefined, 'device');
    checkOut(output, dims, inputs, 'out.output');
  }
  if (out?.logSumExp !== undefined) {
    logSumExp = asTensor(out.logSumExp, 'out.logSumExp', ['float32'], undefined, 'device');
    checkOut(logSumExp, lseDims, output === null ? inputs : [...inputs, output], 'out.logSumExp');
  }
  const place = placeOf('attention', options, { ...named, 'out.output': output, 'out.logSumExp': logSumExp });
  if (output === null) {
    const count = dims[0] * dims[1] * dims[2] * dims[3];
    output = makeTensor(query.type, allocateAt(place, query.type, count), dims);
  }
  if (logSumExp === null && options?.returnLogSumExp === true) {
    logSumExp = makeTensor('float32', allocateAt(place, 'float32', batch * heads * queries), lseDims);
  }
  const result: AttentionResult = logSumExp === null ? { output } : { output, logSumExp };
  return { args: [...args, output.data, result.logSumExp?.data ?? null], result };
}

/**
 * Exact attention: `softmax(mask(softcap(scale * q k^T) + bias)) v`, in blocks, without a score matrix.
 *
 * Grouped-query attention follows from the head counts: query head h reads key head `floor(h * keyHeads / heads)`.
 * float32, bfloat16 and float16 inputs accumulate in float32; the output has q's type. What is masked does not
 * exist: its NaN or infinite keys and values never reach the output. A NaN among the visible logits makes its row NaN.
 * Each row is bitwise the same in any batch, among any other queries, and on any number of threads. Where the tensors
 * are on the device, so are the results; slopes and sinks may be on either, segments and blockIds are on the CPU.
 *
 * @param q `[batch, queries, heads, dim]`, dim 1 to 512
 * @param k `[batch, keys, keyHeads, dim]`; heads must be a multiple of keyHeads
 * @param v `[batch, keys, keyHeads, valueDim]`
 * @throws HeddleError `ERR_ARGUMENT`, `ERR_SHAPE`, `ERR_DTYPE`, `ERR_OPTION`, `ERR_VALUE`, `ERR_BACKEND`,
 *   `ERR_ABORTED`, `ERR_MEMORY`
 */
export async function attention(
  q: TensorLike,
  k: TensorLike,
  v: TensorLike,
  options?: AttentionForwardOptions & AsyncOpOptions,
): Promise<AttentionResult> {
  const { args, result } = prepare(q, k, v, options);
  await call(op, args, options);
  return result;
}

/** {@link attention} on the calling thread (and helpers, when `threads` > 1). */
export function attentionSync(
  q: TensorLike,
  k: TensorLike,
  v: TensorLike,
  options?: AttentionForwardOptions & OpOptions,
): AttentionResult {
  const { args, result } = prepare(q, k, v, options);
  callSync(op, args, options);
  return result;
}
