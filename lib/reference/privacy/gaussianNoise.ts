import { chacha20Block, keyWords } from './chacha20.ts';

/** Elements that one block of the key stream serves: two 64-bit uniforms for each pair of elements. */
const ELEMENTS_PER_BLOCK = 8;

/** Streams of one key, kept apart in the nonce so that no key-stream block is ever used for two purposes. */
export const NOISE_STREAM = 0;

/**
 * Gaussian noise keyed by (key, step, global element index): the same element has the same noise however the
 * elements are split into shards, threads or calls.
 *
 * Element e is in block b = ⌊e/8⌋ of the key stream of `step`:
 * - counter = b mod 2³²; nonce word 0 = ⌊b/2³²⌋ (below 2²⁴) + 2²⁴·stream; nonce words 1, 2 = step, low and high.
 * - Of the 16 words, pair ⌊(e mod 8)/2⌋ = m takes words 4m … 4m+3: u₁ = (w₀ + 2³²w₁ + ½)/2⁶⁴ and u₂ likewise
 *   of w₂, w₃; Box–Muller: √(−2 ln u₁)·cos 2πu₂ for even e, ·sin 2πu₂ for odd e.
 *
 * 64 bits for u₁ reach 9.4 standard deviations, and leave no lattice that a float32 could show.
 *
 * @param count number of elements
 * @param key 32 bytes from the operating system's generator, one per run
 * @param step number of the logical step; never used twice under one key
 * @param offset global index of the first element
 */
export function gaussianNoiseReference(
  count: number,
  key: Uint8Array,
  step: number,
  offset: number,
  stddev: number,
): Float64Array {
  const words = keyWords(key);
  const out = new Float64Array(count);
  let block: Uint32Array = new Uint32Array(16);
  let current = -1;
  for (let i = 0; i < count; i++) {
    const element = offset + i;
    const index = Math.floor(element / ELEMENTS_PER_BLOCK);
    if (index !== current) {
      block = noiseBlock(words, step, index);
      current = index;
    }
    const within = element - index * ELEMENTS_PER_BLOCK;
    const w = 4 * Math.floor(within / 2);
    const radius = Math.sqrt(-2 * Math.log(uniform(block[w], block[w + 1])));
    const angle = 2 * Math.PI * uniform(block[w + 2], block[w + 3]);
    out[i] = stddev * radius * (within % 2 === 0 ? Math.cos(angle) : Math.sin(angle));
  }
  return out;
}

/** Block `index` of the noise of `step`. */
function noiseBlock(key: Uint32Array, step: number, index: number): Uint32Array {
  const high = Math.floor(index / 2 ** 32) + NOISE_STREAM * 2 ** 24;
  return chacha20Block(key, index % 2 ** 32, [high, step % 2 ** 32, Math.floor(step / 2 ** 32)]);
}

/** A number in (0, 1] from 64 bits; never 0. */
function uniform(low: number, high: number): number {
  return (high + (low + 0.5) * 2 ** -32) * 2 ** -32;
}
