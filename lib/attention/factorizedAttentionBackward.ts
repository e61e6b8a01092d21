import type { FloatType } from '../dtype.ts';
import { HeddleError } from '../errors.ts';
import { type AsyncOpOptions, call, callSync, checkOptions, type Op, type OpOptions } from '../op.ts';
import { factorizedAttentionBackwardReference } from '../reference/attention/factorizedAttentionBackward.ts';
import { asTensor, checkDims, type Tensor, type TensorLike } from '../tensor.ts';
import {
  FACTORIZED_OPTION_NAMES,
  type FactorizedAttentionOptions,
  prepareFactorized,
} from './factorizedOptions.ts';
import { gradientTensor } from './gradientTensor.ts';
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

function ofShape<T extends FloatType>(value: TensorLike, type: T, dims: readonly number[], name: string) {
  const t = asTensor(value, name, [type]);
  checkDims(t, dims, name);
  return t;
}

function prepare(
  gradOutput: TensorLike,
  q: TensorLike,
  k: TensorLike,
  v: TensorLike,
  options: FactorizedAttentionBackwardOptions,
): { args: unknown[]; result: FactorizedAttentionGradients } {
  checkOptions(options, OPTIONS, 'factorizedAttentionBackward');
  const p = prepareFactorized(q, k, v, options);
  if (options.output === undefined || options.logSumExp === undefined) {
    throw new HeddleError(
      'ERR_ARGUMENT',
      'factorizedAttentionBackward: options output and logSumExp are required',
    );
  }
  const type = p.query.type;
  const upstream = ofShape(gradOutput, type, p.outputDims, 'gradOutput');
  const output = asInput(options.output, options.strides?.output, 'output', p.outputDims.length).tensor;
  if (output.type !== type)
    throw new HeddleError('ERR_DTYPE', `output: expected ${type} as q, got ${output.type}`);
  checkDims(output, p.outputDims, 'output');
  const logSumExp = ofShape(options.logSumExp, 'float32', p.lseDims, 'logSumExp');
  const all: Tensor[] = [...p.inputs, upstream, output, logSumExp];
  let classUpstream: Tensor<FloatType> | undefined;
  if (p.classToken !== undefined) {
    if (options.gradClassToken === undefined) {
      throw new HeddleError('ERR_ARGUMENT', 'gradClassToken is required with a class token over space');
    }
    const dims = [p.batch, 1, ...p.outputDims.slice(3)];
    classUpstream = ofShape(options.gradClassToken, type, dims, 'gradClassToken');
    all.push(classUpstream);
  }
  const out = options.out;
  const result: FactorizedAttentionGradients = {
    query: gradientTensor(out?.query, type, p.query.dims, all, 'out.query'),
    key: gradientTensor(out?.key, type, p.key.dims, all, 'out.key'),
    value: gradientTensor(out?.value, type, p.value.dims, all, 'out.value'),
  };
  if (options.bias !== undefined) {
    result.bias = gradientTensor(out?.bias, 'float32', options.bias.dims, all, 'out.bias');
    result.bias.data.fill(0); // both backends add to it
  }
  if (p.classToken !== undefined) {
    const { query, key, value } = p.classToken;
    const given = out?.classToken;
    result.classToken = {
      query: gradientTensor(given?.query, type, query.tensor.dims, all, 'out.classToken.query'),
      key: gradientTensor(given?.key, type, key.tensor.dims, all, 'out.classToken.key'),
      value: gradientTensor(given?.value, type, value.tensor.dims, all, 'out.classToken.value'),
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
 * are constants. Deterministic: the same bits in every run and on any number of threads.
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
