import type { FloatType } from '../dtype.ts';
import { HeddleError } from '../errors.ts';
import {
  type AsyncOpOptions,
  call,
  callSync,
  checkOptions,
  checkOut,
  type Op,
  type OpOptions,
} from '../op.ts';
import { factorizedAttentionReference } from '../reference/attention/factorizedAttention.ts';
import { allocate, asTensor, makeTensor, type Tensor, type TensorLike } from '../tensor.ts';
import {
  FACTORIZED_OPTION_NAMES,
  type FactorizedAttentionOptions,
  prepareFactorized,
} from './factorizedOptions.ts';
import { asInput } from './options.ts';

/** What {@link factorizedAttention} returns. */
export interface FactorizedAttentionResult {
  /** In the dims of q with v's head dim, in q's type. */
  output: Tensor<FloatType>;
  /** `[batch, heads, frames, patches]`; of packed tokens `[heads, tokens]` or `[batch, heads, tokens]`. */
  logSumExp?: Tensor<'float32'>;
  /** `[batch, 1, heads, value dim]`: the class token's output, when it takes part. */
  classToken?: Tensor<FloatType>;
}

export interface FactorizedAttentionForwardOptions extends FactorizedAttentionOptions {
  /** Also return the log-sum-exp of each row, which {@link factorizedAttentionBackward} needs. Default false. */
  returnLogSumExp?: boolean;
  out?: FactorizedAttentionResult;
}

const OPTIONS: ReadonlySet<string> = new Set([
  ...FACTORIZED_OPTION_NAMES,
  'returnLogSumExp',
  'out',
  'backend',
  'threads',
  'signal',
]);

const op: Op = { name: 'factorizedAttention', reference: factorizedAttentionReference };

const product = (dims: readonly number[]) => dims.reduce((a, b) => a * b, 1);

/** A given output, contiguous or strided, or a new one. */
function outputOf(
  given: TensorLike | undefined,
  strides: readonly number[] | undefined,
  dims: readonly number[],
  type: FloatType,
  inputs: readonly Tensor[],
  name: string,
): Tensor<FloatType> {
  if (given === undefined) {
    if (strides !== undefined)
      throw new HeddleError('ERR_OPTION', `output strides need ${name}: what they describe`);
    return makeTensor(type, allocate(type, product(dims)), dims);
  }
  const { tensor } = asInput(given, strides, name, dims.length);
  if (tensor.type !== type) {
    throw new HeddleError('ERR_DTYPE', `${name}: expected ${type} as q, got ${tensor.type}`);
  }
  checkOut(tensor, dims, inputs, name);
  return tensor;
}

function prepare(
  q: TensorLike,
  k: TensorLike,
  v: TensorLike,
  options: FactorizedAttentionForwardOptions,
): { args: unknown[]; result: FactorizedAttentionResult } {
  checkOptions(options, OPTIONS, 'factorizedAttention');
  const p = prepareFactorized(q, k, v, options);
  const { type } = p.query;
  const out = options.out;
  const output = outputOf(out?.output, options.strides?.output, p.outputDims, type, p.inputs, 'out.output');
  const result: FactorizedAttentionResult = { output };
  if (options.returnLogSumExp === true || out?.logSumExp !== undefined) {
    if (out?.logSumExp === undefined) {
      result.logSumExp = makeTensor('float32', new Float32Array(product(p.lseDims)), p.lseDims);
    } else {
      result.logSumExp = asTensor(out.logSumExp, 'out.logSumExp', ['float32']);
      checkOut(result.logSumExp, p.lseDims, [...p.inputs, output], 'out.logSumExp');
    }
  }
  if (p.classToken !== undefined) {
    const dims = [p.batch, 1, ...p.outputDims.slice(3)];
    const strides = options.classToken?.strides?.output;
    result.classToken = outputOf(out?.classToken, strides, dims, type, p.inputs, 'out.classToken');
  }
  return {
    args: [...p.args, output.data, result.logSumExp?.data ?? null, result.classToken?.data ?? null],
    result,
  };
}

/**
 * Attention of video tokens over one axis: what {@link attention} computes, without a transposed copy.
 *
 * - `'joint'`: each token sees all tokens of its batch entry (ViViT, model 1). Causal and window count frames: a token
 *   sees whole frames.
 * - `'time'`: each token sees the tokens at its patch in all frames; `batch * patches` sequences of `frames`.
 * - `'space'`: each token sees the tokens of its frame; `batch * frames` sequences of `patches`.
 * - `'split-heads'`: the first half of the heads attends over time, the second over space (ViViT, model 4: factorized
 *   dot-product attention). Causal and window apply to the heads over time.
 *
 * Bias and mask are `[sequences of a batch entry, heads, length, length]` with the batch in front, or without the
 * sequences (rank 4), each dim but the last possibly 1. With a class token over space, place 0 of a sequence is the
 * class token. With `tokens`, sequences are those kept tokens that share a patch or frame; window and ALiBi count
 * kept tokens. Definitions: Arnab et al. 2021 (ViViT), Bertasius et al. 2021 (TimeSformer).
 *
 * A row has the same bits as from {@link attention} on a transposed copy.
 *
 * @param q `[batch, frames, patches, heads, dim]`; with `tokens` `[tokens, heads, dim]`, or `[batch, tokens, heads,
 *   dim]` where every batch entry keeps as many
 * @param k as q, with key heads that divide the heads
 * @param v as k, with its own head dim
 * @throws HeddleError `ERR_ARGUMENT`, `ERR_SHAPE`, `ERR_DTYPE`, `ERR_OPTION`, `ERR_VALUE`, `ERR_BACKEND`,
 *   `ERR_ABORTED`, `ERR_MEMORY`
 */
export async function factorizedAttention(
  q: TensorLike,
  k: TensorLike,
  v: TensorLike,
  options: FactorizedAttentionForwardOptions & AsyncOpOptions,
): Promise<FactorizedAttentionResult> {
  const { args, result } = prepare(q, k, v, options);
  await call(op, args, options);
  return result;
}

/** {@link factorizedAttention} on the calling thread (and helpers, when `threads` > 1). */
export function factorizedAttentionSync(
  q: TensorLike,
  k: TensorLike,
  v: TensorLike,
  options: FactorizedAttentionForwardOptions & OpOptions,
): FactorizedAttentionResult {
  const { args, result } = prepare(q, k, v, options);
  callSync(op, args, options);
  return result;
}
