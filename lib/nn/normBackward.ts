import { DTYPE_CODE, FLOAT_TYPES, type FloatType } from '../dtype.ts';
import { HeddleError } from '../errors.ts';
import {
  type AsyncOpOptions,
  call,
  callSync,
  checkOptions,
  checkOut,
  type Op,
  type OpOptions,
  optionFlag,
  optionNumber,
} from '../op.ts';
import { normBackwardReference } from '../reference/nn/norm.ts';
import { asTensor, type DType, makeTensor, type Tensor, type TensorLike } from '../tensor.ts';
import { EPSILON } from './norm.ts';
import { elementwiseOutput, optionalLike, optionalVector, rowsOf } from './outputs.ts';

/** What {@link rmsNormBackward} returns. */
export interface RmsNormGradients {
  /** The type and dims of x. With a residual in the forward op this is the gradient of both x and residual. */
  x: Tensor<FloatType>;
  /** float32 `[width]`, summed over all rows. */
  weight: Tensor<'float32'>;
}

/** What {@link layerNormBackward} returns. */
export interface LayerNormGradients extends RmsNormGradients {
  /** float32 `[width]`, summed over all rows. */
  bias: Tensor<'float32'>;
}

export interface RmsNormBackwardOptions {
  /** The forward op's weight, float32 `[width]`. Default: 1. */
  weight?: TensorLike;
  /** As in the forward op; used where `rstd` is not given. */
  epsilon?: number;
  /** As in the forward op. */
  unitOffset?: boolean;
  /** As the forward op returned it, one float32 per row. Default: computed again from x. */
  rstd?: TensorLike;
  /** Gradient that reaches x beside the norm (through the residual stream); added to the gradient of x. */
  gradSum?: TensorLike;
  /** Tensors to write to. `x` may be gradOutput or gradSum itself. */
  out?: { x?: TensorLike; weight?: TensorLike; bias?: TensorLike };
}

export interface LayerNormBackwardOptions extends RmsNormBackwardOptions {
  /** As the forward op returned it, one float32 per row; goes with `rstd`. */
  mean?: TensorLike;
}

const RMS_OPTIONS: ReadonlySet<string> = new Set([
  'weight',
  'epsilon',
  'unitOffset',
  'rstd',
  'gradSum',
  'out',
  'backend',
  'threads',
  'signal',
]);
const LAYER_OPTIONS: ReadonlySet<string> = new Set([...RMS_OPTIONS, 'mean']);
const RMS_OUTPUTS: ReadonlySet<string> = new Set(['x', 'weight']);
const LAYER_OUTPUTS: ReadonlySet<string> = new Set(['x', 'weight', 'bias']);

const layerOp: Op = { name: 'layerNormBackward', reference: normBackwardReference };
const rmsOp: Op = { name: 'rmsNormBackward', reference: normBackwardReference };

function statistic(value: TensorLike | undefined, rows: number, name: string): Tensor<'float32'> | null {
  if (value === undefined) return null;
  const t = asTensor(value, name, ['float32']);
  if (t.size !== rows) {
    throw new HeddleError('ERR_SHAPE', `${name}: expected ${rows} elements, one per row, got ${t.size}`);
  }
  return t;
}

function vectorOut(
  given: TensorLike | undefined,
  width: number,
  inputs: readonly (Tensor<DType> | null)[],
  name: string,
): Tensor<'float32'> {
  if (given === undefined) return makeTensor('float32', new Float32Array(width), [width]);
  const t = asTensor(given, name, ['float32']);
  checkOut(t, [width], inputs, name);
  return t;
}

function prepare(
  kind: 'layer' | 'rms',
  gradOutput: TensorLike,
  x: TensorLike,
  options: LayerNormBackwardOptions | undefined,
): { args: unknown[]; result: LayerNormGradients } {
  const name = `${kind}NormBackward`;
  checkOptions(options, kind === 'layer' ? LAYER_OPTIONS : RMS_OPTIONS, name);
  const o = options ?? {};
  checkOptions(o.out, kind === 'layer' ? LAYER_OUTPUTS : RMS_OUTPUTS, `out of ${name}`);
  const input = asTensor(x, 'x', FLOAT_TYPES);
  const [rows, width] = rowsOf(input, 'x');
  const grad = optionalLike(gradOutput ?? null, input, 'gradOutput') as Tensor<FloatType>;
  const gradSum = optionalLike(o.gradSum, input, 'gradSum');
  const weight = optionalVector(o.weight, width, 'weight');
  const mean = statistic(o.mean, rows, 'mean');
  const rstd = statistic(o.rstd, rows, 'rstd');
  if (kind === 'layer' && (mean === null) !== (rstd === null)) {
    throw new HeddleError('ERR_OPTION', 'mean and rstd go together: give both or neither');
  }
  const unitOffset = optionFlag(o.unitOffset, false, 'unitOffset');
  const epsilon = optionNumber(o.epsilon, 0, EPSILON[kind], 'epsilon');
  const others: (Tensor<DType> | null)[] = [input, weight, mean, rstd];
  const gradX = elementwiseOutput(o.out?.x, input.type, input.dims, [grad, gradSum], others, 'out.x');
  others.push(grad, gradSum, gradX);
  const gradWeight = vectorOut(o.out?.weight, width, others, 'out.weight');
  const result = { x: gradX, weight: gradWeight } as LayerNormGradients;
  if (kind === 'layer') result.bias = vectorOut(o.out?.bias, width, [...others, gradWeight], 'out.bias');
  const args = [
    kind === 'layer',
    grad.data,
    input.data,
    gradSum?.data ?? null,
    DTYPE_CODE[input.type],
    rows,
    width,
    weight?.data ?? null,
    unitOffset,
    epsilon,
    mean?.data ?? null,
    rstd?.data ?? null,
    gradX.data,
    gradWeight.data,
    kind === 'layer' ? result.bias.data : null,
  ];
  return { args, result };
}

/**
 * Gradients of {@link layerNorm}. Sums over rows have a fixed order: the result does not depend on the threads.
 *
 * @param gradOutput gradient of the output, the type and dims of x
 * @param x what was normalised: the forward op's x, or its `sum` where there was a residual
 * @throws HeddleError `ERR_ARGUMENT`, `ERR_SHAPE`, `ERR_DTYPE`, `ERR_OPTION`, `ERR_MEMORY`, `ERR_BACKEND`, `ERR_ABORTED`
 */
export async function layerNormBackward(
  gradOutput: TensorLike,
  x: TensorLike,
  options?: LayerNormBackwardOptions & AsyncOpOptions,
): Promise<LayerNormGradients> {
  const { args, result } = prepare('layer', gradOutput, x, options);
  await call(layerOp, args, options);
  return result;
}

/** {@link layerNormBackward} on the calling thread (and helpers, when `threads` > 1). */
export function layerNormBackwardSync(
  gradOutput: TensorLike,
  x: TensorLike,
  options?: LayerNormBackwardOptions & OpOptions,
): LayerNormGradients {
  const { args, result } = prepare('layer', gradOutput, x, options);
  callSync(layerOp, args, options);
  return result;
}

/** Gradients of {@link rmsNorm}; otherwise as {@link layerNormBackward}. */
export async function rmsNormBackward(
  gradOutput: TensorLike,
  x: TensorLike,
  options?: RmsNormBackwardOptions & AsyncOpOptions,
): Promise<RmsNormGradients> {
  const { args, result } = prepare('rms', gradOutput, x, options);
  await call(rmsOp, args, options);
  return result;
}

/** {@link rmsNormBackward} on the calling thread (and helpers, when `threads` > 1). */
export function rmsNormBackwardSync(
  gradOutput: TensorLike,
  x: TensorLike,
  options?: RmsNormBackwardOptions & OpOptions,
): RmsNormGradients {
  const { args, result } = prepare('rms', gradOutput, x, options);
  callSync(rmsOp, args, options);
  return result;
}
