import { isOnDevice, placeOf } from '../device.ts';
import type { FloatType } from '../dtype.ts';
import { HeddleError } from '../errors.ts';
import { type AsyncOpOptions, call, callSync, checkOptions, type Op, type OpOptions } from '../op.ts';
import { attentionBackwardReference } from '../reference/attention/attentionBackward.ts';
import type { Tensor, TensorLike } from '../tensor.ts';
import { gradientTensor, tensorOfShape } from './gradientTensor.ts';
import { ATTENTION_OPTION_NAMES, type AttentionOptions, prepareAttention } from './options.ts';

/** Gradients of {@link attention}. */
export interface AttentionGradients {
  /** In the dims and type of q, contiguous. */
  query: Tensor<FloatType>;
  key: Tensor<FloatType>;
  value: Tensor<FloatType>;
  /** float32, in the dims of the bias; present when there is one. */
  bias?: Tensor<'float32'>;
}

export interface AttentionBackwardOptions extends AttentionOptions {
  /** What {@link attention} returned. */
  output: TensorLike;
  /** What {@link attention} returned with `returnLogSumExp`. */
  logSumExp: TensorLike;
  /** Ignored: the forward's options may be passed on as they are. */
  returnLogSumExp?: boolean;
  out?: AttentionGradients;
}

const OPTIONS: ReadonlySet<string> = new Set([
  ...ATTENTION_OPTION_NAMES,
  'output',
  'logSumExp',
  'returnLogSumExp',
  'out',
  'backend',
  'threads',
  'signal',
]);

const op: Op = { name: 'attentionBackward', reference: attentionBackwardReference };

function prepare(
  gradOutput: TensorLike,
  q: TensorLike,
  k: TensorLike,
  v: TensorLike,
  options: AttentionBackwardOptions,
): { args: unknown[]; result: AttentionGradients } {
  checkOptions(options, OPTIONS, 'attentionBackward');
  const { args, inputs, query, key, value, named } = prepareAttention(q, k, v, options, 'device');
  const [batch, queries, heads] = query.dims;
  if (options?.output === undefined || options.logSumExp === undefined) {
    throw new HeddleError('ERR_ARGUMENT', 'attentionBackward: options output and logSumExp are required');
  }
  const type = query.type;
  const outDims = [batch, queries, heads, value.dims[3]];
  const upstream = tensorOfShape(gradOutput, type, outDims, 'gradOutput');
  const output = tensorOfShape(options.output, type, outDims, 'output');
  const logSumExp = tensorOfShape(options.logSumExp, 'float32', [batch, heads, queries], 'logSumExp');
  const all: Tensor[] = [...inputs, upstream, output, logSumExp];
  const out = options.out;
  const place = placeOf('attentionBackward', options, {
    ...named,
    gradOutput: upstream,
    output,
    logSumExp,
    'out.query': out?.query,
    'out.key': out?.key,
    'out.value': out?.value,
    'out.bias': out?.bias,
  });
  const result: AttentionGradients = {
    query: gradientTensor(out?.query, type, query.dims, all, 'out.query', place),
    key: gradientTensor(out?.key, type, key.dims, all, 'out.key', place),
    value: gradientTensor(out?.value, type, value.dims, all, 'out.value', place),
  };
  if (options.bias !== undefined) {
    result.bias = gradientTensor(out?.bias, 'float32', options.bias.dims, all, 'out.bias', place);
    if (!isOnDevice(result.bias)) result.bias.data.fill(0); // the CPU and the reference add to it
  }
  const list = [
    ...args,
    upstream.data,
    output.data,
    logSumExp.data,
    result.query.data,
    result.key.data,
    result.value.data,
    result.bias?.data ?? null,
  ];
  return { args: list, result };
}

/**
 * Gradients of `sum(gradOutput * attention(q, k, v, options).output)` by q, k, v and the bias. The same options as the
 * forward, and its two results. Sinks, slopes and masks are constants.
 *
 * Deterministic: the same bits in every run and on any number of threads. Where the tensors are on the device, so are
 * the gradients; slopes and sinks may be on either, segments and blockIds are on the CPU.
 *
 * @param gradOutput in the dims and type of the output, contiguous
 * @throws HeddleError as {@link attention}
 */
export async function attentionBackward(
  gradOutput: TensorLike,
  q: TensorLike,
  k: TensorLike,
  v: TensorLike,
  options: AttentionBackwardOptions & AsyncOpOptions,
): Promise<AttentionGradients> {
  const { args, result } = prepare(gradOutput, q, k, v, options);
  await call(op, args, options);
  return result;
}

/** {@link attentionBackward} on the calling thread (and helpers, when `threads` > 1). */
export function attentionBackwardSync(
  gradOutput: TensorLike,
  q: TensorLike,
  k: TensorLike,
  v: TensorLike,
  options: AttentionBackwardOptions & OpOptions,
): AttentionGradients {
  const { args, result } = prepare(gradOutput, q, k, v, options);
  callSync(op, args, options);
  return result;
}
