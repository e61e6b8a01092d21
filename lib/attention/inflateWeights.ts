import { DTYPE_CODE, FLOAT_TYPES, type FloatType, readFloat, writeFloat } from '../dtype.ts';
import { HeddleError } from '../errors.ts';
import { checkOptions, optionChoice, optionInteger } from '../op.ts';
import { allocate, asTensor, makeTensor, type Tensor, type TensorLike } from '../tensor.ts';

export interface InflateWeightsOptions {
  /** Frames of a tubelet. */
  frames: number;
  /** `'central-frame'`: the image's weights at frame floor(frames / 2), zeros elsewhere. `'average'`: 1/frames of them
   * at each. */
  mode: 'central-frame' | 'average';
}

const OPTIONS: ReadonlySet<string> = new Set(['frames', 'mode']);

/**
 * Tubelet weights from those of an image model (ViViT, section 3.4). Central frame: the tokens of the middle frames' image
 * model; average: the mean of the frames' tokens.
 *
 * @param weight `[dim, channels, height, width]` float32, bfloat16 or float16
 * @returns `[dim, channels, frames, height, width]` of the same type; reshape to `[dim, inputs]` for `packMatrix`
 * @throws HeddleError `ERR_ARGUMENT`, `ERR_SHAPE`, `ERR_DTYPE`, `ERR_OPTION`
 */
export function inflateWeights(weight: TensorLike, options: InflateWeightsOptions): Tensor<FloatType> {
  if (options === undefined || options === null) {
    throw new HeddleError('ERR_ARGUMENT', 'inflateWeights: options with frames and mode are required');
  }
  checkOptions(options, OPTIONS, 'inflateWeights');
  const w = asTensor(weight, 'weight', FLOAT_TYPES, 4);
  const frames = optionInteger(options.frames, 1, 2 ** 20, 'frames');
  const mode = optionChoice(options.mode, ['central-frame', 'average'], undefined as never, 'mode');
  if (mode === undefined) throw new HeddleError('ERR_OPTION', 'mode is required: central-frame or average');
  const [dim, channels, height, width] = w.dims;
  const plane = height * width;
  const code = DTYPE_CODE[w.type];
  const out = allocate(w.type, w.size * frames);
  for (let filter = 0; filter < dim * channels; filter++) {
    for (let t = 0; t < frames; t++) {
      if (mode === 'central-frame' && t !== Math.floor(frames / 2)) continue;
      for (let i = 0; i < plane; i++) {
        const value = readFloat(w.data, code, filter * plane + i);
        const at = (filter * frames + t) * plane + i;
        writeFloat(out, code, at, mode === 'average' ? value / frames : value);
      }
    }
  }
  return makeTensor(w.type, out, [dim, channels, frames, height, width]);
}
