import { readFloat, writeFloat } from '../../dtype.ts';
import type { TypedArray } from '../../tensor.ts';

/** Row `row` of v = x + residual. */
function readRow(x: TypedArray, residual: TypedArray | null, type: number, row: number, width: number) {
  const at = row * width;
  return Float64Array.from(
    { length: width },
    (_, i) => readFloat(x, type, at + i) + (residual === null ? 0 : readFloat(residual, type, at + i)),
  );
}

const meanOf = (v: Float64Array) => v.reduce((sum, value) => sum + value, 0) / v.length;

function statisticsOf(v: Float64Array, centred: boolean, epsilon: number): [mean: number, rstd: number] {
  const mean = centred ? meanOf(v) : 0;
  return [mean, 1 / Math.sqrt(meanOf(v.map((value) => (value - mean) ** 2)) + epsilon)];
}

function scaleAt(weight: Float32Array | null, unitOffset: boolean, i: number): number {
  return weight === null ? 1 : weight[i] + (unitOffset ? 1 : 0);
}

/** See native/nn/norm.h for the definition; this is the same function in float64. */
export function normReference(
  centred: boolean,
  x: TypedArray,
  residual: TypedArray | null,
  type: number,
  rows: number,
  width: number,
  weight: Float32Array | null,
  bias: Float32Array | null,
  unitOffset: boolean,
  epsilon: number,
  out: TypedArray,
  outType: number,
  sum: TypedArray | null,
  means: Float32Array | null,
  rstds: Float32Array | null,
): number {
  for (let row = 0; row < rows; row++) {
    const v = readRow(x, residual, type, row, width);
    const [mean, rstd] = statisticsOf(v, centred, epsilon);
    for (let i = 0; i < width; i++) {
      if (sum !== null) writeFloat(sum, type, row * width + i, v[i]);
      const y = (v[i] - mean) * rstd * scaleAt(weight, unitOffset, i) + (bias === null ? 0 : bias[i]);
      writeFloat(out, outType, row * width + i, y);
    }
    if (means !== null) means[row] = mean;
    if (rstds !== null) rstds[row] = rstd;
  }
  return 0;
}

/** See native/nn/norm.h; given statistics are used as they are. */
export function normBackwardReference(
  centred: boolean,
  gradOut: TypedArray,
  x: TypedArray,
  gradSum: TypedArray | null,
  type: number,
  rows: number,
  width: number,
  weight: Float32Array | null,
  unitOffset: boolean,
  epsilon: number,
  means: Float32Array | null,
  rstds: Float32Array | null,
  gradX: TypedArray | null,
  gradWeight: Float32Array | null,
  gradBias: Float32Array | null,
): number {
  const weightSum = new Float64Array(width);
  const biasSum = new Float64Array(width);
  for (let row = 0; row < rows; row++) {
    const v = readRow(x, null, type, row, width);
    let [mean, rstd] = statisticsOf(v, centred, epsilon);
    if (rstds !== null) [mean, rstd] = [means === null ? 0 : means[row], rstds[row]];
    const g = readRow(gradOut, null, type, row, width);
    const normal = v.map((value) => (value - mean) * rstd);
    const scaled = g.map((value, i) => value * scaleAt(weight, unitOffset, i));
    const plain = centred ? meanOf(scaled) : 0;
    const along = meanOf(scaled.map((value, i) => value * normal[i]));
    for (let i = 0; i < width; i++) {
      weightSum[i] += g[i] * normal[i];
      biasSum[i] += g[i];
      if (gradX === null) continue;
      const beside = gradSum === null ? 0 : readFloat(gradSum, type, row * width + i);
      writeFloat(gradX, type, row * width + i, rstd * (scaled[i] - plain - normal[i] * along) + beside);
    }
  }
  gradWeight?.set(weightSum);
  gradBias?.set(biasSum);
  return 0;
}
