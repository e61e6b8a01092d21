import {
  type Addon,
  type BackendName,
  backendOf,
  cudaDevice,
  resolveBackend,
  resolveThreads,
} from './backend.ts';
import { DeviceData, settle } from './device.ts';
import { HeddleError } from './errors.ts';
import type { DType, Tensor } from './tensor.ts';

/** Options that every op takes. */
export interface OpOptions {
  /** Where to compute; default: the one set by `setDefaults`, else `cpu` when its binary loaded. */
  backend?: 'auto' | BackendName;
  /** Threads this call may use, 1 to 256. Results do not depend on it. */
  threads?: number;
}

/** Options of the asynchronous form. */
export interface AsyncOpOptions extends OpOptions {
  /** Polled once per tile; an aborted call rejects with `ERR_ABORTED` and leaves `out` undefined. */
  signal?: AbortSignal;
}

// biome-ignore lint/suspicious/noExplicitAny: arguments are checked by each op's front, in one order for all backends
export type OpArguments = readonly any[];

/**
 * One op below its front: the reference and the native function take the same arguments in the same order and
 * return the same status (see native/core/status.h).
 */
export interface Op {
  readonly name: string;
  // biome-ignore lint/suspicious/noExplicitAny: see OpArguments
  readonly reference: (...args: any[]) => number;
  /** Words the error for input element `index`, so that every backend says the same. */
  readonly invalid?: (index: number, args: OpArguments) => HeddleError;
}

/** An op that only native code has: what it works on is in memory that the reference never sees. */
export function nativeOnly(name: string, invalid?: Op['invalid']): Op {
  return { name, reference: () => UNSUPPORTED, invalid };
}

const CANCELLED = -1;
const NO_MEMORY = -2;
const UNSUPPORTED = -3;
const DEVICE_ERROR = -4;

function statusError(op: Op, status: number, args: OpArguments, signal?: AbortSignal): HeddleError {
  if (status > 0 && op.invalid) return op.invalid(status - 1, args);
  if (status === CANCELLED) {
    return new HeddleError('ERR_ABORTED', `${op.name} was aborted`, { cause: signal?.reason });
  }
  if (status === NO_MEMORY)
    return new HeddleError('ERR_MEMORY', `${op.name}: not enough memory for scratch space`);
  if (status === DEVICE_ERROR) {
    return new HeddleError('ERR_BACKEND', `${op.name} on cuda: ${cudaDevice().lastError()}`);
  }
  return new HeddleError('ERR_INTERNAL', `${op.name}: unexpected native status ${status}`);
}

type NativeOp = (
  threads: number,
  cancel: Int32Array | null,
  done: ((status: number) => void) | null,
  // biome-ignore lint/suspicious/noExplicitAny: see OpArguments
  ...args: any[]
) => number;

function nativeOp(addon: Addon, op: Op): NativeOp {
  const fn = addon[op.name] as NativeOp | undefined;
  if (fn === undefined && backendOf(addon) === 'cuda') {
    throw new HeddleError('ERR_BACKEND', `${op.name} does not run on cuda; use backend cpu`);
  }
  if (fn === undefined) {
    throw new HeddleError(
      'ERR_BACKEND',
      `the native binary has no ${op.name}: it is older than this package; rebuild it`,
    );
  }
  return fn;
}

/** Arguments on the device run there when the call names no backend; see `placeOf` for those that do. */
function backendFor(args: OpArguments, options: OpOptions | undefined): 'auto' | BackendName | undefined {
  const backend = options?.backend;
  if (backend !== undefined && backend !== 'auto') return backend;
  for (const a of args) if (a instanceof DeviceData) return 'cuda';
  return backend;
}

/** Runs an op on this thread. */
export function callSync(op: Op, args: OpArguments, options: OpOptions | undefined): void {
  try {
    const addon = resolveBackend(backendFor(args, options));
    const threads = resolveThreads(options?.threads);
    const status = addon === null ? op.reference(...args) : nativeOp(addon, op)(threads, null, null, ...args);
    if (status !== 0) throw statusError(op, status, args);
    if (addon !== null && backendOf(addon) === 'cuda') settle(args, true);
  } catch (error) {
    settle(args, false);
    throw error;
  }
}

/**
 * Runs an op on heddle's own threads. On the reference backend it computes on this thread in a later turn of the
 * event loop: TypeScript has no other thread to go to.
 */
export async function call(op: Op, args: OpArguments, options: AsyncOpOptions | undefined): Promise<void> {
  const signal = options?.signal;
  let onAbort: (() => void) | undefined;
  try {
    const addon = resolveBackend(backendFor(args, options));
    const threads = resolveThreads(options?.threads);
    if (signal?.aborted) throw statusError(op, CANCELLED, args, signal);
    if (addon === null) {
      await new Promise((resolve) => setImmediate(resolve));
      if (signal?.aborted) throw statusError(op, CANCELLED, args, signal);
      const status = op.reference(...args);
      if (status !== 0) throw statusError(op, status, args);
      return;
    }
    const run = nativeOp(addon, op);
    let cancel: Int32Array | null = null;
    if (signal) {
      const flag = new Int32Array(1);
      cancel = flag;
      onAbort = () => Atomics.store(flag, 0, 1);
      signal.addEventListener('abort', onAbort, { once: true });
    }
    const status = await new Promise<number>((resolve) => {
      const queued = run(threads, cancel, resolve, ...args);
      if (queued !== 0) resolve(queued);
    });
    if (status !== 0) throw statusError(op, status, args, signal);
    if (backendOf(addon) === 'cuda') settle(args, true);
  } catch (error) {
    settle(args, false);
    throw error;
  } finally {
    if (signal && onAbort) signal.removeEventListener('abort', onAbort);
  }
}

/** Refuses options that the op does not have: a misspelt option must not be ignored. */
export function checkOptions(options: object | undefined, allowed: ReadonlySet<string>, name: string): void {
  if (options === undefined) return;
  if (options === null || typeof options !== 'object') {
    throw new HeddleError('ERR_ARGUMENT', `${name}: options must be an object`);
  }
  for (const key in options) {
    if (!allowed.has(key)) {
      throw new HeddleError(
        'ERR_OPTION',
        `${name}: unknown option '${key}'; known: ${[...allowed].join(', ')}`,
      );
    }
  }
}

/** An option that is true or false. */
export function optionFlag(value: unknown, fallback: boolean, name: string): boolean {
  if (value === undefined) return fallback;
  if (typeof value !== 'boolean') {
    throw new HeddleError('ERR_OPTION', `${name} must be true or false, got ${String(value)}`);
  }
  return value;
}

/** An option that must be one of some words. */
export function optionChoice<T extends string>(
  value: unknown,
  allowed: readonly T[],
  fallback: T,
  name: string,
): T {
  if (value === undefined) return fallback;
  if (!(allowed as readonly unknown[]).includes(value)) {
    throw new HeddleError(
      'ERR_OPTION',
      `${name} must be one of ${allowed.join(', ')}, got ${JSON.stringify(value)}`,
    );
  }
  return value as T;
}

/** An option that must be an integer in [min, max]. */
export function optionInteger(value: unknown, min: number, max: number, name: string): number {
  if (!Number.isInteger(value) || (value as number) < min || (value as number) > max) {
    throw new HeddleError(
      'ERR_OPTION',
      `${name} must be an integer from ${min} to ${max}, got ${String(value)}`,
    );
  }
  return value as number;
}

/** An option that must be a finite number, at least `min`. */
export function optionNumber(value: unknown, min: number, fallback: number, name: string): number {
  if (value === undefined) return fallback;
  if (typeof value !== 'number' || !Number.isFinite(value) || value < min) {
    const bound = min === -Infinity ? 'a finite number' : `a finite number of at least ${min}`;
    throw new HeddleError('ERR_OPTION', `${name} must be ${bound}, got ${String(value)}`);
  }
  return value;
}

/** Checks the dimensions of `out` and that it does not overlap any input. */
export function checkOut(
  out: Tensor<DType>,
  dims: readonly number[],
  inputs: readonly (Tensor<DType> | null | undefined)[],
  name: string,
): void {
  if (out.dims.length !== dims.length || out.dims.some((d, i) => d !== dims[i])) {
    throw new HeddleError(
      'ERR_SHAPE',
      `${name}: expected dims [${dims.join(', ')}], got [${out.dims.join(', ')}]`,
    );
  }
  for (const input of inputs) {
    if (!input || input.data.buffer !== out.data.buffer) continue;
    const a = out.data.byteOffset;
    const b = input.data.byteOffset;
    if (a < b + input.data.byteLength && b < a + out.data.byteLength) {
      throw new HeddleError('ERR_ARGUMENT', `${name} overlaps an input`);
    }
  }
}
