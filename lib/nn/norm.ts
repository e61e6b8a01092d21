import { allocateAt, type Location, placeOf } from '../device.ts';
import { DTYPE_CODE, FLOAT_TYPES, type FloatType } from '../dtype.ts';
import {
  type AsyncOpOptions,
  call,
  callSync,
  checkOptions,
  checkOut,
  type Op,
  type OpOptions,
  optionChoice,
  optionFlag,
  optionNumber,
} from '../op.ts';
import { normReference } from '../reference/nn/norm.ts';
import { asTensor, type DType, makeTensor, type Tensor, type TensorLike } from '../tensor.ts';
import { elementwiseOutput, givenTensor, optionalLike, optionalVector, rowsOf } from './outputs.ts';

/** What {@link layerNorm} and {@link rmsNorm} return. */
export interface NormResult {
  /** The dims of x, of type `outType`. */
  output: Tensor<FloatType>;
  /** x + residual, of the type of x; with `returnSum`. */
  sum?: Tensor<FloatType>;
  /** float32, the dims of x without the last; with `returnStatistics`, layer norm only. */
  mean?: Tensor<'float32'>;
  /** 1 / sqrt(variance + epsilon), float32, the dims of x without the last; with `returnStatistics`. */
  rstd?: Tensor<'float32'>;
}

export interface RmsNormOptions {
  /** Scale, float32 `[width]`. Default: 1. */
  weight?: TensorLike;
  /** Added to the variance. Default 1e-5 for {@link layerNorm}, 1e-6 for {@link rmsNorm}. */
  epsilon?: number;
  /** The scale is 1 + weight (Gemma, VideoPrism). Default false. */
  unitOffset?: boolean;
  /** Added to x first; same type and dims. */
  residual?: TensorLike;
  /** Also return x + residual: the residual stream of a pre-norm block. Default false. */
  returnSum?: boolean;
  /** Also return what the backward op needs. Default false. */
  returnStatistics?: boolean;
  /** Type of the output. Default: the type of x. */
  outType?: FloatType;
  /** Tensors to write to. `output` may be x or residual itself; so may `sum`, which keeps the stream in place. */
  out?: { output?: TensorLike; sum?: TensorLike; mean?: TensorLike; rstd?: TensorLike };
}

export interface LayerNormOptions extends RmsNormOptions {
  /** float32 `[width]`. Default: 0. */
  bias?: TensorLike;
}

const RMS_OPTIONS: ReadonlySet<string> = new Set([
  'weight',
  'epsilon',
  'unitOffset',
  'residual',
  'returnSum',
  'returnStatistics',
  'outType',
  'out',
  'backend',
  'threads',
  'signal',
]);
const LAYER_OPTIONS: ReadonlySet<string> = new Set([...RMS_OPTIONS, 'bias']);
const OUTPUTS: ReadonlySet<string> = new Set(['output', 'sum', 'mean', 'rstd']);

export const EPSILON = { layer: 1e-5, rms: 1e-6 } as const;

const layerOp: Op = { name: 'layerNorm', reference: normReference };
const rmsOp: Op = { name: 'rmsNorm', reference: normReference };

function statistics(
  given: TensorLike | undefined,
  dims: readonly number[],
  rows: number,
  inputs: readonly (Tensor<DType> | null)[],
  name: string,
  place: Location,
): Tensor<'float32'> {
  if (given === undefined) return makeTensor('float32', allocateAt(place, 'float32', rows), dims);
  const t = asTensor(given, name, ['float32'], undefined, place === 'cuda' ? 'device' : undefined);
  checkOut(t, dims, inputs, name);
  return t;
}

function prepare(
  kind: 'layer' | 'rms',
  x: TensorLike,
  options: LayerNormOptions | undefined,
): { args: unknown[]; result: NormResult } {
  checkOptions(options, kind === 'layer' ? LAYER_OPTIONS : RMS_OPTIONS, `${kind}Norm`);
  const o = options ?? {};
  checkOptions(o.out, OUTPUTS, `out of ${kind}Norm`);
  const input = asTensor(x, 'x', FLOAT_TYPES, undefined, 'device');
  const [rows, width] = rowsOf(input, 'x');
  const weight = optionalVector(o.weight, width, 'weight', 'device');
  const bias = optionalVector(o.bias, width, 'bias', 'device');
  const residual = optionalLike(o.residual, input, 'residual', 'device');
  const unitOffset = optionFlag(o.unitOffset, false, 'unitOffset');
  const epsilon = optionNumber(o.epsilon, 0, EPSILON[kind], 'epsilon');
  const outType = optionChoice(o.outType, FLOAT_TYPES, input.type, 'outType');

  const place = placeOf(`${kind}Norm`, options, {
    x: input,
    residual,
    weight,
    bias,
    'out.output': givenTensor(o.out?.output),
    'out.sum': givenTensor(o.out?.sum),
    'out.mean': givenTensor(o.out?.mean),
    'out.rstd': givenTensor(o.out?.rstd),
  });
  const streams = [input, residual];
  const vectors = [weight, bias];
  const output = elementwiseOutput(o.out?.output, outType, input.dims, streams, vectors, 'out.output', place);
  const result: NormResult = { output };
  const written: (Tensor<DType> | null)[] = [...streams, ...vectors, output];
  if (optionFlag(o.returnSum, false, 'returnSum') || o.out?.sum !== undefined) {
    const others = [...vectors, output];
    result.sum = elementwiseOutput(o.out?.sum, input.type, input.dims, streams, others, 'out.sum', place);
    written.push(result.sum);
  }
  const wanted = optionFlag(o.returnStatistics, false, 'returnStatistics');
  const dims = input.dims.slice(0, -1);
  if (kind === 'layer' && (wanted || o.out?.mean !== undefined)) {
    result.mean = statistics(o.out?.mean, dims, rows, written, 'out.mean', place);
    written.push(result.mean);
  }
  if (wanted || o.out?.rstd !== undefined) {
    result.rstd = statistics(o.out?.rstd, dims, rows, written, 'out.rstd', place);
  }
  const args = [
    kind === 'layer',
    input.data,
    residual?.data ?? null,
    DTYPE_CODE[input.type],
    rows,
    width,
    weight?.data ?? null,
    bias?.data ?? null,
    unitOffset,
    epsilon,
    output.data,
    DTYPE_CODE[output.type],
    result.sum?.data ?? null,
    result.mean?.data ?? null,
    result.rstd?.data ?? null,
  ];
  return { args, result };
}

/**
 * Layer normalisation (Ba, Kiros and Hinton 2016) over the last axis: with v = x + residual,
 * `(v - mean(v)) / sqrt(variance(v) + epsilon) * weight + bias`; the variance divides by the width.
 *
 * One read and one write of memory. Arithmetic in float32, exact in v whatever its mean; a NaN or infinity in a row makes
 * that row NaN. Each row is bitwise the same alone, in any batch and on any number of threads.
 *
 * @param x `[..., width]` float32, bfloat16 or float16; on the device with all other tensors, or none
 * @throws HeddleError `ERR_ARGUMENT`, `ERR_SHAPE`, `ERR_DTYPE`, `ERR_OPTION`, `ERR_BACKEND`, `ERR_ABORTED`
 */
export async function layerNorm(
  x: TensorLike,
  options?: LayerNormOptions & AsyncOpOptions,
): Promise<NormResult> {
  const { args, result } = prepare('layer', x, options);
  await call(layerOp, args, options);
  return result;
}

/** {@link layerNorm} on the calling thread (and helpers, when `threads` > 1). */
export function layerNormSync(x: TensorLike, options?: LayerNormOptions & OpOptions): NormResult {
  const { args, result } = prepare('layer', x, options);
  callSync(layerOp, args, options);
  return result;
}

/**
 * RMS normalisation (Zhang and Sennrich 2019) over the last axis: with v = x + residual,
 * `v / sqrt(mean(v^2) + epsilon) * weight`. Otherwise as {@link layerNorm}.
 *
 * @param x `[..., width]` float32, bfloat16 or float16; on the device with all other tensors, or none
 * @throws HeddleError `ERR_ARGUMENT`, `ERR_SHAPE`, `ERR_DTYPE`, `ERR_OPTION`, `ERR_BACKEND`, `ERR_ABORTED`
 */
export async function rmsNorm(x: TensorLike, options?: RmsNormOptions & AsyncOpOptions): Promise<NormResult> {
  const { args, result } = prepare('rms', x, options);
  await call(rmsOp, args, options);
  return result;
}

/** {@link rmsNorm} on the calling thread (and helpers, when `threads` > 1). */
export function rmsNormSync(x: TensorLike, options?: RmsNormOptions & OpOptions): NormResult {
  const { args, result } = prepare('rms', x, options);
  callSync(rmsOp, args, options);
  return result;
}
