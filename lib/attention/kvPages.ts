// Where the pages of a cache are: on the host or on the device. Which page holds what is KVCache's business.
import { nativeAddon } from '../backend.ts';
import { allocateAt, type DeviceData, isOnDevice } from '../device.ts';
import { DTYPE_CODE, type FloatType } from '../dtype.ts';
import { HeddleError } from '../errors.ts';
import { callSync, nativeOnly, type Op } from '../op.ts';
import { allocate, makeTensor, type Tensor, type TypedArray } from '../tensor.ts';
import {
  CACHE_CODE,
  converted,
  type PageLayout,
  type PagePools,
  readElement,
  writeFloats,
  writeIntegers,
} from './kvLayout.ts';

/** Tokens as float32, `[tokens, keyHeads, dim]`. */
export interface KeysAndValues {
  keys: Tensor<'float32'>;
  values: Tensor<'float32'>;
}

/** The memory of all pages. `pages` of a call are those from `position`'s on, in order. */
export interface PageStore {
  readonly pools: PagePools;
  /**
   * Writes tokens from `position` on.
   * @param copy a page to copy before, and where to: when this throws, nothing was done
   */
  append(
    pages: readonly number[],
    position: number,
    keys: Tensor<FloatType>,
    values: Tensor<FloatType>,
    copy: { from: number; to: number } | null,
  ): void;
  /** Tokens [position, position + count), dequantised. */
  read(pages: readonly number[], position: number, count: number): KeysAndValues;
  /** Gives the memory back. */
  release(): void;
}

/** What a store is made of. */
export interface PageShape
  extends Pick<PagePools, 'type' | 'keyHeads' | 'headDim' | 'valueDim' | 'pageSize'> {
  pages: number;
  keyLayout: PageLayout;
  valueLayout: PageLayout;
}

/** Allocates the pools of a store, all or none. */
function makePools(shape: PageShape, location: 'cpu' | 'cuda'): PagePools {
  const { type, keyHeads, headDim, valueDim, pageSize, pages, keyLayout, valueLayout } = shape;
  const made: TypedArray[] = [];
  const pool = <T extends 'float32' | 'uint8' | FloatType | 'int8'>(poolType: T, size: number) => {
    const data = allocateAt(location, poolType, pages * keyHeads * size);
    made.push(data as TypedArray);
    return data;
  };
  const integers = keyLayout.top > 0;
  const element = type === 'int4' ? 'uint8' : type;
  try {
    return {
      type,
      keyHeads,
      headDim,
      valueDim,
      pageSize,
      keys: pool(element, keyLayout.size),
      values: pool(element, valueLayout.size),
      keyScales: integers ? pool('float32', keyLayout.slots) : null,
      valueScales: integers ? pool('float32', keyLayout.slots) : null,
    };
  } catch (error) {
    if (location === 'cuda') for (const data of made) (data as unknown as DeviceData).release();
    throw error;
  }
}

/** Pages in typed arrays. */
export class HostPages implements PageStore {
  readonly pools: PagePools;
  readonly #shape: PageShape;

  constructor(shape: PageShape) {
    this.#shape = shape;
    this.pools = makePools(shape, 'cpu');
    // Decoding streams over the pools: with 4 KiB pages of the system it would wait for address translation.
    const advise = nativeAddon()?.['adviseHugePages'] as ((x: TypedArray) => void) | undefined;
    advise?.(this.pools.keys);
    advise?.(this.pools.values);
  }

  append(
    pages: readonly number[],
    position: number,
    keys: Tensor<FloatType>,
    values: Tensor<FloatType>,
    copy: { from: number; to: number } | null,
  ): void {
    const { type, keyHeads, pageSize, keyLayout, valueLayout } = this.#shape;
    const p = this.pools;
    const [storedKeys, storedValues] = [converted(keys, type), converted(values, type)];
    if (copy !== null) this.#copyPage(copy.from, copy.to);
    for (const [l, pool, scales, from] of [
      [keyLayout, p.keys, p.keyScales, storedKeys],
      [valueLayout, p.values, p.valueScales, storedValues],
    ] as const) {
      const first = Math.floor(position / pageSize);
      let start = 0;
      for (let t = 0; t < keys.dims[0]; t++) {
        const at = position + t;
        const slot = at % pageSize;
        const page = pages[Math.floor(at / pageSize) - first];
        for (let h = 0; h < keyHeads; h++, start += l.dim) {
          const vector = page * keyHeads + h;
          if (scales === null) writeFloats(l, pool, vector * l.size, slot, from, start);
          else {
            const scale = writeIntegers(l, pool, vector * l.size, slot, from as Float32Array, start);
            scales[vector * l.slots + slot] = scale;
          }
        }
      }
    }
  }

  read(pages: readonly number[], position: number, count: number): KeysAndValues {
    const { keyHeads, pageSize, keyLayout, valueLayout } = this.#shape;
    const first = Math.floor(position / pageSize);
    const part = (l: PageLayout, pool: TypedArray, scales: Float32Array | null) => {
      const out = new Float32Array(count * keyHeads * l.dim);
      let to = 0;
      for (let at = position; at < position + count; at++) {
        const slot = at % pageSize;
        const page = pages[Math.floor(at / pageSize) - first];
        for (let h = 0; h < keyHeads; h++) {
          const vector = page * keyHeads + h;
          const scale = scales === null ? 1 : scales[vector * l.slots + slot];
          for (let e = 0; e < l.dim; e++) out[to++] = scale * readElement(l, pool, vector * l.size, slot, e);
        }
      }
      return makeTensor('float32', out, [count, keyHeads, l.dim]);
    };
    const p = this.pools;
    return {
      keys: part(keyLayout, p.keys, p.keyScales),
      values: part(valueLayout, p.values, p.valueScales),
    };
  }

  /** The garbage collector does, when the last running decode is through. */
  release(): void {}

  #copyPage(from: number, to: number): void {
    const { keyHeads, keyLayout, valueLayout } = this.#shape;
    const p = this.pools;
    for (const [pool, size] of [
      [p.keys, keyLayout.size],
      [p.values, valueLayout.size],
      [p.keyScales, keyLayout.slots],
      [p.valueScales, keyLayout.slots],
    ] as const) {
      const n = keyHeads * size;
      (pool as Float32Array | null)?.copyWithin(to * n, from * n, (from + 1) * n);
    }
  }
}

const clearOp = nativeOnly('kvClear');
const appendOp = nativeOnly('kvAppend');
const readOp = nativeOnly('kvRead');

/**
 * Pages in device memory (native/attention/kv_cache.cu). Jobs of the device have no order among each other, so each
 * call waits for its job: what comes after it finds the tokens there.
 */
export class DevicePages implements PageStore {
  readonly pools: PagePools;
  readonly #shape: PageShape;

  constructor(shape: PageShape) {
    this.#shape = shape;
    this.pools = makePools(shape, 'cuda');
    try {
      this.#run(clearOp, shape.pages);
    } catch (error) {
      this.release();
      throw error;
    }
  }

  append(
    pages: readonly number[],
    position: number,
    keys: Tensor<FloatType>,
    values: Tensor<FloatType>,
    copy: { from: number; to: number } | null,
  ): void {
    this.#run(
      appendOp,
      copy?.from ?? -1,
      copy?.to ?? -1,
      Int32Array.from(pages),
      position,
      keys.dims[0],
      keys.data,
      DTYPE_CODE[keys.type],
      values.data,
      DTYPE_CODE[values.type],
    );
  }

  read(pages: readonly number[], position: number, count: number): KeysAndValues {
    const { keyHeads, headDim, valueDim } = this.#shape;
    const keys = allocate('float32', count * keyHeads * headDim);
    const values = allocate('float32', count * keyHeads * valueDim);
    if (count > 0) this.#run(readOp, Int32Array.from(pages), position, count, keys, values);
    return {
      keys: makeTensor('float32', keys, [count, keyHeads, headDim]),
      values: makeTensor('float32', values, [count, keyHeads, valueDim]),
    };
  }

  /** The memory of decodes that run is freed when they end. */
  release(): void {
    const { keys, values, keyScales, valueScales } = this.pools;
    for (const pool of [keys, values, keyScales, valueScales])
      (pool as unknown as DeviceData | null)?.release();
  }

  /** Runs an op whose arguments begin with the pools, in the order of native/binding/attention.cpp. */
  #run(op: Op, ...rest: unknown[]): void {
    const p = this.pools;
    const own = [CACHE_CODE[p.type], p.keyHeads, p.headDim, p.valueDim, p.pageSize];
    const args = [...own, p.keys, p.values, p.keyScales, p.valueScales, ...rest];
    callSync(op, args, { backend: 'cuda' });
  }
}

/** Refuses tokens on the device for a cache on the host; one on the device copies tokens from the host. */
export function checkSource(tensor: Tensor, device: 'cpu' | 'cuda', name: string): void {
  if (device === 'cpu' && isOnDevice(tensor)) {
    throw new HeddleError(
      'ERR_ARGUMENT',
      `${name} is on cuda but the cache is on cpu; make the cache with device 'cuda' or await ${name}.to('cpu')`,
    );
  }
}
