import type { Addon } from '../backend.ts';
import { allocateAt, type Location } from '../device.ts';
import { DTYPE_CODE, FLOAT_TYPES, type FloatType } from '../dtype.ts';
import { HeddleError } from '../errors.ts';
import { Handle } from '../handle.ts';
import {
  type AsyncOpOptions,
  call,
  callSync,
  checkOptions,
  checkOut,
  type Op,
  type OpOptions,
  optionChoice,
} from '../op.ts';
import {
  LINEAR_ACTIVATIONS,
  type LinearActivation,
  linearReference,
  type ReferenceMatrix,
} from '../reference/gemm/linear.ts';
import type { WeightType } from '../reference/gemm/quantize.ts';
import { asTensor, makeTensor, product, type Tensor, type TensorLike } from '../tensor.ts';
import {
  blockScaleOf,
  meanSquareOf,
  packReference,
  type RoundingOptions,
  roundingOf,
  SOURCE_TYPES,
  type SourceData,
  type SourceType,
  unfitError,
} from './weights.ts';

export type { LinearActivation, WeightType };

/** Numbers of the packed types at the native boundary (native/gemm/packed.h). */
export const WEIGHT_CODE: Readonly<Record<WeightType, number>> = {
  float32: 0,
  bfloat16: 1,
  int8: 2,
  int4: 3,
  mxfp4: 4,
  float8: 5,
};
export const WEIGHT_TYPES = Object.keys(WEIGHT_CODE) as WeightType[];

export interface PackMatrixOptions extends RoundingOptions {
  /** How the weights are stored. Default: the source's type (float16 becomes float32, float8_e4m3 is float8). */
  type?: WeightType;
  /** k values per scale: int4 32, 64 or 128 (default 32), MXFP4 32. Must divide the number of inputs. */
  groupSize?: number;
  /**
   * int4: mean square of each input, float32 `[inputs]`, seen on calibration data: what an error of a weight is
   * multiplied by in the search. Turns `search` on.
   */
  calibration?: TensorLike | Float32Array;
  /** The source is `[inputs, outputs]`, as a backward pass reads a weight. Default false. */
  transposed?: boolean;
  /** Sources of type float8_e4m3: float32 factors of blocks of 128 x 128 (DeepSeek-V3's `weight_scale_inv`). */
  scale?: TensorLike;
}

/** Checks `type` and `groupSize` against k; returns [type, group]. */
export function weightOptions(
  type: WeightType | undefined,
  groupSize: number | undefined,
  source: SourceType,
  ks: readonly number[],
): [WeightType, number] {
  const natural = source === 'bfloat16' ? 'bfloat16' : source === 'float8_e4m3' ? 'float8' : 'float32';
  const t = optionChoice(type, WEIGHT_TYPES, natural, 'type');
  if (t !== 'int4' && t !== 'mxfp4') {
    if (groupSize !== undefined) {
      throw new HeddleError('ERR_OPTION', `groupSize needs type int4 or mxfp4, got type ${t}`);
    }
    return [t, 0];
  }
  const group = groupSize ?? 32;
  const allowed = t === 'int4' ? [32, 64, 128] : [32];
  if (!allowed.includes(group)) {
    throw new HeddleError('ERR_OPTION', `groupSize must be ${allowed.join(', ')} for ${t}, got ${group}`);
  }
  for (const k of ks) {
    if (k % group !== 0) {
      throw new HeddleError('ERR_OPTION', `groupSize ${group} does not divide the ${k} inputs of a matrix`);
    }
  }
  return [t, group];
}

/** A weight matrix `[outputs, inputs]` in the form that the kernels read; made by {@link packMatrix}. */
export class PackedMatrix extends Handle<ReferenceMatrix> {
  readonly outputs: number;
  readonly inputs: number;
  readonly type: WeightType;
  readonly groupSize: number;
  /** Bytes of native memory. */
  bytes = 0;

  /** @internal */
  constructor(n: number, k: number, type: WeightType, group: number, backend: OpOptions['backend']) {
    super(
      'the packed matrix',
      backend,
      (addon) => (addon['createMatrix'] as unknown as () => object)(),
      () => ({ type, group, n, k, rows: [] }),
    );
    this.outputs = n;
    this.inputs = k;
    this.type = type;
    this.groupSize = group;
  }

  /** @internal */
  account(): void {
    if (this.addon === null || this.data === null) return;
    this.bytes = (this.addon['accountMatrix'] as unknown as (h: object) => number)(this.data);
  }

  protected override release(addon: Addon, data: object): void {
    (addon['releaseMatrix'] as unknown as (h: object) => void)(data);
  }
}

const packOp: Op = {
  name: 'packMatrix',
  reference: (
    matrix: ReferenceMatrix,
    _type: number,
    source: SourceData,
    code: number,
    n: number,
    k: number,
    ns: number,
    ks: number,
    group: number,
    symmetric: boolean,
    search: boolean,
    meanSquare: Float32Array | null,
    scale: Float32Array | null,
  ) => {
    const rounding = { symmetric, search, meanSquare };
    const strides: [number, number] = [ns, ks];
    const rows = packReference({ data: source, code, n, k, strides, scale }, matrix.type, group, rounding);
    if (typeof rows === 'number') return rows;
    matrix.rows = rows;
    return 0;
  },
  invalid: (index, args) => {
    const [, type, data, code, n, k, ns, ks, , , , , scale] = args;
    const row = Math.floor(index / k);
    const name = WEIGHT_TYPES.find((t) => WEIGHT_CODE[t] === type) as WeightType;
    const source = { data, code, n, k, strides: [ns, ks] as [number, number], scale };
    return unfitError('weight', source, row, index % k, name);
  },
};

const PACK_OPTIONS: ReadonlySet<string> = new Set([
  'type',
  'groupSize',
  'symmetric',
  'search',
  'calibration',
  'transposed',
  'scale',
  'backend',
  'threads',
  'signal',
]);

function preparePack(weight: TensorLike, options: (PackMatrixOptions & OpOptions) | undefined) {
  checkOptions(options, PACK_OPTIONS, 'packMatrix');
  const w = asTensor(weight, 'weight', SOURCE_TYPES, 2);
  const transposed = options?.transposed === true;
  if (transposed && w.type === 'float8_e4m3') {
    throw new HeddleError('ERR_OPTION', 'transposed is not for float8_e4m3, whose scales lie in blocks');
  }
  const [n, k] = transposed ? [w.dims[1], w.dims[0]] : w.dims;
  const [type, group] = weightOptions(options?.type, options?.groupSize, w.type, [k]);
  const meanSquare = meanSquareOf(options?.calibration, k, 'calibration');
  const { symmetric, search } = roundingOf(options ?? {}, type, meanSquare !== null);
  const scale = blockScaleOf(options?.scale, w.type, n, k, 'scale');
  const matrix = new PackedMatrix(n, k, type, group, options?.backend);
  const source = [w.data, DTYPE_CODE[w.type], n, k, ...(transposed ? [1, n] : [k, 1])];
  const args = [
    matrix.use(undefined),
    WEIGHT_CODE[type],
    ...source,
    group,
    symmetric,
    search,
    meanSquare,
    scale,
  ];
  return { matrix, args };
}

/**
 * Packs a weight matrix once for many products.
 * @param weight `[outputs, inputs]` float32, bfloat16, float16 or float8_e4m3, as on the hub; not kept
 * @throws HeddleError `ERR_SHAPE`, `ERR_DTYPE`, `ERR_OPTION`, `ERR_MEMORY`, `ERR_VALUE` for a weight that is NaN or
 *   infinite where the packed type cannot hold it (float32 and bfloat16 carry it through)
 */
export async function packMatrix(
  weight: TensorLike,
  options?: PackMatrixOptions & AsyncOpOptions,
): Promise<PackedMatrix> {
  const { matrix, args } = preparePack(weight, options);
  await call(packOp, args, { ...options, backend: matrix.backend });
  matrix.account();
  return matrix;
}

/** {@link packMatrix} on the calling thread. */
export function packMatrixSync(weight: TensorLike, options?: PackMatrixOptions & OpOptions): PackedMatrix {
  const { matrix, args } = preparePack(weight, options);
  callSync(packOp, args, { ...options, backend: matrix.backend });
  matrix.account();
  return matrix;
}

export interface LinearOptions {
  /** float32 `[outputs]`. */
  bias?: TensorLike;
  activation?: LinearActivation;
  /** Type of the result. Default float32. */
  outType?: FloatType;
  out?: Tensor;
}

const linearOp: Op = { name: 'linear', reference: linearReference };
const LINEAR_OPTIONS: ReadonlySet<string> = new Set([
  'bias',
  'activation',
  'outType',
  'out',
  'backend',
  'threads',
  'signal',
]);

function prepareLinear(
  x: TensorLike,
  weight: PackedMatrix,
  options: (LinearOptions & OpOptions) | undefined,
) {
  checkOptions(options, LINEAR_OPTIONS, 'linear');
  const input = asTensor(x, 'x', FLOAT_TYPES);
  if (!(weight instanceof PackedMatrix))
    throw new HeddleError('ERR_ARGUMENT', 'weight: expected a PackedMatrix');
  const k = input.dims[input.dims.length - 1];
  if (input.dims.length < 1 || k !== weight.inputs) {
    throw new HeddleError('ERR_SHAPE', `x: expected [..., ${weight.inputs}], got [${input.dims.join(', ')}]`);
  }
  const rows = k === 0 ? 0 : input.size / k;
  const bias = options?.bias === undefined ? null : asTensor(options.bias, 'bias', ['float32'], 1);
  if (bias !== null && bias.dims[0] !== weight.outputs) {
    throw new HeddleError('ERR_SHAPE', `bias: expected [${weight.outputs}], got [${bias.dims[0]}]`);
  }
  const activation = optionChoice(options?.activation, LINEAR_ACTIVATIONS, 'none', 'activation');
  const dims = [...input.dims.slice(0, -1), weight.outputs];
  const out = outputTensor(options?.out, options?.outType, dims, bias === null ? [input] : [input, bias]);
  const args = [
    weight.use(options?.backend),
    input.data,
    DTYPE_CODE[input.type],
    rows,
    bias === null ? null : bias.data,
    LINEAR_ACTIVATIONS.indexOf(activation),
    out.data,
    DTYPE_CODE[out.type],
  ];
  return { out, args };
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
 * y = activation(x Wᵀ + bias). A row's result is bitwise the same alone, in any batch, on any threads.
 * @param x `[..., inputs]` float32, bfloat16 or float16
 * @returns `[..., outputs]`
 * @throws HeddleError `ERR_SHAPE`, `ERR_DTYPE`, `ERR_OPTION`, `ERR_DISPOSED`, `ERR_BACKEND`, `ERR_ABORTED`
 */
export async function linear(
  x: TensorLike,
  weight: PackedMatrix,
  options?: LinearOptions & AsyncOpOptions,
): Promise<Tensor<FloatType>> {
  const { out, args } = prepareLinear(x, weight, options);
  await call(linearOp, args, { ...options, backend: weight.backend });
  return out;
}

/** {@link linear} on the calling thread. */
export function linearSync(
  x: TensorLike,
  weight: PackedMatrix,
  options?: LinearOptions & OpOptions,
): Tensor<FloatType> {
  const { out, args } = prepareLinear(x, weight, options);
  callSync(linearOp, args, { ...options, backend: weight.backend });
  return out;
}
