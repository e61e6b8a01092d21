import type { Location } from '../device.ts';
import type { KVCacheType } from './kvLayout.ts';

/** What a KVCache is made of. */
export interface KVCacheOptions {
  /** Heads of keys and values, 1 to 65,536. */
  keyHeads: number;
  /** 1 to 512. */
  headDim: number;
  /** Default: headDim. */
  valueDim?: number;
  /**
   * Default float32. `int8` and `int4` are symmetric: each vector (one token, one head) is stored as integers of at
   * most 127 or 7 in magnitude and one float32 scale, largest magnitude / 127 or / 7; `int4` packs two into a byte.
   */
  type?: KVCacheType;
  /** Tokens of a page. Default 64; multiples of 16 waste no memory, multiples of 64 are fastest. */
  pageSize?: number;
  /** Pages of the cache; all memory is reserved at once. Give this or `maxBytes`. */
  pages?: number;
  /** As many pages as fit into this many bytes. */
  maxBytes?: number;
  /**
   * Where the pages are. Default `cpu`. On `cuda`, calls that touch them wait for the device, and {@link decodeAttention}
   * computes there.
   */
  device?: Location;
  /**
   * For sliding windows: keys to the left of a query that must stay, besides its own (`windowLeft` of
   * {@link decodeAttention}). An append gives back the pages that its first token can no longer see, so that a
   * sequence of any length needs `ceil((window + tokens of an append) / pageSize) + 1` pages. Positions go on counting.
   */
  window?: number;
}

export const KV_CACHE_OPTION_NAMES: ReadonlySet<string> = new Set([
  'keyHeads',
  'headDim',
  'valueDim',
  'type',
  'pageSize',
  'pages',
  'maxBytes',
  'window',
  'device',
]);
export const KV_CACHE_TYPES: readonly KVCacheType[] = ['float32', 'bfloat16', 'float16', 'int8', 'int4'];
