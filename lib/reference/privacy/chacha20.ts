/** ChaCha20 (RFC 8439): 256-bit key, 32-bit block counter, 96-bit nonce. */

/** "expand 32-byte k" */
const CONSTANTS = [0x61707865, 0x3320646e, 0x79622d32, 0x6b206574];

function rotateLeft(x: number, bits: number): number {
  return (x << bits) | (x >>> (32 - bits));
}

/** RFC 8439, section 2.1, on four words of `s`. */
export function quarterRound(s: Uint32Array, a: number, b: number, c: number, d: number): void {
  s[a] += s[b];
  s[d] = rotateLeft(s[d] ^ s[a], 16);
  s[c] += s[d];
  s[b] = rotateLeft(s[b] ^ s[c], 12);
  s[a] += s[b];
  s[d] = rotateLeft(s[d] ^ s[a], 8);
  s[c] += s[d];
  s[b] = rotateLeft(s[b] ^ s[c], 7);
}

/** Eight words from 32 bytes, little-endian. */
export function keyWords(key: Uint8Array): Uint32Array {
  const view = new DataView(key.buffer, key.byteOffset, key.byteLength);
  return Uint32Array.from({ length: 8 }, (_, i) => view.getUint32(4 * i, true));
}

/**
 * The block function (RFC 8439, section 2.3): 16 words of key stream.
 * @param key eight words
 * @param counter block counter
 * @param nonce three words
 */
export function chacha20Block(key: Uint32Array, counter: number, nonce: ArrayLike<number>): Uint32Array {
  const start = Uint32Array.of(...CONSTANTS, ...key, counter, nonce[0], nonce[1], nonce[2]);
  const s = start.slice();
  for (let round = 0; round < 10; round++) {
    quarterRound(s, 0, 4, 8, 12);
    quarterRound(s, 1, 5, 9, 13);
    quarterRound(s, 2, 6, 10, 14);
    quarterRound(s, 3, 7, 11, 15);
    quarterRound(s, 0, 5, 10, 15);
    quarterRound(s, 1, 6, 11, 12);
    quarterRound(s, 2, 7, 8, 13);
    quarterRound(s, 3, 4, 9, 14);
  }
  for (let i = 0; i < 16; i++) s[i] += start[i];
  return s;
}
