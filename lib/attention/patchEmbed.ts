import { runAsync, runSync, type Steps, step } from '../checkpoint/steps.ts';
import { DTYPE_CODE, type FloatType } from '../dtype.ts';
import { HeddleError } from '../errors.ts';
import { outputTensor, PackedMatrix } from '../gemm/linear.ts';
import { optionalVector } from '../nn/outputs.ts';
import {
  type AsyncOpOptions,
  call,
  callSync,
  checkOptions,
  type Op,
  type OpOptions,
  optionChoice,
  optionInteger,
  optionNumber,
} from '../op.ts';
import { patchEmbedReference } from '../reference/attention/patchEmbed.ts';
import { asTensor, type DType, makeTensor, type Tensor, type TensorLike } from '../tensor.ts';
import { indexTokens, type KeptTokens } from './keptTokens.ts';

/** Along time, height and width. */
export type Size3 = readonly [time: number, height: number, width: number];

export interface PatchEmbedOptions {
  /** Frames, rows and columns of a tubelet; one per weight matrix. */
  tubelet: Size3 | readonly Size3[];
  /** Default: the tubelet, so that tubelets touch and do not overlap. */
  stride?: Size3 | readonly Size3[];
  /** Where the first tubelet begins. Default [0, 0, 0]. */
  offset?: Size3 | readonly Size3[];
  /** float32 `[dim]`; one per weight matrix. */
  bias?: TensorLike | readonly TensorLike[];
  /**
   * Pixels are normalised as `(pixel * scale - mean) / std`. Scale defaults to 1/255 for uint8 and to 1 for floats, mean
   * to 0, std to 1.
   */
  scale?: number;
  /** One number, or one per channel. */
  mean?: number | readonly number[];
  std?: number | readonly number[];
  /** Compute these tokens only, packed; for one weight matrix. From `maskTokens` with the grid's frames and patches. */
  tokens?: KeptTokens;
  /** `'TCHW'`: video is `[batch, time, channels, height, width]`. `'THWC'`: `[batch, time, height, width, channels]`. */
  layout?: 'TCHW' | 'THWC';
  /**
   * Order of the weight's inputs. `'CTHW'`: channel, time, height, width, as a PyTorch Conv3d has them (default).
   * `'THWC'`: time, height, width, channel, as a Flax convolution, its kernel transposed to `[dim, inputs]`.
   */
  weightOrder?: 'CTHW' | 'THWC';
  /** Type of the result. Default float32. */
  outType?: FloatType;
  out?: TensorLike;
}

/** What {@link patchGrid} needs. */
export interface PatchGridOptions {
  tubelet: Size3;
  stride?: Size3;
  offset?: Size3;
}

const OPTIONS: ReadonlySet<string> = new Set([
  'tubelet',
  'stride',
  'offset',
  'bias',
  'scale',
  'mean',
  'std',
  'tokens',
  'layout',
  'weightOrder',
  'outType',
  'out',
  'backend',
  'threads',
  'signal',
]);
const GRID_OPTIONS: ReadonlySet<string> = new Set(['tubelet', 'stride', 'offset']);
const PIXELS: readonly ('uint8' | 'float32' | 'bfloat16')[] = ['uint8', 'float32', 'bfloat16'];
const MAX = 2 ** 31 - 1;

/** @internal */
export const patchEmbedOp: Op = { name: 'patchEmbed', reference: patchEmbedReference };
const op = patchEmbedOp;
/** Added rows and rows to write, of the video encoder's embedding. */
const NO_ADDED_ROWS = [null, null, null, null, null];

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

/** `value` for each of `count` matrices; a list has one element for each. */
function each<T>(
  value: T | readonly T[] | undefined,
  isOne: (x: unknown) => boolean,
  count: number,
  name: string,
) {
  if (value === undefined || isOne(value)) return Array<T | undefined>(count).fill(value as T | undefined);
  if (!Array.isArray(value) || value.length !== count) {
    throw new HeddleError('ERR_OPTION', `${name}: expected one, or a list of ${count} as there are weights`);
  }
  return value as T[];
}

const isSize = (x: unknown) => !Array.isArray(x) || typeof x[0] === 'number';
const isTensor = (x: unknown) => !Array.isArray(x);

function perChannel(
  value: number | readonly number[] | undefined,
  fallback: number,
  channels: number,
  name: string,
) {
  const list = typeof value === 'number' ? [value] : (value ?? [fallback]);
  const good = Array.isArray(list) && (list.length === 1 || list.length === channels);
  if (!good || list.some((x) => !Number.isFinite(x) || (name === 'std' && x === 0))) {
    const kind = name === 'std' ? 'numbers other than 0' : 'finite numbers';
    throw new HeddleError(
      'ERR_OPTION',
      `${name} must be 1 or ${channels} ${kind}, got ${JSON.stringify(value)}`,
    );
  }
  return Array.from({ length: channels }, (_, c) => list[list.length === 1 ? 0 : c] as number);
}

interface Plan {
  weight: PackedMatrix;
  args: unknown[];
}

function prepare(
  video: TensorLike,
  weights: PackedMatrix | readonly PackedMatrix[],
  o: PatchEmbedOptions & OpOptions,
): { plans: Plan[]; out: Tensor<FloatType> } {
  if (o === undefined || o === null) {
    throw new HeddleError('ERR_ARGUMENT', 'patchEmbed: options with a tubelet are required');
  }
  checkOptions(o, OPTIONS, 'patchEmbed');
  const x = asTensor<DType>(video, 'video', PIXELS, 5);
  const last = optionChoice(o.layout, ['TCHW', 'THWC'], 'TCHW', 'layout') === 'THWC';
  const order = optionChoice(o.weightOrder, ['CTHW', 'THWC'], 'CTHW', 'weightOrder');
  const [batch, frames] = x.dims;
  const [channels, height, width] = last ? [x.dims[4], x.dims[2], x.dims[3]] : x.dims.slice(2);
  const scale = optionNumber(o.scale, -Infinity, x.type === 'uint8' ? 1 / 255 : 1, 'scale');
  const mean = perChannel(o.mean, 0, channels, 'mean');
  const std = perChannel(o.std, 1, channels, 'std');
  const list: readonly PackedMatrix[] = Array.isArray(weights) ? weights : [weights as PackedMatrix];
  if (list.length === 0 || list.some((w) => !(w instanceof PackedMatrix))) {
    throw new HeddleError('ERR_ARGUMENT', 'weights: expected a PackedMatrix or a list of them');
  }
  const count = list.length;
  const tubelets = each(o.tubelet, isSize, count, 'tubelet');
  const strides = each(o.stride, isSize, count, 'stride');
  const offsets = each(o.offset, isSize, count, 'offset');
  const biases = each(o.bias, isTensor, count, 'bias');
  const dim = list[0].outputs;

  const grids = tubelets.map((tubelet, i) =>
    patchGrid([frames, height, width], {
      tubelet: tubelet as Size3,
      stride: strides[i] as Size3 | undefined,
      offset: offsets[i] as Size3 | undefined,
    }),
  );
  const inputs: Tensor[] = [x];
  const vectors = biases.map((b) => {
    const t = optionalVector(b as TensorLike | undefined, dim, 'bias');
    if (t !== null) inputs.push(t);
    return t;
  });
  list.forEach((w, i) => {
    const k = channels * (tubelets[i] as Size3).reduce((a, b) => a * b, 1);
    if (w.inputs !== k || w.outputs !== dim) {
      throw new HeddleError(
        'ERR_SHAPE',
        `weights: expected [${dim}, ${k}] for ${channels} channels and tubelets of [${(tubelets[i] as Size3).join(', ')}], got [${w.outputs}, ${w.inputs}]`,
      );
    }
  });
  const sizes = grids.map((g) => g[0] * g[1] * g[2]);
  const total = sizes.reduce((a, b) => a + b, 0);
  let dims = [batch, total, dim];
  if (o.tokens !== undefined) {
    if (count !== 1) throw new HeddleError('ERR_OPTION', 'tokens: works with one weight matrix only');
    const kept = indexTokens(o.tokens, 'tokens');
    const patches = grids[0][1] * grids[0][2];
    if (kept.batch !== batch || o.tokens.frames !== grids[0][0] || o.tokens.patches !== patches) {
      throw new HeddleError(
        'ERR_SHAPE',
        `tokens: expected ${batch} entries of ${grids[0][0]} frames of ${patches} patches, got ${kept.batch} of ${o.tokens.frames} of ${o.tokens.patches}`,
      );
    }
    dims = [kept.tokens, dim];
    inputs.push(makeTensor('int32', o.tokens.indices, [kept.tokens]));
  }
  const out = outputTensor(o.out, o.outType, dims, inputs);

  const plane = height * width;
  const pixel = last ? [channels * plane, width * channels, channels] : [channels * plane, width, 1];
  const factor = Float32Array.from(std, (s) => scale / s);
  const shift = Float32Array.from(std, (s, c) => -mean[c] / s);
  let first = 0;
  const plans = list.map((weight, i) => {
    const tubelet = tubelets[i] as Size3;
    const offset = (offsets[i] ?? [0, 0, 0]) as Size3;
    // In the order of patch_embed_call (native/binding/experts.cpp).
    const numbers = Float64Array.of(
      batch,
      channels,
      frames * channels * plane,
      last ? 1 : plane,
      ...pixel,
      ...grids[i],
      ...tubelet,
      ...((strides[i] ?? tubelet) as Size3),
      offset.reduce((sum, at, axis) => sum + at * pixel[axis], 0),
      order === 'THWC' ? 1 : 0,
      total,
      first,
    );
    first += sizes[i];
    const args = [
      weight.use(o.backend),
      numbers,
      x.data,
      DTYPE_CODE[x.type],
      factor,
      shift,
      o.tokens?.indices ?? null,
      o.tokens?.batchOffsets ?? null,
      vectors[i]?.data ?? null,
      out.data,
      DTYPE_CODE[out.type],
      ...NO_ADDED_ROWS,
    ];
    return { weight, args };
  });
  return { plans, out };
}

function* embed(
  video: TensorLike,
  weights: PackedMatrix | readonly PackedMatrix[],
  options: PatchEmbedOptions & AsyncOpOptions,
): Steps<Tensor<FloatType>> {
  const { plans, out } = prepare(video, weights, options);
  for (const { weight, args } of plans) {
    const run = { ...options, backend: weight.backend };
    yield* step(
      () => callSync(op, args, run),
      () => call(op, args, run),
    );
  }
  return out;
}

/**
 * Tokens of video by a 3-D convolution without padding (tubelet embedding; ViViT, Arnab et al. 2021), with the
 * normalisation of the pixels, and for kept tokens only where `tokens` says so. The unfolded video is never stored.
 *
 * Several weight matrices with a tubelet each give their tokens one after the other (TubeViT's tubes of several sizes).
 * A token's result is bitwise that of `linear` on its normalised, unfolded pixels.
 *
 * @param video five dims as `layout` says; uint8, float32 or bfloat16
 * @param weights packed `[dim, inputs]` of any type, inputs in the order that `weightOrder` says
 * @returns `[batch, tokens, dim]`, tokens by time, row and column; with `tokens`, `[kept, dim]`
 * @throws HeddleError `ERR_ARGUMENT`, `ERR_SHAPE` (also where not one tubelet fits), `ERR_DTYPE`, `ERR_OPTION`,
 *   `ERR_VALUE`, `ERR_DISPOSED`, `ERR_MEMORY`, `ERR_BACKEND`, `ERR_ABORTED`
 */
export async function patchEmbed(
  video: TensorLike,
  weights: PackedMatrix | readonly PackedMatrix[],
  options: PatchEmbedOptions & AsyncOpOptions,
): Promise<Tensor<FloatType>> {
  return runAsync(embed(video, weights, options));
}

/** {@link patchEmbed} on the calling thread (and helpers, when `threads` > 1). */
export function patchEmbedSync(
  video: TensorLike,
  weights: PackedMatrix | readonly PackedMatrix[],
  options: PatchEmbedOptions & OpOptions,
): Tensor<FloatType> {
  return runSync(embed(video, weights, options));
}
