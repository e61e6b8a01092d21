import { readFloat, writeFloat } from '../../dtype.ts';
import type { TypedArray } from '../../tensor.ts';
import { dot, type ReferenceMatrix } from '../gemm/linear.ts';
import { quantizedActivations } from '../gemm/quantize.ts';
import { writeRowsReference } from '../nn/fusedLinear.ts';

/** See native/attention/patch_embed.h for the definition; this is the same function in float64. */
export function patchEmbedReference(
  weight: ReferenceMatrix,
  numbers: Float64Array,
  video: TypedArray,
  type: number,
  scale: Float32Array,
  shift: Float32Array,
  indices: Int32Array | null,
  batchOffsets: Int32Array | null,
  bias: Float32Array | null,
  out: TypedArray,
  outType: number,
  add0: Float32Array | null,
  addIndex0: Int32Array | null,
  add1: Float32Array | null,
  addIndex1: Int32Array | null,
  to: Int32Array | null,
): number {
  const [batch, channels, batchStride, channelStride] = numbers;
  const three = (from: number) => [numbers[from], numbers[from + 1], numbers[from + 2]];
  const [pixel, grid, size, step] = [three(4), three(7), three(10), three(13)];
  const [start, channelsLast, outRows, outFirst] = numbers.subarray(16);
  const [, gridY, gridX] = grid;
  const tokens = grid[0] * gridY * gridX;

  const unfold = (b: number, token: number): Float64Array => {
    const at = [Math.floor(token / (gridX * gridY)), Math.floor(token / gridX) % gridY, token % gridX];
    const row = new Float64Array(weight.k);
    for (let c = 0; c < channels; c++) {
      for (let t = 0; t < size[0]; t++) {
        for (let y = 0; y < size[1]; y++) {
          for (let x = 0; x < size[2]; x++) {
            const place = [t, y, x].reduce((sum, d, i) => sum + (at[i] * step[i] + d) * pixel[i], 0);
            const value = readFloat(video, type, start + b * batchStride + c * channelStride + place);
            const inTubelet = (t * size[1] + y) * size[2] + x;
            const k = channelsLast ? inTubelet * channels + c : c * size[0] * size[1] * size[2] + inTubelet;
            row[k] = value * scale[c] + shift[c];
          }
        }
      }
    }
    return row;
  };
  const embed = (b: number, token: number, row: number) => {
    const a = quantizedActivations(unfold(b, token), weight.type, weight.group);
    for (let n = 0; n < weight.n; n++) {
      writeFloat(out, outType, row * weight.n + n, dot(weight.rows[n], a) + (bias === null ? 0 : bias[n]));
    }
  };
  const result = out;
  if (to !== null) out = new Float32Array(to.length * weight.n);
  for (let b = 0; b < batch; b++) {
    if (indices !== null && batchOffsets !== null) {
      for (let i = batchOffsets[b]; i < batchOffsets[b + 1]; i++) embed(b, indices[i], i);
    } else {
      for (let token = 0; token < tokens; token++) embed(b, token, b * outRows + outFirst + token);
    }
  }
  if (to !== null) {
    const tables = [
      [add0, addIndex0],
      [add1, addIndex1],
    ] as const;
    writeRowsReference(out as Float32Array, to.length, weight.n, 1, tables, result as Float32Array, to);
  }
  return 0;
}
