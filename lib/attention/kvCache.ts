import type { Location } from '../device.ts';
import type { FloatType } from '../dtype.ts';
import { FLOAT_TYPES } from '../dtype.ts';
import { HeddleError } from '../errors.ts';
import { checkOptions, optionChoice, optionInteger } from '../op.ts';
import { asTensor, type Tensor, type TensorLike } from '../tensor.ts';
import { type KVCacheType, type PagePools, pageLayout } from './kvLayout.ts';
import { KV_CACHE_OPTION_NAMES, KV_CACHE_TYPES, type KVCacheOptions } from './kvOptions.ts';
import { checkSource, DevicePages, HostPages, type KeysAndValues, type PageStore } from './kvPages.ts';
import { MAX_HEAD_DIM } from './options.ts';

export type { KVCacheType } from './kvLayout.ts';
export type { KVCacheOptions } from './kvOptions.ts';

interface SequenceState {
  /** From `firstPage` on. */
  pages: number[];
  /** Pages before it were given back by the window. */
  firstPage: number;
  length: number;
  /** A running decode may read slots behind the end: the last page must not be written in place. */
  cut: boolean;
}

/** Positions are 32-bit integers in the kernels. */
const MAX_TOKENS = 2 ** 31 - 1;

/**
 * Keys and values of many sequences in pages of equal size. Sequences that were forked share their pages until one
 * of them writes. Every method either does all it says or throws and changes nothing.
 */
export class KVCache {
  readonly keyHeads: number;
  readonly headDim: number;
  readonly valueDim: number;
  readonly type: KVCacheType;
  readonly pageSize: number;
  /** Keys that stay to the left of a query, or undefined: all. */
  readonly window: number | undefined;
  /** Pages in all. */
  readonly pages: number;
  /** Bytes reserved. */
  readonly bytes: number;
  /** Where the pages are. */
  readonly device: Location;

  #store: PageStore | null;
  /** Sequences that hold each page. */
  #holders: Int32Array;
  #free: number[] = [];
  /** Pages given up while a decode may still read them. */
  #leaving: number[] = [];
  #readers = 0;
  #sequences = new Map<number, SequenceState>();
  #nextId = 0;

  constructor(options: KVCacheOptions) {
    checkOptions(options, KV_CACHE_OPTION_NAMES, 'KVCache');
    const o = options ?? ({} as KVCacheOptions);
    this.keyHeads = optionInteger(o.keyHeads, 1, 65536, 'keyHeads');
    this.headDim = optionInteger(o.headDim, 1, MAX_HEAD_DIM, 'headDim');
    this.valueDim = optionInteger(o.valueDim ?? o.headDim, 1, MAX_HEAD_DIM, 'valueDim');
    this.type = optionChoice(o.type, KV_CACHE_TYPES, 'float32', 'type');
    this.pageSize = optionInteger(o.pageSize ?? 64, 1, 65536, 'pageSize');
    this.window = o.window === undefined ? undefined : optionInteger(o.window, 0, MAX_TOKENS, 'window');
    this.device = optionChoice(o.device, ['cpu', 'cuda'], 'cpu', 'device');
    const keyLayout = pageLayout(this.type, this.headDim, this.pageSize, false);
    const valueLayout = pageLayout(this.type, this.valueDim, this.pageSize, true);
    const { slots, top } = keyLayout;
    const vectors = this.keyHeads * slots;
    const elements = this.keyHeads * (keyLayout.size + valueLayout.size);
    const pageBytes =
      elements * (this.type === 'float32' ? 4 : top > 0 ? 1 : 2) + (top > 0 ? vectors * 8 : 0);
    if ((o.pages === undefined) === (o.maxBytes === undefined)) {
      throw new HeddleError('ERR_OPTION', 'KVCache: give either pages or maxBytes');
    }
    if (o.maxBytes !== undefined) optionInteger(o.maxBytes, pageBytes, Number.MAX_SAFE_INTEGER, 'maxBytes');
    const count = o.pages ?? Math.floor(o.maxBytes! / pageBytes);
    this.pages = optionInteger(count, 1, 2 ** 31 - 1, 'pages');
    this.bytes = this.pages * pageBytes;
    const { type, keyHeads, headDim, valueDim, pageSize, pages } = this;
    const shape = { type, keyHeads, headDim, valueDim, pageSize, pages, keyLayout, valueLayout };
    this.#store = this.device === 'cuda' ? new DevicePages(shape) : new HostPages(shape);
    this.#holders = new Int32Array(this.pages);
    for (let p = this.pages - 1; p >= 0; p--) this.#free.push(p);
  }

  /** Pages that no sequence holds. */
  get freePages(): number {
    return this.#free.length + this.#leaving.length;
  }

  /** Starts an empty sequence and returns its id; ids are never used again. */
  create(): number {
    this.#open();
    const id = this.#nextId++;
    this.#sequences.set(id, { pages: [], firstPage: 0, length: 0, cut: false });
    return id;
  }

  /** Tokens of a sequence, those that left the window included. */
  length(sequence: number): number {
    return this.#get(sequence).length;
  }

  /** First position of a sequence that is still there: 0 without a window. */
  start(sequence: number): number {
    return this.#get(sequence).firstPage * this.pageSize;
  }

  /**
   * Adds tokens at the end of a sequence.
   * @param k `[tokens, keyHeads, headDim]` float32, bfloat16 or float16, stored in the cache's type; for a cache on the
   *   device, there or on the CPU
   * @param v `[tokens, keyHeads, valueDim]`
   * @throws HeddleError `ERR_MEMORY` when too few pages are free; `ERR_ARGUMENT` for tokens on the device and a cache
   *   that is not
   */
  append(sequence: number, k: TensorLike, v: TensorLike): void {
    const s = this.#get(sequence);
    const [keys, values] = [this.#input(k, this.headDim, 'k'), this.#input(v, this.valueDim, 'v')];
    const tokens = keys.dims[0];
    if (values.dims[0] !== tokens) {
      throw new HeddleError('ERR_SHAPE', `v: expected ${tokens} tokens as in k, got ${values.dims[0]}`);
    }
    if (tokens === 0) return;
    if (tokens > MAX_TOKENS - s.length) {
      throw new HeddleError(
        'ERR_VALUE',
        `k: ${tokens} tokens after ${s.length} pass the limit of ${MAX_TOKENS} tokens`,
      );
    }
    // Pages that the first new token does not see are given back; those that nobody else holds can be taken at once.
    const oldest = this.#oldest(s.length);
    const drop = Math.min(s.pages.length, Math.floor(oldest / this.pageSize) - s.firstPage);
    let available = this.#free.length;
    if (this.#readers === 0) {
      for (let i = 0; i < drop; i++) if (this.#holders[s.pages[i]] === 1) available++;
    }
    const last = s.pages.length - 1;
    // A shared last page with room is copied before it is written, and so is one that was cut while it is being read.
    const shared = () => this.#holders[s.pages[last]] > 1 || (s.cut && this.#readers > 0);
    const copy = s.length % this.pageSize !== 0 && shared();
    const total = Math.ceil((s.length + tokens) / this.pageSize) - s.firstPage;
    const needed = total - s.pages.length + (copy ? 1 : 0);
    if (needed > available) {
      throw new HeddleError(
        'ERR_MEMORY',
        `KVCache: ${tokens} tokens need ${needed} pages, ${available} are free of ${this.pages}`,
      );
    }
    const before: SequenceState = { ...s, pages: s.pages.slice() };
    const released = s.pages.splice(0, drop);
    const taken: number[] = [];
    for (const page of released) this.#release(page);
    s.firstPage += drop;
    let copied: { from: number; to: number } | null = null;
    if (copy) {
      const from = s.pages[s.pages.length - 1];
      copied = { from, to: this.#take() };
      taken.push(copied.to);
      this.#release(from);
      released.push(from);
      s.pages[s.pages.length - 1] = copied.to;
    }
    s.cut = false;
    while (s.pages.length < total - drop) {
      const page = this.#take();
      taken.push(page);
      s.pages.push(page);
    }
    try {
      const written = s.pages.slice(Math.floor(s.length / this.pageSize) - s.firstPage);
      this.#open().append(written, s.length, keys, values, copied);
    } catch (error) {
      this.#undo(taken, released);
      Object.assign(s, before);
      throw error;
    }
    s.length += tokens;
  }

  /** Tokens [begin, end) of a sequence as the kernels see them, dequantised, on the CPU: for tests and for moving a cache. */
  read(sequence: number, begin: number, end: number): KeysAndValues {
    const s = this.#get(sequence);
    optionInteger(end, 0, s.length, 'end');
    optionInteger(begin, s.firstPage * this.pageSize, end, 'begin');
    const pages = s.pages.slice(Math.floor(begin / this.pageSize) - s.firstPage);
    return this.#open().read(pages, begin, end - begin);
  }

  /** A new sequence with the same tokens; pages are shared until one of the two writes. */
  fork(sequence: number): number {
    const s = this.#get(sequence);
    const id = this.create();
    for (const page of s.pages) this.#holders[page]++;
    this.#sequences.set(id, { ...s, pages: s.pages.slice() });
    return id;
  }

  /**
   * Drops the tokens of a sequence from `length` on.
   * @throws HeddleError `ERR_VALUE` when a window has given back keys that the sequence would then need; 0 always works
   */
  truncate(sequence: number, length: number): void {
    const s = this.#get(sequence);
    optionInteger(length, 0, s.length, 'length');
    const [oldest, start] = [this.#oldest(length), s.firstPage * this.pageSize];
    if (length > 0 && length < s.length && oldest < start) {
      throw new HeddleError(
        'ERR_VALUE',
        `length: with ${length} tokens sequence ${sequence} needs keys from ${oldest} on, the window of ${this.window} has left those from ${start} on`,
      );
    }
    if (length < s.length && this.#readers > 0) s.cut = true;
    s.length = length;
    const keep = Math.max(0, Math.ceil(length / this.pageSize) - s.firstPage);
    while (s.pages.length > keep) this.#release(s.pages.pop()!);
    if (length === 0) s.firstPage = 0;
  }

  /** Ends a sequence and gives its pages back. */
  free(sequence: number): void {
    const s = this.#get(sequence);
    this.#sequences.delete(sequence);
    for (const page of s.pages) this.#release(page);
  }

  /** Gives all memory back; the cache cannot be used after. Decodes that run keep what they read. */
  dispose(): void {
    this.#store?.release();
    this.#store = null;
    this.#sequences.clear();
    this.#free = [];
    this.#leaving = [];
  }

  /** @internal Page tables, first positions and lengths of sequences, and the pools, until {@link endRead}. */
  beginRead(sequences: readonly number[]): {
    pools: PagePools;
    table: Int32Array;
    starts: Int32Array;
    lengths: Int32Array;
  } {
    const { pools } = this.#open();
    const states = sequences.map((id) => this.#get(id));
    const width = states.reduce((most, s) => Math.max(most, s.pages.length), 1);
    const table = new Int32Array(states.length * width);
    for (const [i, s] of states.entries()) table.set(s.pages, i * width);
    this.#readers++;
    const starts = Int32Array.from(states, (s) => s.firstPage * this.pageSize);
    return { pools, table, starts, lengths: Int32Array.from(states, (s) => s.length) };
  }

  /** @internal */
  endRead(): void {
    if (--this.#readers > 0) return;
    this.#free.push(...this.#leaving.splice(0));
  }

  /** First key that the window shows to a token at `position`. */
  #oldest(position: number): number {
    return this.window === undefined ? 0 : Math.max(0, position - this.window);
  }

  #open(): PageStore {
    if (this.#store === null) throw new HeddleError('ERR_DISPOSED', 'KVCache: used after dispose()');
    return this.#store;
  }

  #get(sequence: number): SequenceState {
    this.#open();
    const s = this.#sequences.get(sequence);
    if (s === undefined) {
      throw new HeddleError(
        'ERR_ARGUMENT',
        `KVCache: sequence ${String(sequence)} does not exist (never created, or freed)`,
      );
    }
    return s;
  }

  #input(value: TensorLike, dim: number, name: string): Tensor<FloatType> {
    const t = asTensor(value, name, FLOAT_TYPES, 3, 'device');
    checkSource(t, this.device, name);
    if (t.dims[1] !== this.keyHeads || t.dims[2] !== dim) {
      throw new HeddleError(
        'ERR_SHAPE',
        `${name}: expected [tokens, ${this.keyHeads}, ${dim}], got [${t.dims.join(', ')}]`,
      );
    }
    return t;
  }

  #take(): number {
    const page = this.#free.pop()!;
    this.#holders[page] = 1;
    return page;
  }

  #release(page: number): void {
    if (--this.#holders[page] === 0) (this.#readers > 0 ? this.#leaving : this.#free).push(page);
  }

  /** Takes back what an append that failed had taken and released, latest first. */
  #undo(taken: number[], released: number[]): void {
    for (const page of taken.reverse()) {
      this.#holders[page] = 0;
      this.#free.push(page);
    }
    for (const page of released.reverse()) {
      if (this.#holders[page]++ === 0) (this.#readers > 0 ? this.#leaving : this.#free).pop();
    }
  }
}

// Where the runtime has it, `using cache = new KVCache(...)` disposes at the end of the block.
if (typeof Symbol.dispose === 'symbol') {
  Object.defineProperty(KVCache.prototype, Symbol.dispose, { value: KVCache.prototype.dispose });
}
