import { HeddleError } from '../../errors.ts';
import { asTensor, type TensorLike } from '../../tensor.ts';
import type { ResolvedConfig } from './config.ts';

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
  scale: Float32Array;
  shift: Float32Array;
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
  const clips = t.dims[0];
  let frames = t.dims[1];
  const [channels, height, width] = last ? [t.dims[4], t.dims[2], t.dims[3]] : t.dims.slice(2);
  if (channels !== c.channels) {
    throw new HeddleError(
      'ERR_SHAPE',
      `frames: expected ${c.channels} channels in ${layout} order, got ${channels} in [${t.dims.join(', ')}]`,
    );
  }
  const [dt, dh, dw] = c.tubelet;
  const size = channels * height * width;
  let data = t.data;
  // V-JEPA 2 repeats a clip that is shorter than a tubelet.
  if (c.positions === 'rotary' && frames > 0 && frames < dt) {
    data = repeatFrames(data, clips, frames * size, dt * size);
    frames = dt;
  }
  const grid = [Math.floor(frames / dt), Math.floor(height / dh), Math.floor(width / dw)] as const;
  if (grid.includes(0)) {
    throw new HeddleError(
      'ERR_SHAPE',
      `frames: ${t.dims[1]} frames of ${height} x ${width} pixels give no token: a tubelet has ${dt} frames of ${dh} x ${dw}`,
    );
  }
  const strides = last
    ? ([frames * size, size, 1, width * channels, channels] as const)
    : ([frames * size, size, height * width, width, 1] as const);
  const scale = new Float32Array(channels).fill(1);
  const shift = new Float32Array(channels);
  if (t.type === 'uint8') {
    for (let i = 0; i < channels; i++) {
      const at = normalization.mean.length === 1 ? 0 : i;
      scale[i] = 1 / (255 * normalization.std[at]);
      shift[i] = -normalization.mean[at] / normalization.std[at];
    }
  }
  return { data, dims: [clips, frames, channels, height, width], strides, scale, shift, grid };
}

/** Each clip of `length` elements repeated until it has `whole`. */
function repeatFrames<T extends Float32Array | Uint8Array>(
  data: T,
  clips: number,
  length: number,
  whole: number,
): T {
  const out = new (data.constructor as new (n: number) => T)(clips * whole);
  for (let i = 0; i < out.length; i++) {
    out[i] = data[Math.floor(i / whole) * length + ((i % whole) % length)];
  }
  return out;
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
