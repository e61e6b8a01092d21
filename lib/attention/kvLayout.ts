import { DTYPE_CODE, decodeFloats, encodeFloats, type FloatType, readFloat } from '../dtype.ts';
import type { Tensor, TypedArray } from '../tensor.ts';

/** How a cache stores keys and values. `int8` and `int4` keep one float32 scale per token and head. */
export type KVCacheType = FloatType | 'int8' | 'int4';

/** The numbers of native/attention/decode_attention.h, which also has the layout of the pools. */
export const CACHE_CODE: Readonly<Record<KVCacheType, number>> = {
  float32: DTYPE_CODE.float32,
  float16: DTYPE_CODE.float16,
  bfloat16: DTYPE_CODE.bfloat16,
  int8: DTYPE_CODE.int8,
  int4: 16,
};

/** What a decode reads: the pools, laid out as {@link pageLayout} says. */
export interface PagePools {
  readonly type: KVCacheType;
  readonly keyHeads: number;
  readonly headDim: number;
  readonly valueDim: number;
  readonly pageSize: number;
  readonly keys: TypedArray;
  readonly values: TypedArray;
  /** `[page][head][slot]`, for int8 and int4. */
  readonly keyScales: Float32Array | null;
  readonly valueScales: Float32Array | null;
}

/** Slots whose words stand beside each other in a pool of keys. */
export const SLOT_BLOCK = 16;

/** Elements of a word, array elements that hold it, and the largest integer (0: no integers). */
const WORD: Readonly<Record<KVCacheType, { group: number; units: number; top: number }>> = {
  float32: { group: 1, units: 1, top: 0 },
  float16: { group: 1, units: 1, top: 0 },
  bfloat16: { group: 2, units: 2, top: 0 },
  int8: { group: 4, units: 4, top: 127 },
  int4: { group: 8, units: 4, top: 7 },
};

/** Where the elements of one kind of page are; all sizes in elements of the pool's typed array. */
export interface PageLayout {
  readonly type: KVCacheType;
  readonly dim: number;
  readonly values: boolean;
  readonly group: number;
  readonly units: number;
  readonly top: number;
  /** Slots of a page, padded to whole blocks. */
  readonly slots: number;
  /** Words of one slot (keys), or of one group of slots (values). */
  readonly words: number;
  /** Array elements of one page and head. */
  readonly size: number;
}

export function pageLayout(type: KVCacheType, dim: number, pageSize: number, values: boolean): PageLayout {
  const { group, units, top } = WORD[type];
  const slots = Math.ceil(pageSize / SLOT_BLOCK) * SLOT_BLOCK;
  const words = values ? dim : Math.ceil(dim / group);
  const size = (values ? slots / group : slots) * words * units;
  return { type, dim, values, group, units, top, slots, words, size };
}

/** Array element of element `e` of a slot, and whether it is the high nibble there. */
function place(l: PageLayout, slot: number, e: number): { index: number; high: boolean } {
  const lane = l.values ? slot % l.group : e % l.group;
  const word = l.values
    ? Math.floor(slot / l.group) * l.words + e
    : (Math.floor(slot / SLOT_BLOCK) * l.words + Math.floor(e / l.group)) * SLOT_BLOCK + (slot % SLOT_BLOCK);
  return { index: word * l.units + (lane % l.units), high: lane >= l.units };
}

/** Element `e` of the vector in `slot`, without its scale; `base` is the page and head's first array element. */
export function readElement(l: PageLayout, pool: TypedArray, base: number, slot: number, e: number): number {
  const { index, high } = place(l, slot, e);
  if (l.type === 'int4') {
    const byte = pool[base + index] as number;
    return (high ? byte >> 4 : byte & 15) - 8;
  }
  return readFloat(pool, CACHE_CODE[l.type], base + index);
}

/** Elements in the cache's floating type, or as float32 where integers are made of them. */
export function converted(input: Tensor<FloatType>, type: KVCacheType): TypedArray {
  const wanted = type === 'int8' || type === 'int4' ? 'float32' : type;
  if (input.type === wanted) return input.data;
  const floats =
    input.type === 'float32' ? (input.data as Float32Array) : decodeFloats(input.data, input.type);
  return wanted === 'float32' ? floats : encodeFloats(floats, wanted);
}

/** Copies a vector that already has the pool's floating type. */
export function writeFloats(
  l: PageLayout,
  pool: TypedArray,
  base: number,
  slot: number,
  from: TypedArray,
  start: number,
): void {
  const { dim, group, words } = l;
  if (l.values) {
    let at = base + Math.floor(slot / group) * words * group + (slot % group);
    for (let e = 0; e < dim; e++, at += group) pool[at] = from[start + e];
    return;
  }
  let at = base + (Math.floor(slot / SLOT_BLOCK) * words * SLOT_BLOCK + (slot % SLOT_BLOCK)) * group;
  const step = SLOT_BLOCK * group;
  if (group === 1) {
    for (let e = 0; e < dim; e++, at += step) pool[at] = from[start + e];
    return;
  }
  for (let e = 0; e < dim; e += 2, at += step) {
    pool[at] = from[start + e];
    if (e + 1 < dim) pool[at + 1] = from[start + e + 1];
  }
}

/**
 * Stores a float32 vector as integers and returns its scale: the largest magnitude over 127 or 7, so that
 * `element * scale` is nearest. A vector with a NaN or an infinity gets the scale NaN.
 */
export function writeIntegers(
  l: PageLayout,
  pool: TypedArray,
  base: number,
  slot: number,
  from: Float32Array,
  start: number,
): number {
  const { dim, top } = l;
  let largest = 0;
  for (let e = 0; e < dim; e++) {
    const x = Math.abs(from[start + e]);
    if (!(x <= largest)) largest = x;
    if (Number.isNaN(x)) break; // a NaN in the vector makes all of it NaN
  }
  const scale = Math.fround(largest / top);
  const usable = Number.isFinite(scale) && scale > 0;
  const block = l.values
    ? Math.floor(slot / l.group) * l.words * 4
    : (Math.floor(slot / SLOT_BLOCK) * l.words * SLOT_BLOCK + (slot % SLOT_BLOCK)) * 4;
  const bytes = pool as Int8Array | Uint8Array;
  for (let e = 0; e < dim; e++) {
    const lane = l.values ? slot % l.group : e % l.group;
    const word = l.values ? e : ((e / l.group) | 0) * SLOT_BLOCK;
    const at = base + block + word * 4 + (lane & 3);
    const x = usable ? Math.max(-top, Math.min(top, Math.round(from[start + e] / scale))) : 0;
    if (top === 127) bytes[at] = x;
    else bytes[at] = lane >= 4 ? (bytes[at] & 0x0f) | ((x + 8) << 4) : (bytes[at] & 0xf0) | (x + 8);
  }
  return Number.isFinite(scale) ? scale : Number.NaN;
}
