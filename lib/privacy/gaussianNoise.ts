import { HeddleError } from '../errors.ts';
import {
  type AsyncOpOptions,
  call,
  callSync,
  checkOptions,
  checkOut,
  type Op,
  type OpOptions,
  optionInteger,
  optionNumber,
} from '../op.ts';
import { gaussianNoiseReference } from '../reference/privacy/gaussianNoise.ts';
import { allocate, asTensor, elementCount, makeTensor, type Tensor, type TensorLike } from '../tensor.ts';
import { keyArgument } from './chacha20.ts';

export interface NoiseOptions {
  /** 32 secret bytes from the operating system's generator, one key per run: {@link createNoiseKey}. */
  key: Uint8Array;
  /** Number of the logical step. One (key, step, element) is one number: never use a step twice. */
  step: number;
  /** Global index of the first element, so that shards of one array draw what the whole would. Default 0. */
  offset?: number;
  /** σ·R. */
  stddev: number;
}

export interface GaussianNoiseOptions extends NoiseOptions {
  /** float32 of the given shape. */
  out?: TensorLike;
}

const COMMON = ['key', 'step', 'offset', 'stddev', 'backend', 'threads', 'signal'];
const ADD_OPTIONS: ReadonlySet<string> = new Set(COMMON);
const NOISE_OPTIONS: ReadonlySet<string> = new Set([...COMMON, 'out']);

function argsOf(out: Tensor<'float32'>, options: NoiseOptions, add: boolean) {
  const words = keyArgument(options.key);
  const step = optionInteger(options.step, 0, Number.MAX_SAFE_INTEGER, 'step');
  const count = out.size;
  const offset = optionInteger(options.offset ?? 0, 0, Number.MAX_SAFE_INTEGER - count, 'offset');
  const stddev = optionNumber(options.stddev ?? Number.NaN, 0, 0, 'stddev');
  const key = options.key.slice();
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
 * in the last places between instruction sets, never between threads or shards.
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
