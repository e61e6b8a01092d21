// Packed weights on the device: their memory, and the way there (native/gemm/device_matrix.h).
import type { Addon, BackendName } from '../backend.ts';
import { runAsync, runSync, type Steps, step } from '../checkpoint/steps.ts';
import { DeviceData, type Location, upload } from '../device.ts';
import { HeddleError } from '../errors.ts';
import { Handle } from '../handle.ts';
import { type AsyncOpOptions, call, callSync, type Op, type OpOptions } from '../op.ts';

/** What a handle on backend cuda holds. */
export interface DeviceWeights {
  data: DeviceData;
  /** What the kernels need to know, in the order of the binding that reads it. */
  numbers: Float64Array;
}

/** Images of packed weights on their way to the device, one after the other: on the host they take the memory of one. */
export class DeviceCopy {
  private readonly count: number;
  private readonly bytesOf: () => number;
  private memory: { data: DeviceData; image: Uint8Array } | null = null;

  /** @param bytesOf bytes of an image, asked for when the first one is there */
  constructor(count: number, bytesOf: () => number) {
    this.count = count;
    this.bytesOf = bytesOf;
  }

  /** Lays out image `index` by a CPU op, whose last argument is the memory to fill, and copies it. */
  *add(
    index: number,
    layout: Op,
    args: () => unknown[],
    options: Pick<AsyncOpOptions, 'threads' | 'signal'>,
  ): Steps<void> {
    if (this.memory === null) {
      const bytes = this.bytesOf();
      this.memory = { data: DeviceData.allocate('uint8', this.count * bytes), image: new Uint8Array(bytes) };
    }
    const { data, image } = this.memory;
    const fill = () => [...args(), image];
    const copy = [data.subarray(index * image.length, (index + 1) * image.length), image];
    yield* step(
      () => callSync(layout, fill(), { ...options, backend: 'cpu' }),
      () => call(layout, fill(), { ...options, backend: 'cpu' }),
    );
    yield* step(
      () => callSync(upload, copy, { backend: 'cuda' }),
      () => call(upload, copy, { ...options, backend: 'cuda' }),
    );
  }

  /** The device's memory, once all images are there; from then on the caller's. */
  take(): DeviceData {
    const { data } = this.memory as { data: DeviceData };
    this.memory = null;
    return data;
  }

  /** Frees what was not taken. */
  release(): void {
    this.memory?.data.release();
    this.memory = null;
  }
}

/** Copies `count` packed parts: `layout` and `args` as for {@link DeviceCopy}. */
export function* copyWeights(
  copy: DeviceCopy,
  count: number,
  layout: Op,
  args: (index: number) => unknown[],
  options: Pick<AsyncOpOptions, 'threads' | 'signal'>,
): Steps<DeviceData> {
  try {
    for (let i = 0; i < count; i++) yield* copy.add(i, layout, () => args(i), options);
    return copy.take();
  } finally {
    copy.release();
  }
}

/** Checks a copy of weights to another place. */
export function checkCopy(location: Location, backend: BackendName, label: string): void {
  if (location !== 'cpu' && location !== 'cuda') {
    throw new HeddleError('ERR_OPTION', `location must be 'cpu' or 'cuda', got '${String(location)}'`);
  }
  if (backend !== 'cpu') {
    throw new HeddleError(
      'ERR_BACKEND',
      `${label} packed for backend ${backend} cannot be copied: only those of backend cpu can, to cuda`,
    );
  }
}

/** Packed weights `Self` on the host, of which there may be copies on the device. */
export abstract class PackedWeights<R, Self> extends Handle<R> {
  /** Bytes of native memory. */
  bytes = 0;

  /** Where the weights are. */
  get location(): Location {
    return this.backend === 'cuda' ? 'cuda' : 'cpu';
  }

  /**
   * A copy on the device, for tensors there; these weights stay as they are. The device's memory counts as that of
   * tensors (`cudaMemory`) and is freed by `dispose()` of the copy.
   * @returns the copy, or these weights when they are there
   * @throws HeddleError `ERR_BACKEND` for weights of backend reference, for `'cpu'` when they are on the device, and where
   *   CUDA cannot run; `ERR_MEMORY`, `ERR_DISPOSED`, `ERR_ABORTED`
   */
  async to(location: Location, options: Pick<AsyncOpOptions, 'threads' | 'signal'> = {}): Promise<Self> {
    if (location === this.location) return this as unknown as Self;
    return this.onDevice(await runAsync(this.copy(location, options)));
  }

  /** {@link to} on the calling thread. */
  toSync(location: Location, options: Pick<OpOptions, 'threads'> = {}): Self {
    if (location === this.location) return this as unknown as Self;
    return this.onDevice(runSync(this.copy(location, options)));
  }

  /** Checks first that it can be made. */
  protected abstract copy(
    location: Location,
    options: Pick<AsyncOpOptions, 'threads' | 'signal'>,
  ): Steps<DeviceData>;

  /** These weights, whose memory on the device is `data`. */
  protected abstract onDevice(data: DeviceData): Self;

  protected abstract releaseHost(addon: Addon, data: object): void;

  protected override release(addon: Addon, data: object): void {
    if (this.backend === 'cuda') (data as DeviceWeights).data.release();
    else this.releaseHost(addon, data);
  }
}
