import { HeddleError } from '../errors.ts';
import { checkOptions, optionInteger } from '../op.ts';

/** Along time, height and width. */
export type Size3 = readonly [time: number, height: number, width: number];

/** What {@link patchGrid} needs. */
export interface PatchGridOptions {
  tubelet: Size3;
  stride?: Size3;
  offset?: Size3;
}

const GRID_OPTIONS: ReadonlySet<string> = new Set(['tubelet', 'stride', 'offset']);
const MAX = 2 ** 31 - 1;

function size3(value: unknown, min: number, name: string): Size3 {
  if (!Array.isArray(value) || value.length !== 3) {
    throw new HeddleError('ERR_OPTION', `${name} must be [time, height, width]`);
  }
  return value.map((x, i) => optionInteger(x, min, MAX, `${name}[${i}]`)) as unknown as Size3;
}

/**
 * Tokens along time, height and width: `floor((length - offset - tubelet) / stride) + 1` each, as a convolution without
 * padding; pixels beyond the last tubelet are dropped.
 *
 * @param video frames, height and width
 * @throws HeddleError `ERR_OPTION`; `ERR_SHAPE` where not one tubelet fits
 */
export function patchGrid(
  video: Size3,
  options: PatchGridOptions,
): [time: number, height: number, width: number] {
  checkOptions(options, GRID_OPTIONS, 'patchGrid');
  const length = size3(video, 0, 'video');
  const tubelet = size3(options?.tubelet, 1, 'tubelet');
  const stride = options.stride === undefined ? tubelet : size3(options.stride, 1, 'stride');
  const offset = options.offset === undefined ? [0, 0, 0] : size3(options.offset, 0, 'offset');
  const grid = length.map((n, i) => Math.floor((n - offset[i] - tubelet[i]) / stride[i]) + 1);
  if (grid.some((n) => n < 1)) {
    const [t, h, w] = length;
    throw new HeddleError(
      'ERR_SHAPE',
      `video: ${t} frames of ${h} x ${w} pixels give no token: tubelets of [${tubelet.join(', ')}] begin at [${offset.join(', ')}]`,
    );
  }
  return grid as [number, number, number];
}
