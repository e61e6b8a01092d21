import { HeddleError } from '../../errors.ts';
import { makeTensor } from '../../tensor.ts';
import { interpolatePositions } from '../interpolatePositions.ts';
import { ownTimeClass, type ResolvedConfig } from './config.ts';

/** How position tables are resized to other frames; along time `'bilinear'` and `'bicubic'` are linear. */
export type PositionResizing = 'nearest' | 'bilinear' | 'bicubic';
export const POSITION_RESIZINGS: readonly PositionResizing[] = ['nearest', 'bilinear', 'bicubic'];

export interface PositionTables {
  /** A row per token. */
  positions?: Float32Array;
  spacePositions?: Float32Array;
  timePositions?: Float32Array;
}

type Grid = readonly [time: number, height: number, width: number];

/**
 * An encoder's tables for a grid of tubelets: its own, or resized.
 * @throws HeddleError `ERR_SHAPE` when the grid is another one and `mode` is not given
 */
export function tablesFor(
  c: ResolvedConfig,
  own: PositionTables,
  grid: Grid,
  mode: PositionResizing | undefined,
): PositionTables {
  const [time, height, width] = c.grid;
  const table = c.positions === 'joint' || c.positions === 'space' || c.positions === 'space-time';
  const sameSpace = !table || (grid[1] === height && grid[2] === width);
  const sameTime = !table || c.positions === 'space' || grid[0] === time;
  if (sameSpace && sameTime) return own;
  if (mode === undefined) {
    throw new HeddleError(
      'ERR_SHAPE',
      `frames: ${grid.join(' x ')} tubelets, but the position tables have rows for ${c.grid.join(' x ')}; ` +
        'resize the frames, or the tables with resizePositions',
    );
  }
  const along = mode === 'nearest' ? 'nearest' : 'linear';
  const resize = (data: Float32Array, prefix: number, from: number | [number, number], d: number) => {
    const t = makeTensor('float32', data, [data.length / d, d]);
    const to = typeof from === 'number' ? grid[0] : ([grid[1], grid[2]] as const);
    const r = interpolatePositions(t, { from, to, prefix, mode: typeof from === 'number' ? along : mode });
    return r.data as Float32Array;
  };
  const d = c.hiddenSize;
  const cls = c.classToken ? 1 : 0;
  const { positions, spacePositions, timePositions } = own;
  return {
    positions: positions && jointTable(c, positions, grid, resize),
    spacePositions: spacePositions && resize(spacePositions, cls, [height, width], d),
    timePositions: timePositions && resize(timePositions, ownTimeClass(c) ? 1 : 0, time, d),
  };
}

/** A table of a row per token, each frame's rows resized, then each patch's along time. */
function jointTable(
  c: ResolvedConfig,
  table: Float32Array,
  grid: Grid,
  resize: (data: Float32Array, prefix: number, from: number | [number, number], d: number) => Float32Array,
): Float32Array {
  const [time, height, width] = c.grid;
  const d = c.hiddenSize;
  const first = c.classToken ? d : 0;
  const frame = height * width * d;
  const size = grid[1] * grid[2] * d;
  const frames = new Float32Array(time * size);
  for (let t = 0; t < time; t++) {
    const rows = table.subarray(first + t * frame, first + (t + 1) * frame);
    frames.set(resize(rows, 0, [height, width], d), t * size);
  }
  const out = new Float32Array(first + grid[0] * size);
  out.set(table.subarray(0, first));
  // All rows of a frame as one wide row.
  out.set(resize(frames, 0, time, size), first);
  return out;
}
