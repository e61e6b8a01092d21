const M0 = 0xd2511f53;
const M1 = 0xcd9e8d57;
const W0 = 0x9e3779b9;
const W1 = 0xbb67ae85;

/** The upper 32 bits of a product of two 32-bit integers. */
function upper(a: number, b: number): number {
  const [al, ah, bl, bh] = [a & 0xffff, a >>> 16, b & 0xffff, b >>> 16];
  const middle = al * bh + ((al * bl) >>> 16);
  const other = ah * bl + (middle % 0x10000);
  return (ah * bh + Math.floor(middle / 0x10000) + Math.floor(other / 0x10000)) >>> 0;
}

/**
 * Philox4x32-10 (Salmon, Moraes, Dror and Shaw, "Parallel random numbers: as easy as 1, 2, 3", SC 2011): four random
 * 32-bit words that are a pure function of a 128-bit counter and a 64-bit key. Not for secrets.
 */
export function philox(
  counter: readonly [number, number, number, number],
  key: readonly [number, number],
): [number, number, number, number] {
  let [a, b, c, d] = counter;
  let [k0, k1] = key;
  for (let round = 0; round < 10; round++) {
    const left = upper(M0, a);
    const right = upper(M1, c);
    [a, b, c, d] = [
      (right ^ b ^ k0) >>> 0,
      Math.imul(M1, c) >>> 0,
      (left ^ d ^ k1) >>> 0,
      Math.imul(M0, a) >>> 0,
    ];
    k0 = (k0 + W0) >>> 0;
    k1 = (k1 + W1) >>> 0;
  }
  return [a, b, c, d];
}
