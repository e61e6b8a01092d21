import { allocateAt, type Location, placeOf } from '../device.ts';
import { DTYPE_CODE, FLOAT_TYPES, type FloatType } from '../dtype.ts';
import { HeddleError } from '../errors.ts';
import {
  type AsyncOpOptions,
  call,
  callSync,
  checkOptions,
  checkOut,
  nativeOnly,
  type Op,
  type OpOptions,
  optionChoice,
} from '../op.ts';
import { LINEAR_ACTIVATIONS, type LinearActivation, linearReference } from '../reference/gemm/linear.ts';
import type { WeightType } from '../reference/gemm/quantize.ts';
import { asTensor, makeTensor, product, Tensor, type TensorLike } from '../tensor.ts';
import type { DeviceWeights } from './deviceWeights.ts';
import { PackedMatrix } from './packMatrix.ts';

export {
  PackedMatrix,
  type PackMatrixOptions,
  packMatrix,
  packMatrixSync,
  WEIGHT_CODE,
  WEIGHT_TYPES,
  weightOptions,
} from './packMatrix.ts';
export type { LinearActivation, WeightType };

export interface LinearOptions {
  /** float32 `[outputs]`. */
  bias?: TensorLike;
  activation?: LinearActivation;
  /** Type of the result. Default float32. */
  outType?: FloatType;
  out?: Tensor;
}

const linearOp: Op = { name: 'linear', reference: linearReference };
/** Two arguments for the matrix instead of one. */
const deviceLinearOp = nativeOnly('linear');
const LINEAR_OPTIONS: ReadonlySet<string> = new Set([
  'bias',
  'activation',
  'outType',
  'out',
  'backend',
  'threads',
  'signal',
]);

/** @internal Checks a product's arguments and makes its result. */
export function prepareLinear(
  x: TensorLike,
  weight: PackedMatrix,
  options: (LinearOptions & OpOptions) | undefined,
) {
  checkOptions(options, LINEAR_OPTIONS, 'linear');
  const input = asTensor(x, 'x', FLOAT_TYPES, undefined, 'device');
  if (!(weight instanceof PackedMatrix))
    throw new HeddleError('ERR_ARGUMENT', 'weight: expected a PackedMatrix');
  const k = input.dims[input.dims.length - 1];
  if (input.dims.length < 1 || k !== weight.inputs) {
    throw new HeddleError('ERR_SHAPE', `x: expected [..., ${weight.inputs}], got [${input.dims.join(', ')}]`);
  }
  const rows = k === 0 ? 0 : input.size / k;
  const bias = options?.bias === undefined ? null : asTensor(options.bias, 'bias', ['float32'], 1, 'device');
  if (bias !== null && bias.dims[0] !== weight.outputs) {
    throw new HeddleError('ERR_SHAPE', `bias: expected [${weight.outputs}], got [${bias.dims[0]}]`);
  }
  const activation = optionChoice(options?.activation, LINEAR_ACTIVATIONS, 'none', 'activation');
  const dims = [...input.dims.slice(0, -1), weight.outputs];
  const given = options?.out instanceof Tensor ? options.out : null;
  const place = placeOf('linear', options, { x: input, bias, out: given });
  const matrix = weight.use(options?.backend);
  if (place === 'cuda' && weight.backend !== 'cuda') {
    throw new HeddleError(
      'ERR_BACKEND',
      `linear: x is on cuda but weight was packed for backend ${weight.backend}; use await weight.to('cuda')`,
    );
  }
  const inputs = bias === null ? [input] : [input, bias];
  const out = outputTensor(options?.out, options?.outType, dims, inputs, place);
  const rest = [
    input.data,
    DTYPE_CODE[input.type],
    rows,
    bias === null ? null : bias.data,
    LINEAR_ACTIVATIONS.indexOf(activation),
    out.data,
    DTYPE_CODE[out.type],
  ];
  if (weight.backend !== 'cuda') return { op: linearOp, out, args: [matrix, ...rest] };
  const { data, numbers } = matrix as DeviceWeights;
  return { op: deviceLinearOp, out, args: [data, numbers, ...rest] };
}

/** `out` as given, or a fresh tensor of `outType` at `place`. */
export function outputTensor(
  given: TensorLike | undefined,
  outType: FloatType | undefined,
  dims: readonly number[],
  inputs: Tensor[],
  place: Location = 'cpu',
): Tensor<FloatType> {
  const type = optionChoice(outType, FLOAT_TYPES, 'float32', 'outType');
  if (given === undefined) {
    const count = product(dims);
    return makeTensor(type, allocateAt(place, type, count), dims);
  }
  const device = place === 'cuda' ? 'device' : undefined;
  const out = asTensor(given, 'out', outType === undefined ? FLOAT_TYPES : [type], undefined, device);
  checkOut(out, dims, inputs, 'out');
  return out;
}

/**
 * y = activation(x Wᵀ + bias). A row's result is bitwise the same alone, in any batch, on any threads. With a weight on
 * backend cuda the tensors may all be on the device, and so is then the result.
 * @param x `[..., inputs]` float32, bfloat16 or float16
 * @returns `[..., outputs]`
 * @throws HeddleError `ERR_SHAPE`, `ERR_DTYPE`, `ERR_OPTION`, `ERR_DISPOSED`, `ERR_BACKEND`, `ERR_ABORTED`
 */
export async function linear(
  x: TensorLike,
  weight: PackedMatrix,
  options?: LinearOptions & AsyncOpOptions,
): Promise<Tensor<FloatType>> {
  const { op, out, args } = prepareLinear(x, weight, options);
  await call(op, args, { ...options, backend: weight.backend });
  return out;
}

/** {@link linear} on the calling thread. */
export function linearSync(
  x: TensorLike,
  weight: PackedMatrix,
  options?: LinearOptions & OpOptions,
): Tensor<FloatType> {
  const { op, out, args } = prepareLinear(x, weight, options);
  callSync(op, args, { ...options, backend: weight.backend });
  return out;
}
