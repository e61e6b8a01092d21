import { HeddleError } from '../errors.ts';
import {
  type AsyncOpOptions,
  call,
  callSync,
  checkOptions,
  checkOut,
  type Op,
  type OpOptions,
  optionChoice,
  optionInteger,
  optionNumber,
} from '../op.ts';
import { discreteGaussianReference } from '../reference/privacy/discreteGaussian.ts';
import { gaussianNoiseReference } from '../reference/privacy/gaussianNoise.ts';
import { allocate, asTensor, elementCount, makeTensor, type Tensor, type TensorLike } from '../tensor.ts';
import { keyArgument } from './chacha20.ts';
import { gridOf } from './discreteNoise.ts';

export interface NoiseOptions {
  /** 32 secret bytes from the operating system's generator, one key per run: {@link createNoiseKey}. */
  key: Uint8Array;
  /** Number of the logical step. One (key, step, element) is one number: never use a step twice. */
  step: number;
  /** Global index of the first element, so that shards of one array draw what the whole would. Default 0. */
  offset?: number;
  /** σ·R. */
  stddev: number;
  /**
   * `continuous` (default): Gaussian numbers computed in float32, whose rounding is a side channel in principle (Mironov
   * 2012). `discrete`: values are rounded to a grid and get discrete Gaussian noise drawn by integer arithmetic alone,
   * so that the result depends on the data through exact integers only; see {@link addNoise} and
   * {@link discreteNoisePlan} for what it costs.
   */
  mode?: 'continuous' | 'discrete';
  /** Step of the grid of `discrete`: a power of two of at least stddev/2²³. Default {@link noiseGranularity}. */
  granularity?: number;
}

export interface GaussianNoiseOptions extends NoiseOptions {
  /** float32 of the given shape. */
  out?: TensorLike;
}

const COMMON = ['key', 'step', 'offset', 'stddev', 'mode', 'granularity', 'backend', 'threads', 'signal'];
const MODES = ['continuous', 'discrete'] as const;
const ADD_OPTIONS: ReadonlySet<string> = new Set(COMMON);
const NOISE_OPTIONS: ReadonlySet<string> = new Set([...COMMON, 'out']);

function argsOf(out: Tensor<'float32'>, options: NoiseOptions, add: boolean) {
  const words = keyArgument(options.key);
  const step = optionInteger(options.step, 0, Number.MAX_SAFE_INTEGER, 'step');
  const count = out.size;
  const offset = optionInteger(options.offset ?? 0, 0, Number.MAX_SAFE_INTEGER - count, 'offset');
  const stddev = optionNumber(options.stddev ?? Number.NaN, 0, 0, 'stddev');
  const key = options.key.slice();
  if (optionChoice(options.mode, MODES, 'continuous', 'mode') === 'discrete') {
    // The key stream has 48 bits for the index of an element.
    optionInteger(offset, 0, 2 ** 48 - count, 'offset');
    const { granularity, sigma } = gridOf(stddev, options.granularity);
    const op: Op = {
      name: 'discreteNoise',
      reference: () => {
        const noise = discreteGaussianReference(count, key, step, offset, sigma);
        for (let i = 0; i < count; i++) {
          const onGrid = add ? Math.floor(out.data[i] / granularity + 0.5) : 0;
          out.data[i] = (onGrid + noise[i]) * granularity;
        }
        return 0;
      },
    };
    return { op, args: [words, step, offset, count, sigma, granularity, add, out.data], out };
  }
  if (options.granularity !== undefined) {
    throw new HeddleError('ERR_OPTION', "granularity is an option of mode 'discrete'");
  }
  const op: Op = {
    name: 'gaussianNoise',
    reference: () => {
      const noise = gaussianNoiseReference(count, key, step, offset, stddev);
      for (let i = 0; i < count; i++) out.data[i] = add ? out.data[i] + Math.fround(noise[i]) : noise[i];
      return 0;
    },
  };
  return { op, args: [words, step, offset, count, stddev, add, out.data], out };
}

function required(options: NoiseOptions | undefined, name: string): asserts options is NoiseOptions {
  if (options === undefined) {
    throw new HeddleError('ERR_ARGUMENT', `${name}: options with key, step and stddev are required`);
  }
}

function prepare(shape: readonly number[], options: GaussianNoiseOptions) {
  checkOptions(options, NOISE_OPTIONS, 'gaussianNoise');
  required(options, 'gaussianNoise');
  if (!Array.isArray(shape)) {
    throw new HeddleError('ERR_ARGUMENT', 'shape: expected an array of dimensions');
  }
  const count = elementCount(shape, 'shape');
  let out: Tensor<'float32'>;
  if (options.out === undefined) {
    out = makeTensor('float32', allocate('float32', count), shape.slice());
  } else {
    out = asTensor(options.out, 'out', ['float32']);
    checkOut(out, shape, [], 'out');
  }
  return argsOf(out, options, false);
}

function prepareAdd(values: TensorLike, options: NoiseOptions) {
  checkOptions(options, ADD_OPTIONS, 'addNoise');
  required(options, 'addNoise');
  return argsOf(asTensor(values, 'values', ['float32']), options, true);
}

/**
 * Gaussian noise from ChaCha20, a pure function of (key, step, global element index): however an array is split into
 * shards, threads or calls, each element gets the same number. Without the key it cannot be told from random, so it
 * cannot be subtracted. The 64-bit random integers behind it are equal on every backend; the float32 result may differ
 * in the last places between instruction sets, never between threads or shards. In mode `discrete` the result is equal
 * everywhere, bit for bit.
 *
 * @returns float32 of `shape`
 * @throws HeddleError `ERR_ARGUMENT`, `ERR_SHAPE`, `ERR_DTYPE`, `ERR_OPTION`, `ERR_BACKEND`, `ERR_ABORTED`
 */
export async function gaussianNoise(
  shape: readonly number[],
  options: GaussianNoiseOptions & AsyncOpOptions,
): Promise<Tensor<'float32'>> {
  const p = prepare(shape, options);
  await call(p.op, p.args, options);
  return p.out;
}

/** {@link gaussianNoise} on the calling thread (and helpers, when `threads` > 1). */
export function gaussianNoiseSync(
  shape: readonly number[],
  options: GaussianNoiseOptions & OpOptions,
): Tensor<'float32'> {
  const p = prepare(shape, options);
  callSync(p.op, p.args, options);
  return p.out;
}

/**
 * Adds {@link gaussianNoise} to float32 values in place and returns them: once per logical step, after the clipped sum
 * is complete. An aborted call leaves them partly noised.
 *
 * Mode `discrete` replaces x by `g·(⌊x/g + ½⌋ + z)`, g the granularity, z an integer with P(z) ∝ e^(−z²/2s²), s =
 * ⌈stddev/g⌉. Rounding moves each of two neighbouring sums by up to g/2 per element, so that the sensitivity of n
 * elements together (all layers of the model) is R + g·√n in place of R: account for g·s/(R + g·√n). g is a power of
 * two, which makes x/g exact; the float32 result is a function of the exact integer. NaN and infinities stay.
 */
export async function addNoise(
  values: TensorLike,
  options: NoiseOptions & AsyncOpOptions,
): Promise<Tensor<'float32'>> {
  const p = prepareAdd(values, options);
  await call(p.op, p.args, options);
  return p.out;
}

/** {@link addNoise} on the calling thread. */
export function addNoiseSync(values: TensorLike, options: NoiseOptions & OpOptions): Tensor<'float32'> {
  const p = prepareAdd(values, options);
  callSync(p.op, p.args, options);
  return p.out;
}
