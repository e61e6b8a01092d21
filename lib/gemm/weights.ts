import { DTYPE_CODE, type FloatType, readFloat } from '../dtype.ts';
import { HeddleError } from '../errors.ts';
import { optionFlag } from '../op.ts';
import { decodeE4M3 } from '../reference/gemm/codes.ts';
import { BLOCK, dequantizedRows, type Rounding, type WeightType } from '../reference/gemm/quantize.ts';
import { asTensor, type Tensor, type TensorLike } from '../tensor.ts';

/** Element types that weights may come in. */
export type SourceType = FloatType | 'float8_e4m3';
export const SOURCE_TYPES: readonly SourceType[] = ['float32', 'bfloat16', 'float16', 'float8_e4m3'];
export type SourceData = Float32Array | Uint16Array | Uint8Array;

/** How int4 weights are rounded. */
export interface RoundingOptions {
  /** False: int4 groups have a zero point, w = scale (q - zero) with q in 0..15. Default true. */
  symmetric?: boolean;
  /**
   * int4: tries ranges from 1 down to 1/2 of each group's and keeps the one with the least squared error (weighted by
   * the calibration, where given). Default: true with a calibration, else false.
   */
  search?: boolean;
}

/** Checks the options that only int4 has. */
export function roundingOf(
  o: RoundingOptions,
  type: WeightType,
  calibrated: boolean,
): { symmetric: boolean; search: boolean } {
  const symmetric = optionFlag(o.symmetric, true, 'symmetric');
  const search = optionFlag(o.search, calibrated, 'search');
  if (type !== 'int4') {
    const given = !symmetric ? 'symmetric: false' : calibrated ? 'calibration' : search ? 'search' : null;
    if (given !== null) throw new HeddleError('ERR_OPTION', `${given} needs type int4, got type ${type}`);
  }
  if (calibrated && !search) {
    throw new HeddleError('ERR_OPTION', 'search: false leaves calibration without use; give one of them');
  }
  return { symmetric, search };
}

/** A calibration: finite mean squares, none negative. */
export function meanSquareOf(
  value: TensorLike | Float32Array | undefined,
  k: number,
  name: string,
): Float32Array | null {
  if (value === undefined) return null;
  const data =
    value instanceof Float32Array ? value : (asTensor(value, name, ['float32'], 1).data as Float32Array);
  if (data.length !== k) {
    throw new HeddleError('ERR_SHAPE', `${name}: expected [${k}], one per input, got [${data.length}]`);
  }
  const bad = data.findIndex((v) => !(v >= 0 && v < Infinity));
  if (bad >= 0) {
    throw new HeddleError(
      'ERR_VALUE',
      `${name}[${bad}] is ${data[bad]}: expected a mean square, finite and >= 0`,
    );
  }
  return data;
}

/** Factors of 128 x 128 blocks of a float8 source of n x k; null for other sources and where none are given. */
export function blockScaleOf(
  value: TensorLike | undefined,
  source: SourceType,
  n: number,
  k: number,
  name: string,
): Float32Array | null {
  if (value === undefined) return null;
  if (source !== 'float8_e4m3') {
    throw new HeddleError('ERR_OPTION', `${name} needs float8_e4m3 weights, got ${source}`);
  }
  const t = asTensor(value, name, ['float32'], 2);
  const [rows, columns] = [Math.ceil(n / BLOCK), Math.ceil(k / BLOCK)];
  if (t.dims[0] !== rows || t.dims[1] !== columns) {
    throw new HeddleError(
      'ERR_SHAPE',
      `${name}: expected [${rows}, ${columns}], blocks of 128 x 128, got [${t.dims.join(', ')}]`,
    );
  }
  checkScales(t.data, columns, name);
  return t.data;
}

/** Block scales must be finite and not negative. */
export function checkScales(data: Float32Array, columns: number, name: string): void {
  const bad = data.findIndex((v) => !(v >= 0 && v < Infinity));
  if (bad < 0) return;
  const at = `${Math.floor(bad / columns)}, ${bad % columns}`;
  throw new HeddleError('ERR_VALUE', `${name}[${at}] is ${data[bad]}: expected a finite number >= 0`);
}

/** A weight matrix as it comes: element (n, k) at n * strides[0] + k * strides[1] (native/gemm/packed.h). */
export interface MatrixSource {
  data: SourceData;
  /** Of the element type. */
  code: number;
  n: number;
  k: number;
  strides: [n: number, k: number];
  /** float8: factors of blocks of 128 x 128; row0 is the first row's place in that grid. */
  scale?: Float32Array | null;
  row0?: number;
}

/** A row-major matrix without scales. */
export function matrixSource(w: Tensor<SourceType>, n: number, k: number): MatrixSource {
  return { data: w.data, code: DTYPE_CODE[w.type], n, k, strides: [k, 1] };
}

function valueAt(s: MatrixSource, row: number, column: number): number {
  const i = row * s.strides[0] + column * s.strides[1];
  if (s.code !== DTYPE_CODE.float8_e4m3) return readFloat(s.data, s.code, i);
  const block =
    Math.floor(((s.row0 ?? 0) + row) / BLOCK) * Math.ceil(s.k / BLOCK) + Math.floor(column / BLOCK);
  return Math.fround(decodeE4M3(s.data[i]) * (s.scale ? s.scale[block] : 1));
}

/** All rows as float32 values. */
export function decodeRows(s: MatrixSource): Float32Array[] {
  return Array.from({ length: s.n }, (_, r) =>
    Float32Array.from({ length: s.k }, (_, c) => valueAt(s, r, c)),
  );
}

/** Index (row * k + column) of the first weight that `type` cannot hold, or -1. */
export function unfitIndex(rows: readonly Float32Array[], type: WeightType): number {
  if (type === 'float32' || type === 'bfloat16') return -1;
  for (const [r, row] of rows.entries()) {
    const c = row.findIndex((v) => !Number.isFinite(v));
    if (c >= 0) return r * row.length + c;
  }
  return -1;
}

/** The reference's packing: rows as `type` represents them, or 1 + the index of the first weight it cannot hold. */
export function packReference(
  s: MatrixSource,
  type: WeightType,
  group: number,
  rounding: Rounding,
): Float32Array[] | number {
  const rows = decodeRows(s);
  const unfit = unfitIndex(rows, type);
  if (unfit >= 0) return unfit + 1;
  // float8 codes stay what they are, with their own blocks.
  if (type === 'float8' && s.code === DTYPE_CODE.float8_e4m3) return rows;
  return dequantizedRows(rows, type, group, rounding);
}

export function unfitError(
  name: string,
  s: MatrixSource,
  row: number,
  column: number,
  type: WeightType,
): HeddleError {
  const value = valueAt(s, row, column);
  return new HeddleError(
    'ERR_VALUE',
    `${name}[${row}, ${column}] is ${value}: ${type} weights must be finite`,
  );
}
