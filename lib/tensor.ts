import {
  checkDisposed,
  type DeviceData,
  isOnDevice,
  type Location,
  moveTensor,
  moveTensorSync,
} from './device.ts';
import { HeddleError } from './errors.ts';

/** Element types. `float16` and `bfloat16` are stored as their 16-bit patterns in a `Uint16Array`. */
export type DType =
  | 'float32'
  | 'float64'
  | 'float16'
  | 'bfloat16'
  | 'int8'
  | 'uint8'
  | 'int32'
  | 'int64'
  | 'float8_e4m3'
  | 'float8_e5m2';

export interface DTypeArrays {
  float32: Float32Array;
  float64: Float64Array;
  float16: Uint16Array;
  bfloat16: Uint16Array;
  int8: Int8Array;
  uint8: Uint8Array;
  int32: Int32Array;
  int64: BigInt64Array;
  float8_e4m3: Uint8Array;
  float8_e5m2: Uint8Array;
}

export type TypedArray = DTypeArrays[DType];

/** Bytes of one element of each type. */
export const BYTES_PER_ELEMENT: Readonly<Record<DType, number>> = {
  float32: 4,
  float64: 8,
  float16: 2,
  bfloat16: 2,
  int8: 1,
  uint8: 1,
  int32: 4,
  int64: 8,
  float8_e4m3: 1,
  float8_e5m2: 1,
};

const CONSTRUCTORS = {
  float32: Float32Array,
  float64: Float64Array,
  float16: Uint16Array,
  bfloat16: Uint16Array,
  int8: Int8Array,
  uint8: Uint8Array,
  int32: Int32Array,
  int64: BigInt64Array,
  float8_e4m3: Uint8Array,
  float8_e5m2: Uint8Array,
} as const;

/**
 * What every op accepts: heddle's own `Tensor`, onnxruntime's `Tensor`, or any object of this shape.
 * Data is row-major and read in place. `location`, where present, must be `'cpu'`; only heddle's own tensors can be
 * on a device.
 */
export interface TensorLike<T extends DType = DType> {
  readonly type: T | (string & {});
  readonly data: unknown;
  readonly dims: readonly number[];
  readonly location?: string;
}

/** A typed array with a type and dimensions, row-major; it never copies its data. */
export class Tensor<T extends DType = DType> {
  readonly type: T;
  readonly data: DTypeArrays[T];
  readonly dims: readonly number[];

  /**
   * @param type element type
   * @param data the typed array of that type (see {@link DTypeArrays}); read in place, never copied
   * @param dims dimensions, outermost first; their product must equal `data.length`
   * @throws HeddleError `ERR_DTYPE` for an unknown type or the wrong array class, `ERR_SHAPE` for dims
   *   that are not non-negative integers or do not match `data.length`
   */
  constructor(type: T, data: DTypeArrays[T], dims: readonly number[]) {
    checkParts(type, data, dims, 'Tensor');
    this.type = type;
    this.data = data;
    this.dims = dims.length === 1 ? [dims[0]] : dims.length === 2 ? [dims[0], dims[1]] : dims.slice();
  }

  /** Number of elements. */
  get size(): number {
    return this.data.length;
  }

  /** Where the data is. On `'cuda'`, `data` is a reference to device memory without elements: use {@link to}. */
  get location(): Location {
    return isOnDevice(this) ? 'cuda' : 'cpu';
  }

  /**
   * A copy on another device, or this tensor when it is there. Ops take tensors that are all on the CPU or all on the
   * device, and put their results where their inputs are.
   * @throws HeddleError `ERR_BACKEND` where CUDA cannot run, `ERR_MEMORY`, `ERR_OPTION`, `ERR_DISPOSED`, `ERR_ABORTED`
   */
  async to(location: Location, options?: { signal?: AbortSignal }): Promise<Tensor<T>> {
    return moveTensor(this, location, options);
  }

  /** {@link to} on the calling thread. */
  toSync(location: Location): Tensor<T> {
    return moveTensorSync(this, location);
  }

  /**
   * Frees device memory now, or when the last running call that uses it ends; views of it go with it. Does nothing for
   * a tensor on the CPU. The garbage collector is the backstop.
   */
  dispose(): void {
    if (isOnDevice(this)) (this.data as unknown as DeviceData).release();
  }

  /** The same data under other dimensions; no copy. */
  reshape(dims: readonly number[]): Tensor<T> {
    if (isOnDevice(this)) {
      if (elementCount(dims, 'reshape') !== this.size) {
        throw new HeddleError(
          'ERR_SHAPE',
          `reshape: dims [${dims.join(', ')}] do not hold ${this.size} elements`,
        );
      }
      return makeTensor(this.type, this.data, dims.slice());
    }
    return new Tensor(this.type, this.data, dims);
  }

  /** A tensor of zeros. */
  static zeros<T extends DType>(type: T, dims: readonly number[]): Tensor<T> {
    if (!(type in CONSTRUCTORS)) throw unknownType(type, 'Tensor.zeros');
    return new Tensor(type, allocate(type, elementCount(dims, 'Tensor.zeros')), dims);
  }
}

/** Wraps parts that the caller has already checked; the fast path of ops for their own results. */
export function makeTensor<T extends DType>(
  type: T,
  data: DTypeArrays[T],
  dims: readonly number[],
): Tensor<T> {
  const tensor = Object.create(Tensor.prototype);
  tensor.type = type;
  tensor.data = data;
  tensor.dims = dims;
  return tensor;
}

/** A zeroed typed array for `count` elements of `type`. */
export function allocate<T extends DType>(type: T, count: number): DTypeArrays[T] {
  try {
    return new CONSTRUCTORS[type](count) as DTypeArrays[T];
  } catch (cause) {
    throw new HeddleError('ERR_MEMORY', `cannot allocate ${count} elements of ${type}`, { cause });
  }
}

/** Product of dims after checking that each is a non-negative integer. */
export function elementCount(dims: readonly number[], name: string): number {
  let count = 1;
  for (let i = 0; i < dims.length; i++) {
    const d = dims[i];
    if (!Number.isInteger(d) || d < 0) {
      throw new HeddleError(
        'ERR_SHAPE',
        `${name}: dims must be non-negative integers, got [${dims.join(', ')}]`,
      );
    }
    count *= d;
  }
  if (count > Number.MAX_SAFE_INTEGER) {
    throw new HeddleError('ERR_SHAPE', `${name}: dims [${dims.join(', ')}] overflow`);
  }
  return count;
}

/** The product of dimensions that are known to be good. */
export const product = (dims: readonly number[]): number => dims.reduce((a, b) => a * b, 1);

export const sameDims = (a: readonly number[], b: readonly number[]): boolean =>
  a.length === b.length && a.every((d, i) => d === b[i]);

/**
 * Checks the dimensions of an argument.
 * @param as what the expected ones are those of, for the message
 * @throws HeddleError `ERR_SHAPE`
 */
export function checkDims(t: Pick<Tensor, 'dims'>, dims: readonly number[], name: string, as = ''): void {
  if (sameDims(t.dims, dims)) return;
  const expected = `[${dims.join(', ')}]${as === '' ? '' : ` as ${as}`}`;
  throw new HeddleError('ERR_SHAPE', `${name}: expected ${expected}, got [${t.dims.join(', ')}]`);
}

function unknownType(type: unknown, name: string): HeddleError {
  return new HeddleError(
    'ERR_DTYPE',
    `${name}: unknown type ${JSON.stringify(type)}; known: ${Object.keys(CONSTRUCTORS).join(', ')}`,
  );
}

function describe(value: unknown): string {
  if (value === null) return 'null';
  if (typeof value !== 'object') return typeof value;
  return (value as object).constructor?.name ?? 'object';
}

function checkParts(type: string, data: unknown, dims: readonly number[], name: string): void {
  const ctor = CONSTRUCTORS[type as DType];
  if (ctor === undefined || !Object.hasOwn(CONSTRUCTORS, type)) throw unknownType(type, name);
  if (!(data instanceof ctor)) {
    throw new HeddleError('ERR_DTYPE', `${name}: type ${type} needs a ${ctor.name}, got ${describe(data)}`);
  }
  if (!Array.isArray(dims)) {
    throw new HeddleError('ERR_SHAPE', `${name}: dims must be an array of integers, got ${describe(dims)}`);
  }
  const count = elementCount(dims, name);
  if (count !== data.length) {
    const length = data.length;
    const detached = length === 0 && (data.buffer as { detached?: boolean }).detached === true;
    throw new HeddleError(
      'ERR_SHAPE',
      detached
        ? `${name}: the data's ArrayBuffer is detached`
        : `${name}: dims [${dims.join(', ')}] need ${count} elements, data has ${length}`,
    );
  }
}

/** Structural view used inside fronts: checked type, data and dims of an argument. */
export type Checked = Tensor<DType>;

/**
 * Checks an op's argument and returns it as a `Tensor` (the same object when it already is one).
 * @param value what the caller gave
 * @param name the argument's name for messages
 * @param types element types allowed here
 * @param rank required number of dimensions, if fixed
 * @param device whether it may be on the device: only in ops with CUDA kernels, which then ask `placeOf`
 */
export function asTensor<T extends DType>(
  value: TensorLike | Tensor<T>,
  name: string,
  types: readonly T[],
  rank?: number,
  device?: 'device',
): Tensor<T> {
  if (value === null || typeof value !== 'object' || !('data' in value) || !('dims' in value)) {
    throw new HeddleError('ERR_ARGUMENT', `${name}: expected a Tensor, got ${describe(value)}`);
  }
  const location = (value as TensorLike).location;
  const onDevice = location === 'cuda' && device !== undefined && value instanceof Tensor;
  if (location !== undefined && location !== 'cpu' && !onDevice) {
    throw new HeddleError('ERR_ARGUMENT', `${name}: location must be 'cpu', got '${location}'`);
  }
  if (onDevice) checkDisposed(value.data, name);
  const type = value.type as T;
  let data = value.data as DTypeArrays[T];
  // A runtime with Float16Array hands half floats over in it: same bits, other class.
  const Half = (globalThis as { Float16Array?: { new (): { buffer: ArrayBuffer } } }).Float16Array;
  if (Half !== undefined && (type as string) === 'float16' && (data as unknown) instanceof Half) {
    const half = data as unknown as { buffer: ArrayBuffer; byteOffset: number; length: number };
    data = new Uint16Array(half.buffer, half.byteOffset, half.length) as DTypeArrays[T];
  }
  if (!(value instanceof Tensor) || data.length !== productOf(value.dims)) {
    checkParts(type, data, value.dims, name);
  }
  if (!types.includes(type)) {
    throw new HeddleError(
      'ERR_DTYPE',
      `${name}: type ${type} is not supported here; allowed: ${types.join(', ')}`,
    );
  }
  if (rank !== undefined && value.dims.length !== rank) {
    throw new HeddleError(
      'ERR_SHAPE',
      `${name}: expected ${rank} dimension${rank === 1 ? '' : 's'}, got [${value.dims.join(', ')}]`,
    );
  }
  if ((data.buffer as { resizable?: boolean }).resizable === true) {
    throw new HeddleError('ERR_ARGUMENT', `${name}: resizable ArrayBuffers are not supported`);
  }
  return value instanceof Tensor && data === value.data
    ? (value as Tensor<T>)
    : makeTensor(type, data, value.dims);
}

function productOf(dims: readonly number[]): number {
  let count = 1;
  for (let i = 0; i < dims.length; i++) count *= dims[i];
  return count;
}
