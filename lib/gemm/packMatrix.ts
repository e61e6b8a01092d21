import { type Addon, backendOf, resolveBackend } from '../backend.ts';
import { runAsync, runSync, type Steps, step } from '../checkpoint/steps.ts';
import type { DeviceData, Location } from '../device.ts';
import { DTYPE_CODE } from '../dtype.ts';
import { HeddleError } from '../errors.ts';
import {
  type AsyncOpOptions,
  call,
  callSync,
  checkOptions,
  nativeOnly,
  type Op,
  type OpOptions,
  optionChoice,
} from '../op.ts';
import type { ReferenceMatrix } from '../reference/gemm/linear.ts';
import type { WeightType } from '../reference/gemm/quantize.ts';
import { asTensor, type TensorLike } from '../tensor.ts';
import { checkCopy, copyWeights, DeviceCopy, type DeviceWeights, PackedWeights } from './deviceWeights.ts';
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

const layoutOp = nativeOnly('layoutMatrix');

/**
 * A weight matrix `[outputs, inputs]` in the form that the kernels read; made by {@link packMatrix}. On backend cuda it
 * lives on the device, and takes and gives tensors there as well as on the host.
 */
export class PackedMatrix extends PackedWeights<ReferenceMatrix, PackedMatrix> {
  readonly outputs: number;
  readonly inputs: number;
  readonly type: WeightType;
  readonly groupSize: number;
  private readonly symmetric: boolean;

  /** @internal `device`: for backend cuda, the memory there. */
  constructor(
    n: number,
    k: number,
    type: WeightType,
    group: number,
    symmetric: boolean,
    backend: OpOptions['backend'],
    device?: DeviceData,
  ) {
    const numbers = Float64Array.of(WEIGHT_CODE[type], Number(!symmetric), group, n, k);
    super(
      'the packed matrix',
      backend,
      (addon) =>
        device === undefined
          ? (addon['createMatrix'] as unknown as () => object)()
          : ({ data: device, numbers } satisfies DeviceWeights),
      () => ({ type, group, n, k, rows: [] }),
      device !== undefined,
    );
    this.outputs = n;
    this.inputs = k;
    this.type = type;
    this.groupSize = group;
    this.symmetric = symmetric;
    if (device !== undefined) this.bytes = device.byteLength;
  }

  protected copy(location: Location, options: Pick<AsyncOpOptions, 'threads' | 'signal'>) {
    checkCopy(location, this.backend, 'a matrix');
    const bytes = (this.addon as Addon)['matrixImageBytes'] as unknown as (h: object) => number;
    const copy = new DeviceCopy(1, () => bytes(this.use(undefined)));
    return copyWeights(copy, 1, layoutOp, () => [this.use(undefined)], options);
  }

  protected onDevice(data: DeviceData): PackedMatrix {
    return new PackedMatrix(
      this.outputs,
      this.inputs,
      this.type,
      this.groupSize,
      this.symmetric,
      'cuda',
      data,
    );
  }

  /** @internal */
  account(): void {
    if (this.addon === null || this.data === null) return;
    this.bytes = (this.addon['accountMatrix'] as unknown as (h: object) => number)(this.data);
  }

  protected releaseHost(addon: Addon, data: object): void {
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
  // For the device it is packed on the host, and copied there.
  const toDevice = backendOf(resolveBackend(options?.backend)) === 'cuda';
  const matrix = new PackedMatrix(n, k, type, group, symmetric, toDevice ? 'cpu' : options?.backend);
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
  return { matrix, toDevice, args };
}

function* pack(
  weight: TensorLike,
  options: (PackMatrixOptions & AsyncOpOptions) | undefined,
): Steps<PackedMatrix> {
  const { matrix, toDevice, args } = preparePack(weight, options);
  const run = { ...options, backend: matrix.backend };
  yield* step(
    () => callSync(packOp, args, run),
    () => call(packOp, args, run),
  );
  matrix.account();
  if (!toDevice) return matrix;
  const { threads, signal } = run;
  try {
    return yield* step(
      () => matrix.toSync('cuda', { threads }),
      () => matrix.to('cuda', { threads, signal }),
    );
  } finally {
    matrix.dispose();
  }
}

/**
 * Packs a weight matrix once for many products. With `backend: 'cuda'` it is packed on the host and copied to the device,
 * as `matrix.to('cuda')` does.
 * @param weight `[outputs, inputs]` float32, bfloat16, float16 or float8_e4m3, as on the hub; not kept
 * @throws HeddleError `ERR_SHAPE`, `ERR_DTYPE`, `ERR_OPTION`, `ERR_MEMORY`, `ERR_VALUE` for a weight that is NaN or
 *   infinite where the packed type cannot hold it (float32 and bfloat16 carry it through)
 */
export async function packMatrix(
  weight: TensorLike,
  options?: PackMatrixOptions & AsyncOpOptions,
): Promise<PackedMatrix> {
  return runAsync(pack(weight, options));
}

/** {@link packMatrix} on the calling thread. */
export function packMatrixSync(weight: TensorLike, options?: PackMatrixOptions & OpOptions): PackedMatrix {
  return runSync(pack(weight, options));
}
