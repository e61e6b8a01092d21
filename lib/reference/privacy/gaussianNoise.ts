import { chacha20Block, keyWords } from './chacha20.ts';

/** Blocks of the key stream that lie side by side, and the elements that they serve. */
const LANES = 16;
const GROUP = 8 * LANES;

/** Streams of one key, kept apart in the nonce so that no key-stream block is ever used for two purposes. */
export const NOISE_STREAM = 0;
export const SAMPLING_STREAM = 1;
export const SHUFFLE_STREAM = 2;
export const DISCRETE_STREAM = 3;
/** The count of an adaptive threshold. */
export const COUNT_STREAM = 4;

/**
 * Gaussian noise keyed by (key, step, global element index): the same element has the same noise however the
 * elements are split into shards, threads or calls.
 *
 * Element e is in group ⌊e/128⌋ = q, at v = ⌊(e mod 128)/16⌋, l = e mod 16; it reads block b = 16q + l of the key
 * stream of `step` (16 blocks side by side: one lane of a vector each):
 * - counter = b mod 2³²; nonce word 0 = ⌊b/2³²⌋ (below 2²⁴) + 2²⁴·stream; nonce words 1, 2 = step, low and high.
 * - Of the 16 words, pair ⌊v/2⌋ = m takes words 4m … 4m+3: u₁ = (w₀ + 2³²w₁ + ½)/2⁶⁴ and u₂ likewise
 *   of w₂, w₃; Box–Muller: √(−2 ln u₁)·cos 2πu₂ for even v, ·sin 2πu₂ for odd v.
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
  let blocks: Uint32Array[] = [];
  let current = -1;
  for (let i = 0; i < count; i++) {
    const element = offset + i;
    const group = Math.floor(element / GROUP);
    if (group !== current) {
      blocks = Array.from({ length: LANES }, (_, l) => noiseBlock(words, step, group * LANES + l));
      current = group;
    }
    const within = element - group * GROUP;
    const block = blocks[within % LANES];
    const v = Math.floor(within / LANES);
    const w = 4 * Math.floor(v / 2);
    const radius = Math.sqrt(-2 * logUniform(block[w], block[w + 1]));
    const angle = 2 * Math.PI * uniform(block[w + 2], block[w + 3]);
    out[i] = stddev * radius * (v % 2 === 0 ? Math.cos(angle) : Math.sin(angle));
  }
  return out;
}

/** Block `index` of the noise of `step`. */
function noiseBlock(key: Uint32Array, step: number, index: number): Uint32Array {
  const high = Math.floor(index / 2 ** 32) + NOISE_STREAM * 2 ** 24;
  return chacha20Block(key, index % 2 ** 32, [high, step % 2 ** 32, Math.floor(step / 2 ** 32)]);
}

/** ln of {@link uniform}, exact near 1 too, where the uniform itself rounds to 1. */
function logUniform(low: number, high: number): number {
  return high < 2 ** 31 ? Math.log(uniform(low, high)) : Math.log1p(-uniform(~low >>> 0, ~high >>> 0));
}

/** A number in (0, 1] from 64 bits; never 0. */
function uniform(low: number, high: number): number {
  return (high + (low + 0.5) * 2 ** -32) * 2 ** -32;
}
