import { isOnDevice, placeOf } from '../device.ts';
import type { FloatType } from '../dtype.ts';
import { HeddleError } from '../errors.ts';
import { type AsyncOpOptions, call, callSync, checkOptions, type Op, type OpOptions } from '../op.ts';
import { factorizedAttentionBackwardReference } from '../reference/attention/factorizedAttentionBackward.ts';
import { checkDims, type Tensor, type TensorLike } from '../tensor.ts';
import {
  FACTORIZED_OPTION_NAMES,
  type FactorizedAttentionOptions,
  prepareFactorized,
} from './factorizedOptions.ts';
import { gradientTensor, tensorOfShape } from './gradientTensor.ts';
import { asInput } from './options.ts';

/** Gradients of {@link factorizedAttention}, contiguous, in the dims and type of their inputs. */
export interface FactorizedAttentionGradients {
  query: Tensor<FloatType>;
  key: Tensor<FloatType>;
  value: Tensor<FloatType>;
  /** float32, in the dims of the bias; present when there is one. */
  bias?: Tensor<'float32'>;
  /** Present when a class token takes part. */
  classToken?: { query: Tensor<FloatType>; key: Tensor<FloatType>; value: Tensor<FloatType> };
}

export interface FactorizedAttentionBackwardOptions extends FactorizedAttentionOptions {
  /** What {@link factorizedAttention} returned; read with `strides.output`. */
  output: TensorLike;
  /** What {@link factorizedAttention} returned with `returnLogSumExp`. */
  logSumExp: TensorLike;
  /** Gradient of the class token's output, when it takes part: `[batch, 1, heads, value dim]`. */
  gradClassToken?: TensorLike;
  /** Ignored: the forward's options may be passed on as they are. */
  returnLogSumExp?: boolean;
  out?: FactorizedAttentionGradients;
}

const OPTIONS: ReadonlySet<string> = new Set([
  ...FACTORIZED_OPTION_NAMES,
  'output',
  'logSumExp',
  'gradClassToken',
  'returnLogSumExp',
  'out',
  'backend',
  'threads',
  'signal',
]);

const op: Op = { name: 'factorizedAttentionBackward', reference: factorizedAttentionBackwardReference };

function prepare(
  gradOutput: TensorLike,
  q: TensorLike,
  k: TensorLike,
  v: TensorLike,
  options: FactorizedAttentionBackwardOptions,
): { args: unknown[]; result: FactorizedAttentionGradients } {
  checkOptions(options, OPTIONS, 'factorizedAttentionBackward');
  const p = prepareFactorized('factorizedAttentionBackward', q, k, v, options);
  if (options.output === undefined || options.logSumExp === undefined) {
    throw new HeddleError(
      'ERR_ARGUMENT',
      'factorizedAttentionBackward: options output and logSumExp are required',
    );
  }
  const type = p.query.type;
  const upstream = tensorOfShape(gradOutput, type, p.outputDims, 'gradOutput');
  const rank = p.outputDims.length;
  const output = asInput(options.output, options.strides?.output, 'output', rank, 'device').tensor;
  if (output.type !== type)
    throw new HeddleError('ERR_DTYPE', `output: expected ${type} as q, got ${output.type}`);
  checkDims(output, p.outputDims, 'output');
  const logSumExp = tensorOfShape(options.logSumExp, 'float32', p.lseDims, 'logSumExp');
  const all: Tensor[] = [...p.inputs, upstream, output, logSumExp];
  let classUpstream: Tensor<FloatType> | undefined;
  if (p.classToken !== undefined) {
    if (options.gradClassToken === undefined) {
      throw new HeddleError('ERR_ARGUMENT', 'gradClassToken is required with a class token over space');
    }
    const dims = [p.batch, 1, ...p.outputDims.slice(3)];
    classUpstream = tensorOfShape(options.gradClassToken, type, dims, 'gradClassToken');
    all.push(classUpstream);
  }
  const out = options.out;
  const place = placeOf('factorizedAttentionBackward', options, {
    q: p.query,
    gradOutput: upstream,
    output,
    logSumExp,
    gradClassToken: classUpstream,
    'out.query': out?.query,
    'out.key': out?.key,
    'out.value': out?.value,
    'out.bias': out?.bias,
    'out.classToken.query': out?.classToken?.query,
    'out.classToken.key': out?.classToken?.key,
    'out.classToken.value': out?.classToken?.value,
  });
  const gradient = <T extends FloatType>(
    given: TensorLike | undefined,
    t: T,
    dims: readonly number[],
    name: string,
  ) => gradientTensor(given, t, dims, all, `out.${name}`, place);
  const result: FactorizedAttentionGradients = {
    query: gradient(out?.query, type, p.query.dims, 'query'),
    key: gradient(out?.key, type, p.key.dims, 'key'),
    value: gradient(out?.value, type, p.value.dims, 'value'),
  };
  if (options.bias !== undefined) {
    result.bias = gradient(out?.bias, 'float32', options.bias.dims, 'bias');
    if (!isOnDevice(result.bias)) result.bias.data.fill(0); // the CPU and the reference add to it
  }
  if (p.classToken !== undefined) {
    const { query, key, value } = p.classToken;
    const given = out?.classToken;
    result.classToken = {
      query: gradient(given?.query, type, query.tensor.dims, 'classToken.query'),
      key: gradient(given?.key, type, key.tensor.dims, 'classToken.key'),
      value: gradient(given?.value, type, value.tensor.dims, 'classToken.value'),
    };
  }
  const args = [
    ...p.args,
    upstream.data,
    output.data,
    logSumExp.data,
    classUpstream?.data ?? null,
    result.query.data,
    result.key.data,
    result.value.data,
    result.bias?.data ?? null,
    result.classToken?.query.data ?? null,
    result.classToken?.key.data ?? null,
    result.classToken?.value.data ?? null,
  ];
  return { args, result };
}

/**
 * Gradients of `sum(gradOutput * output)` of {@link factorizedAttention} (and of `sum(gradClassToken * classToken)`)
 * by q, k, v, the bias and the class token. The same options as the forward, and its results. Sinks, slopes and masks
 * are constants. Deterministic: the same bits in every run and on any number of threads. Where the tensors are on the
 * device, so are the gradients; numbers per head and `tokens` may stay on the host.
 *
 * @param gradOutput in the dims and type of the output, contiguous
 * @throws HeddleError as {@link factorizedAttention}
 */
export async function factorizedAttentionBackward(
  gradOutput: TensorLike,
  q: TensorLike,
  k: TensorLike,
  v: TensorLike,
  options: FactorizedAttentionBackwardOptions & AsyncOpOptions,
): Promise<FactorizedAttentionGradients> {
  const { args, result } = prepare(gradOutput, q, k, v, options);
  await call(op, args, options);
  return result;
}

/** {@link factorizedAttentionBackward} on the calling thread (and helpers, when `threads` > 1). */
export function factorizedAttentionBackwardSync(
  gradOutput: TensorLike,
  q: TensorLike,
  k: TensorLike,
  v: TensorLike,
  options: FactorizedAttentionBackwardOptions & OpOptions,
): FactorizedAttentionGradients {
  const { args, result } = prepare(gradOutput, q, k, v, options);
  callSync(op, args, options);
  return result;
}
