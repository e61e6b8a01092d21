import { readFloat, writeFloat } from '../../dtype.ts';
import type { TypedArray } from '../../tensor.ts';
import { gelu, geluTanh } from '../gemm/activation.ts';

/** See native/nn/elementwise.h. */
export function geluReference(
  x: TypedArray,
  type: number,
  count: number,
  tanh: boolean,
  out: TypedArray,
): number {
  for (let i = 0; i < count; i++) {
    const v = readFloat(x, type, i);
    writeFloat(out, type, i, tanh ? geluTanh(v) : gelu(v));
  }
  return 0;
}

/** See native/nn/elementwise.h: out = x + gate * y; `gates` is 0 (no gate), 1 or the width. */
export function addResidualReference(
  x: TypedArray,
  y: TypedArray,
  type: number,
  rows: number,
  width: number,
  gate: Float32Array | null,
  gates: number,
  out: TypedArray,
): number {
  for (let i = 0; i < rows * width; i++) {
    const g = gate === null ? 1 : gate[gates === 1 ? 0 : i % width];
    writeFloat(out, type, i, readFloat(x, type, i) + g * readFloat(y, type, i));
  }
  return 0;
}

/** See native/nn/elementwise.h: out[b] = mean over tokens of x[b]. */
export function meanTokensReference(
  x: TypedArray,
  type: number,
  batch: number,
  tokens: number,
  width: number,
  out: TypedArray,
): number {
  for (let b = 0; b < batch; b++) {
    for (let i = 0; i < width; i++) {
      let sum = 0;
      for (let t = 0; t < tokens; t++) sum += readFloat(x, type, (b * tokens + t) * width + i);
      writeFloat(out, type, b * width + i, sum / tokens);
    }
  }
  return 0;
}
