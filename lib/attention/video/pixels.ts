import { HeddleError } from '../../errors.ts';
import { asTensor, type TensorLike } from '../../tensor.ts';
import type { ResolvedConfig } from './config.ts';
import type { TokenRows } from './rows.ts';

/** Mean and standard deviation per channel of pixels that lie between 0 and 1. */
export interface Normalization {
  mean: readonly number[];
  std: readonly number[];
}

/** Frames as the patch embedding reads them: pixel (b, f, c, y, x), times scale[c], plus shift[c]. */
export interface Frames {
  data: Float32Array | Uint8Array;
  dims: readonly [clips: number, frames: number, channels: number, height: number, width: number];
  strides: readonly [clip: number, frame: number, channel: number, row: number, column: number];
  scale: Float64Array;
  shift: Float64Array;
  /** Tubelets along time, height and width. */
  grid: readonly [time: number, height: number, width: number];
}

/**
 * Checks frames against a config.
 * @param layout `'TCHW'`: `[clips, frames, channels, height, width]`; `'THWC'`: `[clips, frames, height, width, channels]`
 */
export function readFrames(
  value: TensorLike,
  c: ResolvedConfig,
  layout: 'TCHW' | 'THWC',
  normalization: Normalization,
): Frames {
  const t = asTensor(value, 'frames', ['float32', 'uint8'], 5);
  const last = layout === 'THWC';
  const [clips, frames] = t.dims;
  const [channels, height, width] = last ? [t.dims[4], t.dims[2], t.dims[3]] : t.dims.slice(2);
  if (channels !== c.channels) {
    throw new HeddleError(
      'ERR_SHAPE',
      `frames: expected ${c.channels} channels in ${layout} order, got ${channels} in [${t.dims.join(', ')}]`,
    );
  }
  const [dt, dh, dw] = c.tubelet;
  // V-JEPA 2 repeats a clip that is shorter than a tubelet.
  const time = c.positions === 'rotary' && frames > 0 && frames < dt ? 1 : Math.floor(frames / dt);
  const grid = [time, Math.floor(height / dh), Math.floor(width / dw)] as const;
  if (grid.includes(0)) {
    throw new HeddleError(
      'ERR_SHAPE',
      `frames: ${frames} frames of ${height} x ${width} pixels give no token: a tubelet has ${dt} frames of ${dh} x ${dw}`,
    );
  }
  const size = channels * height * width;
  const strides = last
    ? ([frames * size, size, 1, width * channels, channels] as const)
    : ([frames * size, size, height * width, width, 1] as const);
  const scale = new Float64Array(channels).fill(1);
  const shift = new Float64Array(channels);
  if (t.type === 'uint8') {
    for (let i = 0; i < channels; i++) {
      const at = normalization.mean.length === 1 ? 0 : i;
      scale[i] = 1 / (255 * normalization.std[at]);
      shift[i] = -normalization.mean[at] / normalization.std[at];
    }
  }
  return { data: t.data, dims: [clips, frames, channels, height, width], strides, scale, shift, grid };
}

/** Checks what uint8 frames are normalised with. */
export function checkNormalization(value: Normalization, channels: number): Normalization {
  for (const name of ['mean', 'std'] as const) {
    const list = value?.[name];
    const fits =
      Array.isArray(list) &&
      (list.length === 1 || list.length === channels) &&
      list.every((v) => Number.isFinite(v) && (name === 'mean' || v > 0));
    if (!fits) {
      throw new HeddleError(
        'ERR_OPTION',
        `normalization.${name} must be 1 or ${channels} ${name === 'std' ? 'positive ' : ''}numbers, got ${JSON.stringify(list)}`,
      );
    }
  }
  if (value.mean.length !== value.std.length) {
    throw new HeddleError('ERR_OPTION', 'normalization: mean and std must be as long');
  }
  return value;
}

/** Pixels of the tubelets of some rows, in the order of a convolution's weight: channel, time, row, column. */
export function unfoldTubelets(
  f: Frames,
  c: ResolvedConfig,
  rows: TokenRows,
  which: Int32Array,
  begin: number,
  end: number,
  out: Float32Array,
): void {
  const [dt, dh, dw] = c.tubelet;
  const [sb, sf, sc, sy, sx] = f.strides;
  const [, frames, channels] = f.dims;
  const { data, scale, shift } = f;
  const columns = f.grid[2];
  let at = 0;
  for (let i = begin; i < end; i++) {
    const row = which[i];
    const n = rows.n[row];
    const base = rows.clip[row] * sb + Math.floor(n / columns) * dh * sy + (n % columns) * dw * sx;
    for (let ch = 0; ch < channels; ch++) {
      const a = scale[ch];
      const b = shift[ch];
      for (let t = 0; t < dt; t++) {
        const frame = (rows.t[row] * dt + t) % frames;
        for (let y = 0; y < dh; y++) {
          let from = base + ch * sc + frame * sf + y * sy;
          for (let x = 0; x < dw; x++, from += sx) out[at++] = a * data[from] + b;
        }
      }
    }
  }
}
