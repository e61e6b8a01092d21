/** Positioned reads from one open file, and the seam where memory mapping will be plugged in. */
import fs from 'node:fs';
import { HeddleError } from '../errors.ts';
import { failIn, PREFIX_BYTES } from './header.ts';
import { type Steps, step } from './steps.ts';

/**
 * An open file. All reads are positioned, so any number may run at once.
 * `read` and `readSync` may return fewer bytes than asked for; 0 means the end of the file.
 */
export interface FileSource {
  readonly path: string;
  /** Bytes in the file when it was opened. */
  readonly size: number;
  read(offset: number, target: Uint8Array): Promise<number>;
  readSync(offset: number, target: Uint8Array): number;
  /** Idempotent. Reads under way end with `ERR_DISPOSED` or complete; later ones are refused. */
  close(): void;
  /**
   * The file's bytes `[offset, offset + length)` as memory, without reading them; the buffer starts at
   * `offset` exactly and stays valid after `close`. `undefined` where this range cannot be mapped (for
   * example because it is not aligned for its element type): the caller then reads.
   */
  map?(offset: number, length: number): ArrayBuffer | undefined;
}

/**
 * Largest single read. Far below the 2 GiB that one `read` call can do, so that an abort is noticed after
 * a few milliseconds, and large enough that the calls cost nothing.
 */
export const CHUNK_BYTES = 16 * 1024 * 1024;

// Without O_NONBLOCK, opening a named pipe that nobody writes to would wait for ever.
const OPEN_FLAGS = fs.constants.O_RDONLY | (fs.constants.O_NONBLOCK ?? 0);

class FsSource implements FileSource {
  readonly path: string;
  readonly size: number;
  #fd: number;
  #closed = false;
  #pending = 0;

  constructor(path: string, fd: number, size: number) {
    this.path = path;
    this.#fd = fd;
    this.size = size;
  }

  async read(offset: number, target: Uint8Array): Promise<number> {
    this.#check();
    this.#pending++;
    try {
      return await new Promise<number>((resolve, reject) => {
        fs.read(this.#fd, target, 0, target.byteLength, offset, (error, count) =>
          error ? reject(unreadable(this.path, error)) : resolve(count),
        );
      });
    } finally {
      this.#pending--;
      if (this.#closed && this.#pending === 0) closeQuietly(this.#fd);
    }
  }

  readSync(offset: number, target: Uint8Array): number {
    this.#check();
    try {
      return fs.readSync(this.#fd, target, 0, target.byteLength, offset);
    } catch (error) {
      throw unreadable(this.path, error);
    }
  }

  close(): void {
    if (this.#closed) return;
    this.#closed = true;
    // A descriptor closed under a running read could be reused, and the read would get another file.
    if (this.#pending === 0) closeQuietly(this.#fd);
  }

  #check(): void {
    if (this.#closed) throw new HeddleError('ERR_DISPOSED', `${this.path}: the checkpoint is closed`);
  }
}

/** Opens a regular file for positioned reads. */
export function* openSource(path: string): Steps<FileSource> {
  let fd: number;
  try {
    fd = yield* step(
      () => fs.openSync(path, OPEN_FLAGS),
      () =>
        new Promise((resolve, reject) => {
          fs.open(path, OPEN_FLAGS, (error, opened) => (error ? reject(error) : resolve(opened)));
        }),
    );
  } catch (error) {
    throw unreadable(path, error);
  }
  try {
    const stat = yield* step(
      () => fs.fstatSync(fd),
      () =>
        new Promise<fs.Stats>((resolve, reject) => {
          fs.fstat(fd, (error, found) => (error ? reject(error) : resolve(found)));
        }),
    );
    if (!stat.isFile()) throw failIn(path)('is not a regular file');
    return new FsSource(path, fd, stat.size);
  } catch (error) {
    closeQuietly(fd);
    throw error instanceof HeddleError ? error : unreadable(path, error);
  }
}

/**
 * Fills `target` from `offset` on, in chunks.
 * @param subject what is being read, for messages
 * @throws HeddleError `ERR_CHECKPOINT` when the file ends early, `ERR_ABORTED`, `ERR_DISPOSED`
 */
export function* fill(
  source: FileSource,
  offset: number,
  target: ArrayBufferLike,
  subject: string,
  signal?: AbortSignal,
): Steps<void> {
  let done = 0;
  while (done < target.byteLength) {
    checkAborted(subject, signal);
    const chunk = new Uint8Array(target, done, Math.min(CHUNK_BYTES, target.byteLength - done));
    const at = offset + done;
    const count = yield* step(
      () => source.readSync(at, chunk),
      () => source.read(at, chunk),
    );
    if (count === 0) {
      throw failIn(
        source.path,
        subject,
      )(`could not be read: the file ends at byte ${at}; it had ${source.size} bytes when it was opened`);
    }
    done += count;
  }
  checkAborted(subject, signal);
}

/** A whole small file, refused when larger than `limit`. */
export function* readSmallFile(path: string, limit: number): Steps<ArrayBuffer> {
  const source = yield* openSource(path);
  try {
    if (source.size > limit) throw failIn(path)(`has ${source.size} bytes; at most ${limit} are read`);
    const bytes = new ArrayBuffer(source.size);
    yield* fill(source, 0, bytes, 'the file');
    return bytes;
  } finally {
    source.close();
  }
}

/** The two parts before the data: the length prefix and the header's bytes, by way of `length`. */
export function* readHeaderBytes(
  source: FileSource,
  length: (prefix: ArrayBuffer) => number,
): Steps<ArrayBuffer> {
  if (source.size < PREFIX_BYTES) {
    throw failIn(source.path)(
      `truncated: ${source.size} bytes, a safetensors file has at least ${PREFIX_BYTES}`,
    );
  }
  const prefix = new ArrayBuffer(PREFIX_BYTES);
  yield* fill(source, 0, prefix, 'the header');
  const header = new ArrayBuffer(length(prefix));
  yield* fill(source, PREFIX_BYTES, header, 'the header');
  return header;
}

/** What a path is, or `undefined` where there is nothing. */
export function* kindOf(path: string): Steps<'directory' | 'other' | undefined> {
  try {
    const stat = yield* step(
      () => fs.statSync(path),
      () => fs.promises.stat(path),
    );
    return stat.isDirectory() ? 'directory' : 'other';
  } catch (error) {
    const { code } = error as NodeJS.ErrnoException;
    if (code === 'ENOENT' || code === 'ENOTDIR') return undefined;
    throw unreadable(path, error);
  }
}

/** The names in a directory, sorted. */
export function* list(path: string): Steps<string[]> {
  try {
    const names = yield* step(
      () => fs.readdirSync(path),
      () => fs.promises.readdir(path),
    );
    return names.sort();
  } catch (error) {
    throw unreadable(path, error);
  }
}

/** @throws HeddleError `ERR_ABORTED` when the signal has fired */
export function checkAborted(subject: string, signal: AbortSignal | undefined): void {
  if (signal?.aborted) {
    throw new HeddleError('ERR_ABORTED', `reading ${subject} was aborted`, { cause: signal.reason });
  }
}

function unreadable(path: string, cause: unknown): Error {
  const { code, message } = cause as NodeJS.ErrnoException;
  return failIn(path)(code === 'ENOENT' ? 'no such file' : `cannot be read: ${message}`, cause);
}

function closeQuietly(fd: number): void {
  try {
    fs.closeSync(fd);
  } catch {
    // A file opened for reading has nothing to lose on close.
  }
}
