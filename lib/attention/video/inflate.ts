import type { FloatType } from '../../dtype.ts';
import { FLOAT_TYPES } from '../../dtype.ts';
import { HeddleError } from '../../errors.ts';
import { allocate, asTensor, makeTensor, Tensor, type TensorLike } from '../../tensor.ts';
import { inflateWeights } from '../inflateWeights.ts';
import { type ResolvedConfig, resolveConfig, tensorShapes, type VideoEncoderConfig } from './config.ts';

export interface InflateImageEncoderOptions {
  /** How the patch embedding is spread over the frames of a tubelet; see `inflateWeights`. Default `'central-frame'`. */
  mode?: 'central-frame' | 'average';
}

/** Where a part that an image encoder lacks is taken from. */
function imageName(name: string): string {
  return name
    .replace(/\.timeNorm\./, '.norm.')
    .replace(/\.timeAttention\./, '.attention.')
    .replace(/^timeLayers\./, 'layers.')
    .replace(/^timeNorm\./, 'norm.')
    .replace(/^timeClassToken$/, 'classToken');
}

/** Rows of the image's table for a video's: without the class token's row where the video has none, once per frame. */
function positionRows(
  table: Tensor<FloatType>,
  c: ResolvedConfig,
  imageClass: boolean,
  frames: number,
): Tensor<FloatType> {
  const [, height, width] = c.grid;
  const d = c.hiddenSize;
  const patches = height * width;
  const first = imageClass ? 1 : 0;
  if (table.dims.length !== 2 || table.dims[0] !== first + patches || table.dims[1] !== d) {
    throw new HeddleError(
      'ERR_SHAPE',
      `tensors['positions.space']: expected [${first + patches}, ${d}], got [${table.dims.join(', ')}]; ` +
        'interpolatePositions resizes tables',
    );
  }
  const cls = c.classToken ? 1 : 0;
  const out = allocate(table.type, (cls + frames * patches) * d);
  if (cls && imageClass) out.set(table.data.subarray(0, d) as never, 0);
  const own = table.data.subarray(first * d);
  for (let t = 0; t < frames; t++) out.set(own as never, (cls + t * patches) * d);
  return makeTensor(table.type, out, [cls + frames * patches, d]);
}

/**
 * Tensors of a video encoder from those of an image encoder (ViViT 2021, LongViViT 2024): the patch embedding is
 * inflated, blocks over time start as copies of the blocks over space, a gate starts at 0 (closed), TimeSformer's second
 * projection at 0, positions over time at 0. A joint position table repeats the image's for every frame.
 *
 * @param config of the video encoder
 * @param tensors of the image encoder under the names of `videoEncoderTensors`, with `patch.weight` `[hidden, channels,
 *   height, width]` and its table as `positions.space` (the class token's row first, where there is `classToken`)
 * @returns what `VideoEncoder.create` takes for this config
 * @throws HeddleError `ERR_ARGUMENT` naming a tensor that is missing, `ERR_SHAPE`, `ERR_DTYPE`, `ERR_OPTION`
 */
export function inflateImageEncoder(
  config: VideoEncoderConfig,
  tensors: Readonly<Record<string, TensorLike>>,
  options: InflateImageEncoderOptions = {},
): Record<string, Tensor<FloatType>> {
  const c = resolveConfig(config);
  const image = (name: string): Tensor<FloatType> => {
    if (!Object.hasOwn(tensors, name)) throw new HeddleError('ERR_ARGUMENT', `tensors: ${name} missing`);
    return asTensor(tensors[name], `tensors['${name}']`, FLOAT_TYPES);
  };
  const imageClass = Object.hasOwn(tensors, 'classToken');
  const inflated: Record<string, Tensor<FloatType>> = {};
  for (const [name, dims] of tensorShapes(c)) {
    if (name === 'patch.weight') {
      const mode = options.mode ?? 'central-frame';
      inflated[name] = inflateWeights(image(name), { frames: c.tubelet[0], mode });
    } else if (name === 'positions' || name === 'positions.space') {
      const frames = name === 'positions' ? c.grid[0] : 1;
      inflated[name] = positionRows(image('positions.space'), c, imageClass, frames);
    } else if (name === 'positions.time' || /\.timeGate$|\.timeProjection\./.test(name)) {
      inflated[name] = Tensor.zeros('float32', dims);
    } else if (name === 'timeClassToken' && !imageClass) {
      inflated[name] = Tensor.zeros('float32', dims);
    } else {
      const t = image(imageName(name));
      if (t.dims.length !== dims.length || t.dims.some((v, i) => v !== dims[i])) {
        throw new HeddleError(
          'ERR_SHAPE',
          `tensors['${imageName(name)}']: expected [${dims.join(', ')}], got [${t.dims.join(', ')}]`,
        );
      }
      inflated[name] = t;
    }
  }
  return inflated;
}
