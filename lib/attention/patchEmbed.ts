import { backendOf, resolveBackend } from '../backend.ts';
import { runAsync, runSync, type Steps, step } from '../checkpoint/steps.ts';
import { type Location, placeOf } from '../device.ts';
import { DTYPE_CODE, FLOAT_TYPES, type FloatType } from '../dtype.ts';
import { HeddleError } from '../errors.ts';
import { outputTensor, PackedMatrix, packMatrix, packMatrixSync } from '../gemm/linear.ts';
import { optionalVector } from '../nn/outputs.ts';
import {
  type AsyncOpOptions,
  call,
  callSync,
  checkOptions,
  nativeOnly,
  type Op,
  type OpOptions,
  optionChoice,
  optionNumber,
} from '../op.ts';
import { patchEmbedReference } from '../reference/attention/patchEmbed.ts';
import { asTensor, type DType, makeTensor, Tensor, type TensorLike } from '../tensor.ts';
import { indexTokens, type KeptTokens } from './keptTokens.ts';
import { patchGrid, type Size3 } from './patchGrid.ts';

/** A packed matrix, or the matrix itself: `[dim, inputs]` float32, bfloat16 or float16. */
export type PatchWeights = PackedMatrix | TensorLike;

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
const PIXELS: readonly ('uint8' | 'float32' | 'bfloat16')[] = ['uint8', 'float32', 'bfloat16'];
/** Inputs of a matrix on the device. */
const MAX_INPUTS = 2 ** 31 - 65;

/** @internal */
export const patchEmbedOp: Op = { name: 'patchEmbed', reference: patchEmbedReference };
const op = patchEmbedOp;
/** A matrix instead of a packed one. */
const deviceOp = nativeOnly('patchEmbed');
/** Added rows and rows to write, of the video encoder's embedding. */
const NO_ADDED_ROWS = [null, null, null, null, null];

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

/** One weight matrix with its tokens. */
interface Plan {
  weight: PackedMatrix | Tensor<FloatType>;
  outputs: number;
  inputs: number;
  rows: number;
  /** What follows the weight, in the order of patch_problem (native/binding/experts.cpp). */
  problem: unknown[];
}

interface Prepared {
  plans: Plan[];
  out: Tensor<FloatType>;
  /** Whether it runs there, wherever the tensors are. */
  onDevice: boolean;
}

/** Where the op runs and where its tensors are. Packed weights run where they were packed: never on the device. */
function locate(
  o: PatchEmbedOptions & OpOptions,
  tensors: Readonly<Record<string, Tensor | null>>,
  weights: readonly Plan['weight'][],
): { place: Location; onDevice: boolean } {
  const out = o.out instanceof Tensor ? o.out : null;
  const place = placeOf('patchEmbed', o, { ...tensors, out });
  const packed = weights.find((w) => w instanceof PackedMatrix);
  const asked = place === 'cuda' ? place : o.backend;
  const there = weights.some((w) => w instanceof PackedMatrix && w.backend === 'cuda');
  if (packed !== undefined && (there || asked === 'cuda')) {
    throw new HeddleError(
      'ERR_BACKEND',
      `patchEmbed: weights packed for backend ${packed.backend} cannot be used on cuda; give the matrix itself, a tensor [dim, inputs]`,
    );
  }
  const onDevice = packed === undefined && (asked === 'cuda' || backendOf(resolveBackend(asked)) === 'cuda');
  return { place, onDevice };
}

function prepare(
  video: TensorLike,
  weights: PatchWeights | readonly PatchWeights[],
  o: PatchEmbedOptions & OpOptions,
): Prepared {
  if (o === undefined || o === null) {
    throw new HeddleError('ERR_ARGUMENT', 'patchEmbed: options with a tubelet are required');
  }
  checkOptions(o, OPTIONS, 'patchEmbed');
  const x = asTensor<DType>(video, 'video', PIXELS, 5, 'device');
  const last = optionChoice(o.layout, ['TCHW', 'THWC'], 'TCHW', 'layout') === 'THWC';
  const order = optionChoice(o.weightOrder, ['CTHW', 'THWC'], 'CTHW', 'weightOrder');
  const [batch, frames] = x.dims;
  const [channels, height, width] = last ? [x.dims[4], x.dims[2], x.dims[3]] : x.dims.slice(2);
  if (channels === 0) throw new HeddleError('ERR_SHAPE', 'video: expected at least one channel');
  const scale = optionNumber(o.scale, -Infinity, x.type === 'uint8' ? 1 / 255 : 1, 'scale');
  const mean = perChannel(o.mean, 0, channels, 'mean');
  const std = perChannel(o.std, 1, channels, 'std');
  const list = (Array.isArray(weights) ? weights : [weights]) as readonly PatchWeights[];
  if (list.length === 0) throw new HeddleError('ERR_ARGUMENT', 'weights: expected at least one matrix');
  const matrices = list.map((w) =>
    w instanceof PackedMatrix ? w : asTensor<FloatType>(w, 'weights', FLOAT_TYPES, 2, 'device'),
  );
  const sides = matrices.map((w) => (w instanceof PackedMatrix ? [w.outputs, w.inputs] : w.dims));
  const count = list.length;
  const tubelets = each(o.tubelet, isSize, count, 'tubelet');
  const strides = each(o.stride, isSize, count, 'stride');
  const offsets = each(o.offset, isSize, count, 'offset');
  const biases = each(o.bias, isTensor, count, 'bias');
  const dim = sides[0][0];

  const grids = tubelets.map((tubelet, i) =>
    patchGrid([frames, height, width], {
      tubelet: tubelet as Size3,
      stride: strides[i] as Size3 | undefined,
      offset: offsets[i] as Size3 | undefined,
    }),
  );
  const vectors = biases.map((b) => optionalVector(b as TensorLike | undefined, dim, 'bias', 'device'));
  sides.forEach(([outputs, inputs], i) => {
    const k = channels * (tubelets[i] as Size3).reduce((a, b) => a * b, 1);
    if (inputs !== k || outputs !== dim) {
      throw new HeddleError(
        'ERR_SHAPE',
        `weights: expected [${dim}, ${k}] for ${channels} channels and tubelets of [${(tubelets[i] as Size3).join(', ')}], got [${outputs}, ${inputs}]`,
      );
    }
  });
  const named: Record<string, Tensor | null> = { video: x };
  matrices.forEach((w, i) => {
    if (w instanceof Tensor) named[count === 1 ? 'weights' : `weights[${i}]`] = w;
    named[count === 1 ? 'bias' : `bias[${i}]`] = vectors[i];
  });
  const { place, onDevice } = locate(o, named, matrices);
  if (onDevice && sides.some(([, inputs]) => inputs > MAX_INPUTS)) {
    throw new HeddleError('ERR_SHAPE', `weights: at most ${MAX_INPUTS} inputs on cuda`);
  }
  const sizes = grids.map((g) => g[0] * g[1] * g[2]);
  const total = sizes.reduce((a, b) => a + b, 0);
  const inputs = Object.values(named).filter((t) => t !== null);
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
  for (const w of matrices) if (w instanceof PackedMatrix) w.use(o.backend);
  const out = outputTensor(o.out, o.outType, dims, inputs, place);

  const plane = height * width;
  const pixel = last ? [channels * plane, width * channels, channels] : [channels * plane, width, 1];
  const factor = Float32Array.from(std, (s) => scale / s);
  const shift = Float32Array.from(std, (s, c) => -mean[c] / s);
  let first = 0;
  const plans = matrices.map((weight, i) => {
    const tubelet = tubelets[i] as Size3;
    const offset = (offsets[i] ?? [0, 0, 0]) as Size3;
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
    const problem = [
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
    ];
    const rows = o.tokens === undefined ? batch * sizes[i] : dims[0];
    return { weight, outputs: dim, inputs: sides[i][1], rows, problem };
  });
  return { plans, out, onDevice };
}

function* runOnDevice(plan: Plan, options: AsyncOpOptions): Steps<void> {
  const { weight, outputs, inputs, rows, problem } = plan;
  const { data, type } = weight as Tensor<FloatType>;
  const args = [data, DTYPE_CODE[type], outputs, inputs, rows, ...problem];
  const run = { ...options, backend: 'cuda' } as const;
  yield* step(
    () => callSync(deviceOp, args, run),
    () => call(deviceOp, args, run),
  );
}

function* runOnHost({ weight, problem }: Plan, options: AsyncOpOptions): Steps<void> {
  const { backend, threads, signal } = options;
  const packed =
    weight instanceof PackedMatrix
      ? weight
      : yield* step(
          () => packMatrixSync(weight, { backend, threads }),
          () => packMatrix(weight, { backend, threads, signal }),
        );
  try {
    const args = [packed.use(backend), ...problem, ...NO_ADDED_ROWS];
    const run = { ...options, backend: packed.backend };
    yield* step(
      () => callSync(op, args, run),
      () => call(op, args, run),
    );
  } finally {
    if (packed !== weight) packed.dispose();
  }
}

function* embed(
  video: TensorLike,
  weights: PatchWeights | readonly PatchWeights[],
  options: PatchEmbedOptions & AsyncOpOptions,
): Steps<Tensor<FloatType>> {
  const { plans, out, onDevice } = prepare(video, weights, options);
  try {
    for (const plan of plans) yield* (onDevice ? runOnDevice : runOnHost)(plan, options);
  } catch (error) {
    // A later matrix may fail when the result is no longer an unfinished call's.
    if (options.out === undefined && out.location === 'cuda') out.dispose();
    throw error;
  }
  return out;
}

/**
 * Tokens of video by a 3-D convolution without padding (tubelet embedding; ViViT, Arnab et al. 2021), with the
 * normalisation of the pixels, and for kept tokens only where `tokens` says so. The unfolded video is never stored.
 *
 * Several weight matrices with a tubelet each give their tokens one after the other (TubeViT's tubes of several sizes).
 * On the host a token's result is bitwise that of `linear` on its normalised, unfolded pixels.
 *
 * On CUDA the weights are the matrices themselves, and their type says how it multiplies: bfloat16 and float16 on the
 * tensor cores, with pixels rounded to that type once they are normalised, float32 in float32. Tensors may be on the
 * device, all of them or none, and so is then the result. A matrix whose order is not that of the video's channels
 * (`layout` and `weightOrder`) is copied for each call. The host packs a matrix for each call: give it packed where
 * calls follow each other.
 *
 * @param video five dims as `layout` says; uint8, float32 or bfloat16
 * @param weights `[dim, inputs]`, packed (of any type) or not, inputs in the order that `weightOrder` says
 * @returns `[batch, tokens, dim]`, tokens by time, row and column; with `tokens`, `[kept, dim]`
 * @throws HeddleError `ERR_ARGUMENT`, `ERR_SHAPE` (also where not one tubelet fits), `ERR_DTYPE`, `ERR_OPTION`,
 *   `ERR_VALUE`, `ERR_DISPOSED`, `ERR_MEMORY`, `ERR_BACKEND`, `ERR_ABORTED`
 */
export async function patchEmbed(
  video: TensorLike,
  weights: PatchWeights | readonly PatchWeights[],
  options: PatchEmbedOptions & AsyncOpOptions,
): Promise<Tensor<FloatType>> {
  return runAsync(embed(video, weights, options));
}

/** {@link patchEmbed} on the calling thread (and helpers, when `threads` > 1). */
export function patchEmbedSync(
  video: TensorLike,
  weights: PatchWeights | readonly PatchWeights[],
  options: PatchEmbedOptions & OpOptions,
): Tensor<FloatType> {
  return runSync(embed(video, weights, options));
}
