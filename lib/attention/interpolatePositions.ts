import { DTYPE_CODE, FLOAT_TYPES, type FloatType, readFloat, writeFloat } from '../dtype.ts';
import { HeddleError } from '../errors.ts';
import { checkOptions, optionChoice, optionInteger } from '../op.ts';
import { allocate, asTensor, makeTensor, type Tensor, type TensorLike } from '../tensor.ts';

export type InterpolationMode = 'nearest' | 'linear' | 'bilinear' | 'bicubic';

export interface InterpolatePositionsOptions {
  /** Length (frames), or height and width (patches), of the table. */
  from: number | readonly [height: number, width: number];
  /** The same of the result. */
  to: number | readonly [height: number, width: number];
  /** `'linear'` for lengths, `'bilinear'` and `'bicubic'` for sizes, `'nearest'` for both. */
  mode: InterpolationMode;
  /** Leading rows without a place (class tokens), copied. Default 0. */
  prefix?: number;
}

const OPTIONS: ReadonlySet<string> = new Set(['from', 'to', 'mode', 'prefix']);
const MODES: readonly InterpolationMode[] = ['nearest', 'linear', 'bilinear', 'bicubic'];

/** For each place of one axis of the result, the places it is made of and their weights. */
type Taps = readonly (readonly [index: number, weight: number])[][];

/** Cubic convolution (Keys 1981) with a = -0.75, as PyTorch has it. */
function cubic(distance: number): number {
  const a = -0.75;
  const d = Math.abs(distance);
  if (d <= 1) return ((a + 2) * d - (a + 3)) * d * d + 1;
  return d < 2 ? ((d - 5) * d + 8) * a * d - 4 * a : 0;
}

function tapsOf(from: number, to: number, mode: InterpolationMode): Taps {
  const scale = from / to;
  const clamp = (i: number) => Math.min(Math.max(i, 0), from - 1);
  return Array.from({ length: to }, (_, i) => {
    if (mode === 'nearest') return [[Math.min(Math.floor(i * scale), from - 1), 1] as const];
    const at = (i + 0.5) * scale - 0.5; // align_corners = false
    if (mode === 'bicubic') {
      const base = Math.floor(at);
      return [-1, 0, 1, 2].map((j) => [clamp(base + j), cubic(at - base - j)] as const);
    }
    const place = Math.max(at, 0);
    const low = Math.min(Math.floor(place), from - 1);
    return [[low, 1 - (place - low)] as const, [Math.min(low + 1, from - 1), place - low] as const];
  });
}

function sizeOf(value: unknown, name: string): number[] {
  const list = typeof value === 'number' ? [value] : value;
  if (!Array.isArray(list) || list.length < 1 || list.length > 2) {
    throw new HeddleError('ERR_OPTION', `${name} must be a length or [height, width]`);
  }
  return list.map((x) => optionInteger(x, 1, 2 ** 24, name));
}

/**
 * A position table for another number of frames or patches, as `torch.nn.functional.interpolate` computes it with
 * `align_corners = false` and without antialiasing.
 *
 * @param table `[prefix + places, width]` float32, bfloat16 or float16; places by row, then by column
 * @returns `[prefix + new places, width]` of the same type; arithmetic in float64
 * @throws HeddleError `ERR_ARGUMENT`, `ERR_SHAPE`, `ERR_DTYPE`, `ERR_OPTION`
 */
export function interpolatePositions(
  table: TensorLike,
  options: InterpolatePositionsOptions,
): Tensor<FloatType> {
  if (options === undefined || options === null) {
    throw new HeddleError(
      'ERR_ARGUMENT',
      'interpolatePositions: options with from, to and mode are required',
    );
  }
  checkOptions(options, OPTIONS, 'interpolatePositions');
  const x = asTensor(table, 'table', FLOAT_TYPES, 2);
  const from = sizeOf(options.from, 'from');
  const to = sizeOf(options.to, 'to');
  const prefix = optionInteger(options.prefix ?? 0, 0, 2 ** 24, 'prefix');
  if (from.length !== to.length) {
    throw new HeddleError('ERR_OPTION', 'from and to must both be lengths or both be [height, width]');
  }
  const mode = optionChoice(options.mode, MODES, undefined as never, 'mode');
  const fits = from.length === 1 ? ['nearest', 'linear'] : ['nearest', 'bilinear', 'bicubic'];
  if (!fits.includes(mode)) {
    const what = from.length === 1 ? 'a length' : 'a height and width';
    throw new HeddleError('ERR_OPTION', `mode must be ${fits.join(' or ')} for ${what}, got ${String(mode)}`);
  }
  const [rows, width] = x.dims;
  const [height, columns] = from.length === 1 ? [1, from[0]] : from;
  if (rows !== prefix + height * columns) {
    throw new HeddleError(
      'ERR_SHAPE',
      `table: expected ${prefix + height * columns} rows for from and prefix, got ${rows}`,
    );
  }
  const code = DTYPE_CODE[x.type];
  const [newHeight, newColumns] = to.length === 1 ? [1, to[0]] : to;
  const out = allocate(x.type, (prefix + newHeight * newColumns) * width);
  out.set(x.data.subarray(0, prefix * width));
  const down = from.length === 1 ? [[[0, 1] as const]] : tapsOf(height, newHeight, mode);
  const across = tapsOf(columns, newColumns, mode);
  for (let y = 0; y < newHeight; y++) {
    for (let z = 0; z < newColumns; z++) {
      const at = (prefix + y * newColumns + z) * width;
      for (let i = 0; i < width; i++) {
        let sum = 0;
        for (const [row, u] of down[y]) {
          for (const [column, v] of across[z]) {
            sum += u * v * readFloat(x.data, code, (prefix + row * columns + column) * width + i);
          }
        }
        writeFloat(out, code, at + i, sum);
      }
    }
  }
  return makeTensor(x.type, out, [prefix + newHeight * newColumns, width]);
}
