import { HeddleError } from '../errors.ts';
import { checkOptions } from '../op.ts';
import {
  BLOCK,
  blockScales,
  dequantizeRow,
  type QuantizedType,
  quantizeRow,
} from '../reference/gemm/quantize.ts';
import { asTensor, makeTensor, type Tensor, type TensorLike } from '../tensor.ts';
import { type PackMatrixOptions, weightOptions } from './linear.ts';
import {
  decodeRows,
  matrixSource,
  meanSquareOf,
  roundingOf,
  SOURCE_TYPES,
  unfitError,
  unfitIndex,
} from './weights.ts';

/** A weight matrix as codes and scales: what {@link packMatrix} stores, before it is laid out for the kernels. */
export interface QuantizedTensor {
  type: QuantizedType;
  /** Values of k per scale; float8: 128, and 128 rows share one as well. */
  groupSize: number;
  /**
   * One code per weight, `[outputs, inputs]`: int8 as they are; int4 0..15 and E2M1 0..15 in uint8; float8_e4m3.
   */
  codes: Tensor<'int8' | 'uint8' | 'float8_e4m3'>;
  /** `[outputs, groups]`; int8 `[outputs, 1]`; float8 `[⌈outputs/128⌉, ⌈inputs/128⌉]`. */
  scale: Tensor<'float32'>;
  /** int4: the code that stands for 0, `[outputs, groups]` (8 when symmetric). */
  zero?: Tensor<'uint8'>;
}

export type { QuantizedType };

export interface QuantizeOptions
  extends Pick<PackMatrixOptions, 'groupSize' | 'symmetric' | 'search' | 'calibration'> {
  type: QuantizedType;
}

const OPTIONS: ReadonlySet<string> = new Set(['type', 'groupSize', 'symmetric', 'search', 'calibration']);

/**
 * Rounds a weight matrix, in TypeScript: the formats that `packMatrix` and `packExperts` store, for tools and for
 * reading (formulas in native/gemm/quantize.h). `dequantize` of the result is what the packed matrix multiplies by.
 *
 * | type | w = |
 * |---|---|
 * | int8 | scale · q, one scale per output, q in −127..127 |
 * | int4 | scale · (q − zero), one scale and zero per group of k, q in 0..15 |
 * | mxfp4 | scale · E2M1(q), scale a power of two per 32 k |
 * | float8 | scale · E4M3(q), one scale per block of 128 × 128 |
 *
 * @param weight `[outputs, inputs]` float32, bfloat16 or float16
 * @throws HeddleError as packMatrix
 */
export function quantize(weight: TensorLike, options: QuantizeOptions): QuantizedTensor {
  checkOptions(options, OPTIONS, 'quantize');
  const w = asTensor(weight, 'weight', SOURCE_TYPES.slice(0, 3) as ('float32' | 'bfloat16' | 'float16')[], 2);
  const [n, k] = w.dims;
  const [type, group] = weightOptions(options?.type, options?.groupSize, w.type, [k]);
  if (type === 'float32' || type === 'bfloat16') {
    throw new HeddleError('ERR_OPTION', `type must be int8, int4, mxfp4 or float8, got ${options?.type}`);
  }
  const meanSquare = meanSquareOf(options.calibration, k, 'calibration');
  const rounding = { ...roundingOf(options, type, meanSquare !== null), meanSquare };
  const source = matrixSource(w, n, k);
  const rows = decodeRows(source);
  const unfit = unfitIndex(rows, type);
  if (unfit >= 0) throw unfitError('weight', source, Math.floor(unfit / k), unfit % k, type);

  const blocks = type === 'float8' ? blockScales(rows, k) : [];
  const quantized = rows.map((row, i) =>
    quantizeRow(row, type, group, rounding, blocks[Math.floor(i / BLOCK)]),
  );
  const joined = new Uint8Array(n * k);
  for (const [i, row] of quantized.entries()) joined.set(row.codes, i * k);
  const codes =
    type === 'int8'
      ? makeTensor('int8', new Int8Array(joined.buffer), [n, k])
      : makeTensor(type === 'float8' ? 'float8_e4m3' : 'uint8', joined, [n, k]);
  const lists = type === 'float8' ? blocks : quantized.map((row) => row.scales);
  const columns = lists[0]?.length ?? 0;
  const scale = makeTensor('float32', Float32Array.from(lists.flatMap((s) => [...s])), [
    lists.length,
    columns,
  ]);
  const result: QuantizedTensor = {
    type,
    groupSize: type === 'float8' ? BLOCK : type === 'int8' ? k : group,
    codes: codes as QuantizedTensor['codes'],
    scale,
  };
  if (type === 'int4') {
    result.zero = makeTensor('uint8', Uint8Array.from(quantized.flatMap((row) => [...row.zeros])), [
      n,
      columns,
    ]);
  }
  return result;
}

/** The float32 values that a quantised matrix stands for. */
export function dequantize(q: QuantizedTensor): Tensor<'float32'> {
  const [n, k] = q.codes.dims;
  const columns = q.scale.dims[1];
  const out = new Float32Array(n * k);
  for (let r = 0; r < n; r++) {
    const at = (q.type === 'float8' ? Math.floor(r / BLOCK) : r) * columns;
    const row = {
      codes: Uint8Array.from(q.codes.data.subarray(r * k, (r + 1) * k)),
      scales: q.scale.data.subarray(at, at + columns),
      zeros: q.zero?.data.subarray(at, at + columns) ?? new Uint8Array(columns),
    };
    out.set(dequantizeRow(row, q.type, q.groupSize), r * k);
  }
  return makeTensor('float32', out, [n, k]);
}
