import { DTYPE_CODE, type FloatType, readFloat, writeFloat } from '../dtype.ts';
import { HeddleError } from '../errors.ts';
import { checkOptions, optionChoice, optionInteger } from '../op.ts';
import { allocate, asTensor, type Tensor, type TensorLike, type TypedArray } from '../tensor.ts';
import { MAX_HEAD_DIM } from './options.ts';

/** How a cache stores keys and values. `int8` keeps one float32 scale per token and head. */
export type KVCacheType = FloatType | 'int8';

export interface KVCacheOptions {
  /** Heads of keys and values, 1 to 65,536. */
  keyHeads: number;
  /** 1 to 512. */
  headDim: number;
  /** Default: headDim. */
  valueDim?: number;
  /** Default float32. */
  type?: KVCacheType;
  /** Tokens of a page. Default 64. */
  pageSize?: number;
  /** Pages of the cache; all memory is reserved at once. Give this or `maxBytes`. */
  pages?: number;
  /** As many pages as fit into this many bytes. */
  maxBytes?: number;
}

/** What {@link decodeAttention} reads: the pools, and how pages are laid out in them. */
export interface PagePools {
  readonly type: KVCacheType;
  readonly keyHeads: number;
  readonly headDim: number;
  readonly valueDim: number;
  readonly pageSize: number;
  /** `[page][head][slot][dim]`. */
  readonly keys: TypedArray;
  readonly values: TypedArray;
  /** `[page][head][slot]`, for int8. */
  readonly keyScales: Float32Array | null;
  readonly valueScales: Float32Array | null;
}

interface SequenceState {
  pages: number[];
  length: number;
}

const NAMES: ReadonlySet<string> = new Set([
  'keyHeads',
  'headDim',
  'valueDim',
  'type',
  'pageSize',
  'pages',
  'maxBytes',
]);
const TYPES: readonly KVCacheType[] = ['float32', 'bfloat16', 'float16', 'int8'];
const FLOATS: readonly FloatType[] = ['float32', 'bfloat16', 'float16'];

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
  /** Pages in all. */
  readonly pages: number;
  /** Bytes reserved. */
  readonly bytes: number;

  #pools: PagePools | null;
  /** Sequences that hold each page. */
  #holders: Int32Array;
  #free: number[] = [];
  /** Pages given up while a decode may still read them. */
  #leaving: number[] = [];
  #readers = 0;
  #sequences = new Map<number, SequenceState>();
  #nextId = 0;

  constructor(options: KVCacheOptions) {
    checkOptions(options, NAMES, 'KVCache');
    const o = options ?? ({} as KVCacheOptions);
    this.keyHeads = optionInteger(o.keyHeads, 1, 65536, 'keyHeads');
    this.headDim = optionInteger(o.headDim, 1, MAX_HEAD_DIM, 'headDim');
    this.valueDim = optionInteger(o.valueDim ?? o.headDim, 1, MAX_HEAD_DIM, 'valueDim');
    this.type = optionChoice(o.type, TYPES, 'float32', 'type');
    this.pageSize = optionInteger(o.pageSize ?? 64, 1, 65536, 'pageSize');
    const size = this.type === 'float32' ? 4 : this.type === 'int8' ? 1 : 2;
    const vectors = this.keyHeads * this.pageSize;
    const pageBytes = vectors * ((this.headDim + this.valueDim) * size + (this.type === 'int8' ? 8 : 0));
    if ((o.pages === undefined) === (o.maxBytes === undefined)) {
      throw new HeddleError('ERR_OPTION', 'KVCache: give either pages or maxBytes');
    }
    if (o.maxBytes !== undefined) optionInteger(o.maxBytes, pageBytes, Number.MAX_SAFE_INTEGER, 'maxBytes');
    const count = o.pages ?? Math.floor(o.maxBytes! / pageBytes);
    this.pages = optionInteger(count, 1, 2 ** 31 - 1, 'pages');
    this.bytes = this.pages * pageBytes;
    const scales = () => (this.type === 'int8' ? allocate('float32', this.pages * vectors) : null);
    this.#pools = {
      type: this.type,
      keyHeads: this.keyHeads,
      headDim: this.headDim,
      valueDim: this.valueDim,
      pageSize: this.pageSize,
      keys: allocate(this.type, this.pages * vectors * this.headDim),
      values: allocate(this.type, this.pages * vectors * this.valueDim),
      keyScales: scales(),
      valueScales: scales(),
    };
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
    this.#sequences.set(id, { pages: [], length: 0 });
    return id;
  }

  /** Tokens of a sequence. */
  length(sequence: number): number {
    return this.#get(sequence).length;
  }

  /**
   * Adds tokens at the end of a sequence.
   * @param k `[tokens, keyHeads, headDim]` float32, bfloat16 or float16, stored in the cache's type
   * @param v `[tokens, keyHeads, valueDim]`
   * @throws HeddleError `ERR_MEMORY` when too few pages are free
   */
  append(sequence: number, k: TensorLike, v: TensorLike): void {
    const s = this.#get(sequence);
    const keys = this.#input(k, this.headDim, 'k');
    const values = this.#input(v, this.valueDim, 'v');
    const tokens = keys.dims[0];
    if (values.dims[0] !== tokens) {
      throw new HeddleError('ERR_SHAPE', `v: expected ${tokens} tokens as in k, got ${values.dims[0]}`);
    }
    if (tokens === 0) return;
    const total = Math.ceil((s.length + tokens) / this.pageSize);
    const last = s.pages.length - 1;
    // A shared last page with room is copied before it is written.
    const copy = s.length % this.pageSize !== 0 && this.#holders[s.pages[last]] > 1;
    const needed = total - s.pages.length + (copy ? 1 : 0);
    if (needed > this.#free.length) {
      throw new HeddleError(
        'ERR_MEMORY',
        `KVCache: ${tokens} tokens need ${needed} pages, ${this.#free.length} are free of ${this.pages}`,
      );
    }
    if (copy) {
      const page = this.#take();
      this.#copyPage(s.pages[last], page);
      this.#holders[s.pages[last]]--;
      s.pages[last] = page;
    }
    while (s.pages.length < total) s.pages.push(this.#take());
    const p = this.#open();
    for (let t = 0; t < tokens; t++) {
      const at = s.length + t;
      const page = s.pages[Math.floor(at / this.pageSize)];
      for (let h = 0; h < this.keyHeads; h++) {
        const vector = (page * this.keyHeads + h) * this.pageSize + (at % this.pageSize);
        this.#write(p.keys, p.keyScales, vector, keys, t * this.keyHeads + h, this.headDim);
        this.#write(p.values, p.valueScales, vector, values, t * this.keyHeads + h, this.valueDim);
      }
    }
    s.length += tokens;
  }

  /** A new sequence with the same tokens; pages are shared until one of the two writes. */
  fork(sequence: number): number {
    const s = this.#get(sequence);
    const id = this.create();
    for (const page of s.pages) this.#holders[page]++;
    this.#sequences.set(id, { pages: s.pages.slice(), length: s.length });
    return id;
  }

  /** Drops the tokens of a sequence from `length` on. */
  truncate(sequence: number, length: number): void {
    const s = this.#get(sequence);
    optionInteger(length, 0, s.length, 'length');
    s.length = length;
    while (s.pages.length > Math.ceil(length / this.pageSize)) this.#release(s.pages.pop()!);
  }

  /** Ends a sequence and gives its pages back. */
  free(sequence: number): void {
    const s = this.#get(sequence);
    this.#sequences.delete(sequence);
    for (const page of s.pages) this.#release(page);
  }

  /** Gives all memory back; the cache cannot be used after. Decodes that run keep what they read. */
  dispose(): void {
    this.#pools = null;
    this.#sequences.clear();
    this.#free = [];
    this.#leaving = [];
  }

  /** @internal Page tables and lengths of sequences, and the pools, for a decode that ends with {@link endRead}. */
  beginRead(sequences: readonly number[]): { pools: PagePools; table: Int32Array; lengths: Int32Array } {
    const pools = this.#open();
    const states = sequences.map((id) => this.#get(id));
    const width = Math.max(1, ...states.map((s) => s.pages.length));
    const table = new Int32Array(states.length * width);
    for (const [i, s] of states.entries()) table.set(s.pages, i * width);
    this.#readers++;
    return { pools, table, lengths: Int32Array.from(states, (s) => s.length) };
  }

  /** @internal */
  endRead(): void {
    if (--this.#readers > 0) return;
    this.#free.push(...this.#leaving.splice(0));
  }

  #open(): PagePools {
    if (this.#pools === null) throw new HeddleError('ERR_DISPOSED', 'KVCache: used after dispose()');
    return this.#pools;
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
    const t = asTensor(value, name, FLOATS, 3);
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

  #copyPage(from: number, to: number): void {
    const p = this.#open();
    const vectors = this.keyHeads * this.pageSize;
    for (const [pool, dim] of [
      [p.keys, this.headDim],
      [p.values, this.valueDim],
      [p.keyScales, 1],
      [p.valueScales, 1],
    ] as const) {
      const n = vectors * dim;
      (pool as Float32Array | null)?.copyWithin(to * n, from * n, (from + 1) * n);
    }
  }

  /** Stores one vector of `from` in the cache's type. */
  #write(
    pool: TypedArray,
    scales: Float32Array | null,
    vector: number,
    from: Tensor<FloatType>,
    row: number,
    dim: number,
  ): void {
    const to = vector * dim;
    if (from.type === this.type) {
      (pool as Float32Array).set((from.data as Float32Array).subarray(row * dim, (row + 1) * dim), to);
      return;
    }
    const code = DTYPE_CODE[from.type];
    if (scales === null) {
      for (let d = 0; d < dim; d++) {
        writeFloat(pool, DTYPE_CODE[this.type], to + d, readFloat(from.data, code, row * dim + d));
      }
      return;
    }
    let top = 0;
    for (let d = 0; d < dim; d++) {
      const x = Math.abs(readFloat(from.data, code, row * dim + d));
      if (!(x <= top)) top = x;
      if (Number.isNaN(x)) break; // a NaN in the vector makes all of it NaN
    }
    const scale = Math.fround(top / 127);
    scales[vector] = Number.isFinite(scale) ? scale : Number.NaN;
    for (let d = 0; d < dim; d++) {
      const x = readFloat(from.data, code, row * dim + d) / scale;
      pool[to + d] = Number.isFinite(x) ? Math.max(-127, Math.min(127, Math.round(x))) : 0;
    }
  }
}

// Where the runtime has it, `using cache = new KVCache(...)` disposes at the end of the block.
if (typeof Symbol.dispose === 'symbol') {
  Object.defineProperty(KVCache.prototype, Symbol.dispose, { value: KVCache.prototype.dispose });
}
