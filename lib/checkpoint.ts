/**
 * Reading checkpoints in the safetensors format, one file or many shards with an index.
 *
 * The format: https://github.com/huggingface/safetensors#format. Opening reads headers only; each tensor is
 * read when asked for, straight into the memory of the `Tensor` that is returned.
 */
import os from 'node:os';
import { checkAborted, type FileSource, fill, openSource, readHeaderBytes } from './checkpoint/file.ts';
import { failIn, type HeaderTensor, headerLength, PREFIX_BYTES, parseHeader } from './checkpoint/header.ts';
import { quote } from './checkpoint/json.ts';
import { type Layout, locate, readConfig } from './checkpoint/layout.ts';
import { runAsync, runSync, type Steps } from './checkpoint/steps.ts';
import { HeddleError } from './errors.ts';
import { allocate, BYTES_PER_ELEMENT, type DType, Tensor } from './tensor.ts';

/** What a checkpoint says about one tensor. */
export interface TensorInfo {
  readonly name: string;
  /** The format's name of the element type, for example `'BF16'`. */
  readonly dtype: string;
  /**
   * heddle's name of the element type (`BOOL` is `'uint8'`, 0 or 1), or `undefined` for those heddle has
   * none for: I16, U16, U32, U64, C64, F8_E8M0, F8_E4M3FNUZ, F8_E5M2FNUZ, F6_E2M3, F6_E3M2, F4. Those can
   * be had with {@link Checkpoint.readBytes}.
   */
  readonly type: DType | undefined;
  /** Dimensions, outermost first; `[]` for a scalar. */
  readonly dims: readonly number[];
  /** Bytes of the tensor in the file. */
  readonly byteLength: number;
  /** Path of the safetensors file it is in. */
  readonly file: string;
}

/** Options of {@link openCheckpoint}. */
export interface CheckpointOptions {
  /**
   * `'auto'` (the default) maps files into memory where this build and the file allow it and reads them
   * otherwise; `'never'` always reads. Mapped tensors share memory with the file: do not write to them.
   */
  readonly map?: 'auto' | 'never';
}

/** Options of the asynchronous reads. */
export interface ReadOptions {
  /** Ends the read with `ERR_ABORTED`; looked at every 16 MiB. */
  readonly signal?: AbortSignal;
}

/** Where a tensor's bytes are. */
interface Place {
  readonly info: TensorInfo;
  readonly source: FileSource;
  /** From the start of the file. */
  readonly offset: number;
}

/** What opening found; the constructor's argument. */
interface Contents {
  readonly path: string;
  readonly places: ReadonlyMap<string, Place>;
  readonly sources: readonly FileSource[];
  readonly metadata: Readonly<Record<string, string>>;
  readonly config: Readonly<Record<string, unknown>> | undefined;
  readonly map: boolean;
}

const HOST_IS_LITTLE_ENDIAN = os.endianness() === 'LE';

// A runtime without Symbol.dispose (or with a polyfill under another name) still gets a working `close`.
const DISPOSE: typeof Symbol.dispose = Symbol.dispose ?? Symbol.for('Symbol.dispose');

// The backstop for checkpoints that nobody closed: their files close when they are collected.
const unclosed = new FinalizationRegistry<readonly FileSource[]>((sources) => {
  for (const source of sources) source.close();
});

/**
 * An open checkpoint; made by {@link openCheckpoint}. Its files stay open until {@link Checkpoint.close},
 * so a file that is replaced meanwhile does not mix with what was opened.
 */
export class Checkpoint {
  /** The path it was opened by. */
  readonly path: string;
  /** Every tensor by name, in the order of the files and their headers. */
  readonly tensors: ReadonlyMap<string, TensorInfo>;
  /**
   * The files' `__metadata__`; where shards disagree on a key, the first shard's value. The object has no
   * prototype.
   */
  readonly metadata: Readonly<Record<string, string>>;
  /** The parsed `config.json` in the same directory, if there is one. */
  readonly config: Readonly<Record<string, unknown>> | undefined;

  readonly #places: ReadonlyMap<string, Place>;
  readonly #sources: readonly FileSource[];
  readonly #map: boolean;
  #closed = false;

  /** @internal */
  constructor(contents: Contents) {
    this.path = contents.path;
    this.metadata = contents.metadata;
    this.config = contents.config;
    this.#places = contents.places;
    this.#sources = contents.sources;
    this.#map = contents.map;
    const tensors = new Map<string, TensorInfo>();
    for (const [name, { info }] of contents.places) tensors.set(name, info);
    this.tensors = tensors;
    unclosed.register(this, this.#sources, this);
  }

  /** Whether there is a tensor of this name. */
  has(name: string): boolean {
    return this.#places.has(name);
  }

  /**
   * What is known about a tensor, without reading it.
   * @throws HeddleError `ERR_CHECKPOINT` when there is no tensor of this name
   */
  info(name: string): TensorInfo {
    return this.#place(name).info;
  }

  /**
   * Reads a whole tensor into memory of its own, without blocking the event loop.
   * @returns a tensor of `info(name).type` and `info(name).dims`
   * @throws HeddleError `ERR_CHECKPOINT` when there is no such tensor or the file has become shorter,
   *   `ERR_DTYPE` when heddle has no such element type, `ERR_ABORTED`, `ERR_DISPOSED` after `close`,
   *   `ERR_MEMORY`
   */
  async read(name: string, options?: ReadOptions): Promise<Tensor> {
    return runAsync(this.#readRows(name, undefined, options));
  }

  /** {@link Checkpoint.read} on the calling thread. */
  readSync(name: string): Tensor {
    return runSync(this.#readRows(name, undefined));
  }

  /**
   * Reads rows of the outermost dimension: from a stack of experts `[E, …]`, one expert alone.
   * @param firstRow the first row, from 0
   * @param rowCount how many; 0 gives an empty tensor
   * @returns a tensor of dims `[rowCount, ...info(name).dims.slice(1)]`
   * @throws HeddleError as {@link Checkpoint.read}; `ERR_ARGUMENT` when the rows are not non-negative
   *   integers, `ERR_SHAPE` when they are not all in the tensor or it is a scalar
   */
  async readRange(name: string, firstRow: number, rowCount: number, options?: ReadOptions): Promise<Tensor> {
    return runAsync(this.#readRows(name, [firstRow, rowCount], options));
  }

  /** {@link Checkpoint.readRange} on the calling thread. */
  readRangeSync(name: string, firstRow: number, rowCount: number): Tensor {
    return runSync(this.#readRows(name, [firstRow, rowCount]));
  }

  /**
   * Reads a tensor's bytes as the file has them (little-endian), whatever its element type.
   * @returns `info(name).byteLength` bytes in a buffer of their own, from its offset 0
   * @throws HeddleError as {@link Checkpoint.read}, except `ERR_DTYPE`
   */
  async readBytes(name: string, options?: ReadOptions): Promise<Uint8Array> {
    return runAsync(this.#readRaw(name, options));
  }

  /** {@link Checkpoint.readBytes} on the calling thread. */
  readBytesSync(name: string): Uint8Array {
    return runSync(this.#readRaw(name));
  }

  /** Closes the files. Tensors already read stay valid; reads from now on give `ERR_DISPOSED`. Idempotent. */
  close(): void {
    this.#closed = true;
    unclosed.unregister(this);
    for (const source of this.#sources) source.close();
  }

  /** The same as {@link Checkpoint.close}, for `using`. */
  [DISPOSE](): void {
    this.close();
  }

  #place(name: string): Place {
    if (typeof name !== 'string') {
      throw new HeddleError('ERR_ARGUMENT', `name: expected a string, got ${typeof name}`);
    }
    const place = this.#places.get(name);
    if (place === undefined) throw failIn(this.path)(`there is no tensor ${quote(name)}`);
    return place;
  }

  #open(name: string, options?: ReadOptions): Place {
    if (this.#closed) throw new HeddleError('ERR_DISPOSED', `${this.path}: the checkpoint is closed`);
    const signal = options?.signal;
    if (signal !== undefined && typeof (signal as AbortSignal | null)?.aborted !== 'boolean') {
      throw new HeddleError('ERR_OPTION', 'signal: expected an AbortSignal');
    }
    const place = this.#place(name);
    checkAborted(`tensor ${quote(name)}`, signal);
    return place;
  }

  *#readRows(
    name: string,
    rows: readonly [first: number, count: number] | undefined,
    options?: ReadOptions,
  ): Steps<Tensor> {
    const { info, source, offset } = this.#open(name, options);
    const { type } = info;
    if (type === undefined) {
      throw new HeddleError(
        'ERR_DTYPE',
        `${info.file}: tensor ${quote(name)} has the dtype ${info.dtype}, which no heddle type represents; ` +
          'readBytes gives its bytes',
      );
    }
    const range = rows === undefined ? whole(info) : rowRange(info, rows[0], rows[1]);
    const count = range.length / BYTES_PER_ELEMENT[type];
    const subject = `tensor ${quote(name)}`;
    const mapped =
      this.#map && HOST_IS_LITTLE_ENDIAN ? source.map?.(offset + range.begin, range.length) : undefined;
    if (mapped !== undefined) return new Tensor(type, viewOf(type, mapped, count), range.dims);
    const data = allocate(type, count);
    yield* fill(source, offset + range.begin, data.buffer, subject, options?.signal);
    toHostOrder(data.buffer, BYTES_PER_ELEMENT[type], HOST_IS_LITTLE_ENDIAN);
    return new Tensor(type, data, range.dims);
  }

  *#readRaw(name: string, options?: ReadOptions): Steps<Uint8Array> {
    const { info, source, offset } = this.#open(name, options);
    const bytes = allocate('uint8', info.byteLength);
    yield* fill(source, offset, bytes.buffer, `tensor ${quote(name)}`, options?.signal);
    return bytes;
  }
}

/**
 * Opens a checkpoint and checks all of its headers; no tensor is read yet.
 *
 * @param path a directory (`model.safetensors.index.json` if there, else `model.safetensors`, else the only
 *   `*.safetensors.index.json` or `*.safetensors`), an index file (`*.json`), or a safetensors file.
 *   `config.json` beside it is read too.
 * @throws HeddleError `ERR_CHECKPOINT`, naming the file and, where there is one, the tensor: nothing there,
 *   a damaged or truncated file, tensors that overlap or leave holes, duplicate names, an index that does
 *   not fit its shards. `ERR_ARGUMENT` or `ERR_OPTION` for arguments not of the documented kind.
 * @see https://github.com/huggingface/safetensors#format
 */
export async function openCheckpoint(path: string, options?: CheckpointOptions): Promise<Checkpoint> {
  return runAsync(open(path, options));
}

/** {@link openCheckpoint} on the calling thread. */
export function openCheckpointSync(path: string, options?: CheckpointOptions): Checkpoint {
  return runSync(open(path, options));
}

function* open(path: string, options: CheckpointOptions = {}): Steps<Checkpoint> {
  if (typeof path !== 'string' || path === '') {
    throw new HeddleError('ERR_ARGUMENT', 'path: expected the path of a checkpoint as a string');
  }
  const map = options?.map ?? 'auto';
  if (map !== 'auto' && map !== 'never') {
    throw new HeddleError('ERR_OPTION', `map: expected 'auto' or 'never', got ${show(map)}`);
  }
  const layout = yield* locate(path);
  const config = yield* readConfig(layout.directory);
  const sources: FileSource[] = [];
  try {
    const { places, metadata } = yield* openFiles(layout, sources);
    return new Checkpoint({ path, places, sources, metadata, config, map: map === 'auto' });
  } catch (error) {
    for (const source of sources) source.close();
    throw error;
  }
}

/** Opens each file, appending it to `sources`, and gathers its tensors. */
function* openFiles(
  layout: Layout,
  sources: FileSource[],
): Steps<{ places: Map<string, Place>; metadata: Record<string, string> }> {
  const places = new Map<string, Place>();
  const metadata: Record<string, string> = Object.create(null);
  for (const [file, promised] of layout.files) {
    const source = yield* openSource(file);
    sources.push(source);
    const bytes = yield* readHeaderBytes(source, (prefix) => headerLength(prefix, source.size, file));
    const dataStart = PREFIX_BYTES + bytes.byteLength;
    const header = parseHeader(bytes, source.size - dataStart, file);
    for (const tensor of header.tensors) {
      const other = places.get(tensor.name);
      if (other !== undefined) {
        throw failIn(file, tensor.name, true)(`is also in ${other.info.file}`);
      }
      places.set(tensor.name, { info: infoOf(tensor, file), source, offset: dataStart + tensor.begin });
    }
    for (const name of promised) {
      if (places.get(name)?.source !== source) {
        throw failIn(file, name, true)(`is missing; ${layout.index} promises it here`);
      }
    }
    for (const [key, value] of Object.entries(header.metadata)) {
      if (!(key in metadata)) metadata[key] = value;
    }
  }
  return { places, metadata: Object.freeze(metadata) };
}

function infoOf({ name, dtype, type, dims, begin, end }: HeaderTensor, file: string): TensorInfo {
  return Object.freeze({ name, dtype, type, dims, byteLength: end - begin, file });
}

/** Bytes of a tensor and the dims they have when read. */
interface Range {
  readonly begin: number;
  readonly length: number;
  readonly dims: readonly number[];
}

function whole(info: TensorInfo): Range {
  return { begin: 0, length: info.byteLength, dims: info.dims };
}

function rowRange(info: TensorInfo, first: number, count: number): Range {
  for (const [name, value] of [
    ['firstRow', first],
    ['rowCount', count],
  ] as const) {
    if (!Number.isSafeInteger(value) || value < 0) {
      throw new HeddleError('ERR_ARGUMENT', `${name}: expected a non-negative integer, got ${show(value)}`);
    }
  }
  const subject = `${info.file}: tensor ${quote(info.name)}`;
  if (info.dims.length === 0) throw new HeddleError('ERR_SHAPE', `${subject} is a scalar and has no rows`);
  const [rows, ...inner] = info.dims;
  if (first + count > rows) {
    throw new HeddleError(
      'ERR_SHAPE',
      `${subject} has ${rows} rows; firstRow ${first} and rowCount ${count} do not fit`,
    );
  }
  const rowBytes = rows === 0 ? 0 : info.byteLength / rows;
  return { begin: first * rowBytes, length: count * rowBytes, dims: [count, ...inner] };
}

function show(value: unknown): string {
  return typeof value === 'number' ? String(value) : typeof value === 'string' ? quote(value) : typeof value;
}

/** The typed array of `type` over the first `count` elements of a buffer. */
function viewOf<T extends DType>(type: T, buffer: ArrayBuffer, count: number) {
  const Class = allocate(type, 0).constructor as new (b: ArrayBuffer, o: number, n: number) => never;
  return new Class(buffer, 0, count);
}

/** Files are little-endian: reverses each element on a big-endian host. @internal */
export function toHostOrder(buffer: ArrayBufferLike, elementBytes: number, littleEndian: boolean): void {
  if (littleEndian || elementBytes === 1) return;
  const bytes = Buffer.from(buffer);
  if (elementBytes === 2) bytes.swap16();
  else if (elementBytes === 4) bytes.swap32();
  else bytes.swap64();
}
