/** Scalar codes of the quantised types. */

/** Nearest integer, ties to even. */
export function roundEven(x: number): number {
  const r = Math.round(x);
  return Math.abs(x - Math.trunc(x)) === 0.5 && r % 2 !== 0 ? r - 1 : r;
}

const MAGNITUDES = [0, 0.5, 1, 1.5, 2, 3, 4, 6];

/** Value of each E2M1 code (OCP MX 1.0). */
export const E2M1: readonly number[] = [...MAGNITUDES, ...MAGNITUDES.map((v) => -v)];

/** Code of the nearest E2M1 value, ties to the even code. */
export function encodeE2M1(x: number): number {
  const a = Math.abs(x);
  let best = 0;
  for (let code = 1; code < 8; code++) {
    const d = Math.abs(a - MAGNITUDES[code]);
    const b = Math.abs(a - MAGNITUDES[best]);
    if (d < b || (d === b && code % 2 === 0)) best = code;
  }
  return best | (x < 0 ? 8 : 0);
}

/** Value of an E4M3 code (OCP 8-bit floating point): bias 7, no infinities, 0x7f and 0xff are NaN. */
export function decodeE4M3(code: number): number {
  const exponent = (code >> 3) & 15;
  const mantissa = code & 7;
  const sign = code & 0x80 ? -1 : 1;
  if (exponent === 15 && mantissa === 7) return NaN;
  return sign * (exponent === 0 ? mantissa * 2 ** -9 : (1 + mantissa / 8) * 2 ** (exponent - 7));
}

/** Code of the nearest E4M3 value, ties to the even code; beyond 448 it saturates. */
export function encodeE4M3(x: number): number {
  const sign = x < 0 || Object.is(x, -0) ? 0x80 : 0;
  if (Number.isNaN(x)) return 0x7f;
  const a = Math.min(Math.abs(x), 448);
  const exponent = Math.max(a === 0 ? -6 : Math.floor(Math.log2(a)), -6);
  const step = 2 ** (exponent - 3);
  const units = roundEven(a / step); // 8..16 for a normal number, 16 being the next exponent's 8; less below 2^-6
  return sign | (((exponent + 7) << 3) + units - 8);
}
