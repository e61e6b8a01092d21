import { cudaDevice, resolveBackend } from './backend.ts';
import { HeddleError } from './errors.ts';
import { type AsyncOpOptions, call, callSync, nativeOnly, type OpOptions } from './op.ts';
import {
  allocate,
  BYTES_PER_ELEMENT,
  type DType,
  type DTypeArrays,
  elementCount,
  makeTensor,
  type Tensor,
} from './tensor.ts';

/** Where the data of a tensor is. */
export type Location = 'cpu' | 'cuda';

/**
 * What `data` of a tensor on the device is: a reference to device memory, without elements. Views share the memory.
 */
export class DeviceData {
  /** @internal The memory, which views share: an External of the addon. */
  readonly buffer: { readonly handle: object; disposed: boolean; pending: boolean };
  /** @internal */
  readonly handle: object;
  readonly byteOffset: number;
  readonly byteLength: number;
  /** Elements. */
  readonly length: number;
  private readonly itemBytes: number;

  private constructor(buffer: DeviceData['buffer'], byteOffset: number, length: number, itemBytes: number) {
    this.buffer = buffer;
    this.handle = buffer.handle;
    this.byteOffset = byteOffset;
    this.length = length;
    this.byteLength = length * itemBytes;
    this.itemBytes = itemBytes;
  }

  /** @internal */
  static allocate(type: DType, count: number): DeviceData {
    const cuda = cudaDevice();
    const handle = cuda.alloc(count * BYTES_PER_ELEMENT[type]);
    if (handle === null) {
      const { live, limit } = cuda.memory();
      const bound = limit > 0 ? `, limit ${limit}` : '';
      throw new HeddleError(
        'ERR_MEMORY',
        `cannot allocate ${count} elements of ${type} on cuda: ${live} bytes are in use${bound}`,
      );
    }
    return new DeviceData({ handle, disposed: false, pending: true }, 0, count, BYTES_PER_ELEMENT[type]);
  }

  /** The same memory from element `begin` to `end`. */
  subarray(begin: number, end: number): DeviceData {
    return new DeviceData(this.buffer, this.byteOffset + begin * this.itemBytes, end - begin, this.itemBytes);
  }

  /** @internal */
  release(): void {
    if (this.buffer.disposed) return;
    this.buffer.disposed = true;
    cudaDevice().dispose(this.handle);
  }
}

/**
 * After a call: what it allocated for its results is theirs when it succeeded, and is freed when it failed.
 * @internal
 */
export function settle(args: readonly unknown[], done: boolean): void {
  for (const a of args) {
    if (!(a instanceof DeviceData) || !a.buffer.pending) continue;
    if (!done) a.release();
    a.buffer.pending = false;
  }
}

/** Throws `ERR_DISPOSED` for device data whose memory was freed. */
export function checkDisposed(data: unknown, name: string): void {
  if (data instanceof DeviceData && data.buffer.disposed) {
    throw new HeddleError('ERR_DISPOSED', `${name}: the tensor on cuda was disposed`);
  }
}

/** Whether a tensor's data is on the device. */
export function isOnDevice(tensor: Tensor): boolean {
  return (tensor.data as unknown) instanceof DeviceData;
}

/** A new array for `count` elements where an op computes. Not zeroed on the device. */
export function allocateAt<T extends DType>(location: Location, type: T, count: number): DTypeArrays[T] {
  if (location === 'cpu') return allocate(type, count);
  return DeviceData.allocate(type, count) as unknown as DTypeArrays[T];
}

/**
 * Where an op that takes device tensors computes and puts its results: on the device when its tensors are there.
 * @param tensors the op's tensors, `out` included, by the names that messages use
 * @throws HeddleError `ERR_ARGUMENT` when some are on the device and some are not; `ERR_BACKEND` when they are on the
 *   device and `options.backend` says otherwise
 */
export function placeOf(
  name: string,
  options: object | undefined,
  tensors: Readonly<Record<string, Tensor | null | undefined>>,
): Location {
  let on: string | undefined;
  let off: string | undefined;
  for (const key in tensors) {
    const t = tensors[key];
    if (!t) continue;
    if (isOnDevice(t)) on ??= key;
    else off ??= key;
  }
  if (on === undefined) return 'cpu';
  if (off !== undefined) {
    throw new HeddleError(
      'ERR_ARGUMENT',
      `${name}: ${on} is on cuda but ${off} is on cpu; bring both to one device with tensor.to()`,
    );
  }
  const backend = (options as OpOptions | undefined)?.backend;
  if (backend !== undefined && backend !== 'auto' && backend !== 'cuda') {
    throw new HeddleError(
      'ERR_BACKEND',
      `${name}: ${on} is on cuda, which backend ${backend} cannot read; use backend cuda or await ${on}.to('cpu')`,
    );
  }
  return 'cuda';
}

/** One int32 of an op's argument, for the text of an error. */
export function readElement(data: Int32Array | DeviceData, index: number): number {
  if (!(data instanceof DeviceData)) return data[index];
  const host = new Int32Array(1);
  callSync(download, [data.subarray(index, index + 1), host], { backend: 'cuda' });
  return host[0];
}

/** @internal (device data, host array) */
export const upload = nativeOnly('upload');
const download = nativeOnly('download');

function prepareCopy(tensor: Tensor, location: Location) {
  if (location !== 'cpu' && location !== 'cuda') {
    throw new HeddleError('ERR_OPTION', `location must be 'cpu' or 'cuda', got '${String(location)}'`);
  }
  checkDisposed(tensor.data, 'to');
  resolveBackend('cuda');
  const count = elementCount(tensor.dims, 'to');
  const data = allocateAt(location, tensor.type, count);
  const result = makeTensor(tensor.type, data, tensor.dims);
  const [device, host] = location === 'cuda' ? [data, tensor.data] : [tensor.data, data];
  return { op: location === 'cuda' ? upload : download, args: [device, host], result };
}

/** A copy of `tensor` at `location`, or `tensor` itself when it is there. */
export async function moveTensor<T extends DType>(
  tensor: Tensor<T>,
  location: Location,
  options?: Pick<AsyncOpOptions, 'signal'>,
): Promise<Tensor<T>> {
  if (location === tensor.location) return tensor;
  const { op, args, result } = prepareCopy(tensor, location);
  await call(op, args, { ...options, backend: 'cuda' });
  return result as Tensor<T>;
}

/** {@link moveTensor} on the calling thread. */
export function moveTensorSync<T extends DType>(tensor: Tensor<T>, location: Location): Tensor<T> {
  if (location === tensor.location) return tensor;
  const { op, args, result } = prepareCopy(tensor, location);
  callSync(op, args, { backend: 'cuda' });
  return result as Tensor<T>;
}

/** Device memory that heddle holds, in bytes. */
export interface CudaMemory {
  /** In use by tensors and running calls: back to its value once both are gone. */
  live: number;
  /** Blocks in use. */
  liveBlocks: number;
  /** Freed and kept for reuse. */
  cached: number;
  /** The largest `live` so far. */
  peak: number;
  /** Bound of `live + cached`; 0: none. */
  limit: number;
  /** Page-locked host memory of the staging buffers. */
  pinned: number;
  /** Calls in flight. */
  jobs: number;
}

/**
 * Counters of the CUDA allocator.
 * @throws HeddleError `ERR_BACKEND` where CUDA cannot run
 */
export function cudaMemory(): CudaMemory {
  return cudaDevice().memory();
}

/**
 * Bounds the device memory that heddle holds; allocations beyond it throw `ERR_MEMORY` and change nothing else.
 * @param bytes 0 for no bound
 * @throws HeddleError `ERR_OPTION`, `ERR_BACKEND`
 */
export function setCudaMemoryLimit(bytes: number): void {
  if (!Number.isSafeInteger(bytes) || bytes < 0) {
    throw new HeddleError('ERR_OPTION', `bytes must be an integer of at least 0, got ${String(bytes)}`);
  }
  cudaDevice().setLimit(bytes);
}

/** Gives the cached blocks back to the device. */
export function releaseCudaCache(): void {
  cudaDevice().trim();
}
