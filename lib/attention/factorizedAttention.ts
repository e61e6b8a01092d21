import { allocateAt, placeOf } from '../device.ts';
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
import { asTensor, makeTensor, type Tensor, type TensorLike } from '../tensor.ts';
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

/** A given output, contiguous or strided, after its checks. */
function givenOutput(
  given: TensorLike | undefined,
  strides: readonly number[] | undefined,
  dims: readonly number[],
  type: FloatType,
  inputs: readonly Tensor[],
  name: string,
): Tensor<FloatType> | null {
  if (given === undefined) {
    if (strides !== undefined)
      throw new HeddleError('ERR_OPTION', `output strides need ${name}: what they describe`);
    return null;
  }
  const { tensor } = asInput(given, strides, name, dims.length, 'device');
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
  const p = prepareFactorized('factorizedAttention', q, k, v, options);
  const { type } = p.query;
  const out = options.out;
  const givenAs = (
    t: TensorLike | undefined,
    strides: readonly number[] | undefined,
    dims: number[],
    name: string,
  ) => givenOutput(t, strides, dims, type, p.inputs, name);
  const output = givenAs(out?.output, options.strides?.output, p.outputDims, 'out.output');
  let logSumExp: Tensor<'float32'> | null = null;
  if (out?.logSumExp !== undefined) {
    logSumExp = asTensor(out.logSumExp, 'out.logSumExp', ['float32'], undefined, 'device');
    checkOut(logSumExp, p.lseDims, output === null ? p.inputs : [...p.inputs, output], 'out.logSumExp');
  }
  let classToken: Tensor<FloatType> | null = null;
  const classDims = [p.batch, 1, ...p.outputDims.slice(3)];
  if (p.classToken !== undefined) {
    const strides = options.classToken?.strides?.output;
    classToken = givenAs(out?.classToken, strides, classDims, 'out.classToken');
  }
  placeOf('factorizedAttention', options, {
    q: p.query,
    'out.output': output,
    'out.logSumExp': logSumExp,
    'out.classToken': classToken,
  });

  const make = <T extends FloatType>(t: T, dims: readonly number[]) =>
    makeTensor(t, allocateAt(p.place, t, product(dims)), dims);
  const result: FactorizedAttentionResult = { output: output ?? make(type, p.outputDims) };
  if (logSumExp !== null || options.returnLogSumExp === true) {
    result.logSumExp = logSumExp ?? make('float32', p.lseDims);
  }
  if (p.classToken !== undefined) result.classToken = classToken ?? make(type, classDims);
  return {
    args: [...p.args, result.output.data, result.logSumExp?.data ?? null, result.classToken?.data ?? null],
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
 * A row has the same bits as from {@link attention} on a transposed copy. Tensors on the device (all of them: `tokens`
 * and numbers per head may stay on the host) are read in place there, and so are the results.
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
