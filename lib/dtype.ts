import { getFloat16, setFloat16 } from '@petamoriken/float16';
import type { DType, DTypeArrays } from './tensor.ts';

/** Numbers of the element types at the native boundary (native/core/dtype.h). */
export const DTYPE_CODE: Readonly<Record<DType, number>> = {
  float32: 0,
  float64: 1,
  float16: 2,
  bfloat16: 3,
  int8: 4,
  uint8: 5,
  int32: 6,
  int64: 7,
  float8_e4m3: 8,
  float8_e5m2: 9,
};

const scratch = new DataView(new ArrayBuffer(8));

function bfloat16ToNumber(bits: number): number {
  scratch.setUint32(0, bits << 16);
  return scratch.getFloat32(0);
}

function float16ToNumber(bits: number): number {
  scratch.setUint16(0, bits);
  return getFloat16(scratch, 0);
}

/** Nearest bfloat16 (ties to even) of a number, as its 16 bits. */
export function toBfloat16(value: number): number {
  scratch.setFloat32(0, value);
  const u = scratch.getUint32(0);
  if ((u & 0x7fffffff) > 0x7f800000) return ((u >>> 16) | 0x40) & 0xffff;
  return ((u + 0x7fff + ((u >>> 16) & 1)) >>> 16) & 0xffff;
}

/** Nearest float16 (ties to even) of a number, as its 16 bits. */
export function toFloat16(value: number): number {
  setFloat16(scratch, 0, value);
  return scratch.getUint16(0);
}

/** The floating types that ops read. */
export type FloatType = 'float32' | 'bfloat16' | 'float16';
export const FLOAT_TYPES: readonly FloatType[] = ['float32', 'bfloat16', 'float16'];

/** Reads element `i` of floating data of type code `code` as a number. */
export function readFloat(data: DTypeArrays[DType], code: number, i: number): number {
  if (code === DTYPE_CODE.bfloat16) return bfloat16ToNumber(data[i] as number);
  if (code === DTYPE_CODE.float16) return float16ToNumber(data[i] as number);
  return data[i] as number;
}

/** Writes `value`, rounded to type code `code`, to element `i`. */
export function writeFloat(data: DTypeArrays[DType], code: number, i: number, value: number): void {
  if (code === DTYPE_CODE.bfloat16) data[i] = toBfloat16(Math.fround(value));
  else if (code === DTYPE_CODE.float16) data[i] = toFloat16(Math.fround(value));
  else data[i] = value;
}

/** float32 values as bfloat16 or float16 bits (or copied, for float32). */
export function encodeFloats(values: ArrayLike<number>, type: FloatType): Float32Array | Uint16Array {
  const out = type === 'float32' ? new Float32Array(values.length) : new Uint16Array(values.length);
  for (let i = 0; i < values.length; i++) writeFloat(out, DTYPE_CODE[type], i, values[i]);
  return out;
}

/** Floating data of any type as float32 values. */
export function decodeFloats(data: DTypeArrays[DType], type: FloatType): Float32Array {
  const out = new Float32Array(data.length);
  for (let i = 0; i < out.length; i++) out[i] = readFloat(data, DTYPE_CODE[type], i);
  return out;
}
