import { allocateAt, isOnDevice, placeOf } from '../device.ts';
import { DTYPE_CODE, FLOAT_TYPES, type FloatType } from '../dtype.ts';
import { HeddleError } from '../errors.ts';
import {
  type AsyncOpOptions,
  call,
  callSync,
  checkOptions,
  checkOut,
  type Op,
  type OpOptions,
  optionFlag,
  optionInteger,
} from '../op.ts';
import { rotaryEmbeddingReference } from '../reference/attention/rotaryEmbedding.ts';
import { asTensor, makeTensor, Tensor, type TensorLike } from '../tensor.ts';
import { type IdArray, MAX_HEAD_DIM } from './options.ts';
import { type RotaryScaling, rotaryFrequencies } from './rotaryFrequencies.ts';

export interface RotaryEmbeddingOptions {
  /**
   * Position of each token: int32 `[batch | 1, sequence]`, or with several axes `[axes, batch | 1, sequence]`.
   * Default: `offset`, `offset + 1`, … (one axis only).
   */
  positions?: IdArray;
  /** Position of the first token where `positions` is not given. Default 0. */
  offset?: number;
  /** Default 10000. */
  base?: number;
  /** Leading elements of each head that are rotated; even. Default: all. */
  rotaryDim?: number;
  /** Pairs are (0, 1), (2, 3), … (GPT-J) instead of (0, d/2), (1, d/2 + 1), … (NeoX, Llama). Default false. */
  interleaved?: boolean;
  /** How frequencies are stretched for contexts longer than in training. */
  scaling?: RotaryScaling;
  /**
   * Qwen2-VL: how many of the rotaryDim / 2 frequencies take their position from each axis (time, height, width), in
   * order; for example [16, 24, 24].
   */
  sections?: readonly number[];
  /**
   * Axes that each have `2 * floor(floor(rotaryDim / axes) / 2)` elements and frequencies of their own; the remainder is
   * not rotated (V-JEPA 2: 3).
   */
  axes?: number;
  /** V-JEPA 2: with `interleaved`, element e of an axis takes angle e mod half, not floor(e / 2). Default false. */
  tiledAngles?: boolean;
  out?: Tensor<FloatType>;
}

const OPTIONS: ReadonlySet<string> = new Set([
  'positions',
  'offset',
  'base',
  'rotaryDim',
  'interleaved',
  'scaling',
  'sections',
  'axes',
  'tiledAngles',
  'out',
  'backend',
  'threads',
  'signal',
]);
const MAX_AXES = 8;

const op: Op = { name: 'rotaryEmbedding', reference: rotaryEmbeddingReference };

/** For each element its angle and its partner (-1: not rotated); for each angle its frequency and axis. */
interface RotaryLayout {
  angle: Int32Array;
  partner: Int32Array;
  frequency: Float64Array;
  axis: Int32Array;
  axes: number;
  factor: number;
}

function sectionAxes(sections: unknown, half: number): number[] {
  if (!Array.isArray(sections) || sections.length === 0 || sections.length > MAX_AXES) {
    throw new HeddleError('ERR_OPTION', `sections must be an array of 1 to ${MAX_AXES} counts`);
  }
  const counts = sections.map((n, i) => optionInteger(n, 0, half, `sections[${i}]`));
  const sum = counts.reduce((a, b) => a + b, 0);
  if (sum !== half) {
    throw new HeddleError('ERR_OPTION', `sections must add up to rotaryDim / 2 = ${half}, got ${sum}`);
  }
  return counts.flatMap((n, i) => Array(n).fill(i));
}

function layoutOf(dim: number, o: RotaryEmbeddingOptions): RotaryLayout {
  const rotary = optionInteger(o.rotaryDim ?? dim - (dim % 2), 2, dim, 'rotaryDim');
  if (rotary % 2 !== 0) throw new HeddleError('ERR_OPTION', `rotaryDim must be even, got ${rotary}`);
  const interleaved = optionFlag(o.interleaved, false, 'interleaved');
  const tiled = optionFlag(o.tiledAngles, false, 'tiledAngles');
  if (tiled && !interleaved) throw new HeddleError('ERR_OPTION', 'tiledAngles needs interleaved');
  if (o.sections !== undefined && o.axes !== undefined) {
    throw new HeddleError('ERR_OPTION', 'sections and axes exclude each other');
  }
  const separate = o.axes === undefined ? 1 : optionInteger(o.axes, 1, MAX_AXES, 'axes');
  const size = 2 * Math.floor(Math.floor(rotary / separate) / 2);
  if (size === 0)
    throw new HeddleError('ERR_OPTION', `axes: ${rotary} elements are too few for ${separate} axes`);
  const half = size / 2;
  const { frequencies, factor } = rotaryFrequencies(size, o.base, o.scaling);
  const frequency = Float64Array.from({ length: separate * half }, (_, i) => frequencies[i % half]);
  const axis = Int32Array.from(frequency, (_, i) => Math.floor(i / half));
  if (o.sections !== undefined) axis.set(sectionAxes(o.sections, half));
  const angle = new Int32Array(dim).fill(-1);
  const partner = new Int32Array(dim).fill(-1);
  for (let a = 0; a < separate; a++) {
    for (let e = 0; e < size; e++) {
      angle[a * size + e] = a * half + (interleaved && !tiled ? e >> 1 : e % half);
      partner[a * size + e] = a * size + (interleaved ? e ^ 1 : (e + half) % size);
    }
  }
  return { angle, partner, frequency, axis, axes: o.sections?.length ?? separate, factor };
}

function positionsOf(
  value: IdArray,
  axes: number,
  batch: number,
  length: number,
): { tensor: Tensor<'int32'>; axisStride: number; batchStride: number } {
  const t =
    value instanceof Int32Array
      ? makeTensor('int32', value, [1, value.length])
      : asTensor(value, 'positions', ['int32'], undefined, 'device');
  const d = axes === 1 && t.dims.length === 2 ? [1, ...t.dims] : t.dims;
  if (d.length !== 3 || d[0] !== axes || (d[1] !== batch && d[1] !== 1) || d[2] !== length) {
    const lead = axes === 1 ? '' : `${axes}, `;
    throw new HeddleError(
      'ERR_SHAPE',
      `positions: expected [${lead}${batch} or 1, ${length}], got [${t.dims.join(', ')}]`,
    );
  }
  return { tensor: t, axisStride: d[1] * length, batchStride: d[1] === 1 ? 0 : length };
}

function prepare(x: TensorLike, options: RotaryEmbeddingOptions | undefined) {
  checkOptions(options, OPTIONS, 'rotaryEmbedding');
  const o = options ?? {};
  const input = asTensor(x, 'x', FLOAT_TYPES, 4, 'device');
  const [batch, length, heads, dim] = input.dims;
  if (dim < 2 || dim > MAX_HEAD_DIM) {
    throw new HeddleError('ERR_SHAPE', `x: the head dim must be 2 to ${MAX_HEAD_DIM}, got ${dim}`);
  }
  const layout = layoutOf(dim, o);
  const offset = optionInteger(o.offset ?? 0, -(2 ** 31), 2 ** 31 - 1, 'offset');
  if (o.positions === undefined && layout.axes > 1) {
    throw new HeddleError('ERR_OPTION', `positions are required for ${layout.axes} axes`);
  }
  if (o.positions !== undefined && o.offset !== undefined) {
    throw new HeddleError('ERR_OPTION', 'offset and positions exclude each other');
  }
  const positions = o.positions === undefined ? null : positionsOf(o.positions, layout.axes, batch, length);
  const ids = positions?.tensor ?? null;
  const place = placeOf('rotaryEmbedding', options, {
    x: input,
    // Positions on the CPU are copied to the device.
    positions: ids !== null && isOnDevice(ids) ? ids : null,
    out: o.out instanceof Tensor ? o.out : null,
  });
  let out: Tensor<FloatType>;
  if (o.out === undefined) {
    out = makeTensor(input.type, allocateAt(place, input.type, input.data.length), input.dims);
  } else {
    out = asTensor(o.out, 'out', [input.type], undefined, place === 'cuda' ? 'device' : undefined);
    checkOut(out, input.dims, [input, ids], 'out');
  }
  const args = [
    input.data,
    DTYPE_CODE[input.type],
    batch,
    length,
    heads,
    dim,
    ids?.data ?? null,
    positions?.axisStride ?? 0,
    positions?.batchStride ?? 0,
    offset,
    layout.frequency,
    layout.axis,
    layout.frequency.length,
    layout.angle,
    layout.partner,
    layout.factor,
    out.data,
  ];
  return { args, out };
}

/**
 * Rotary position embedding of q or k: each pair of elements is turned by position times frequency.
 *
 * Covers Llama (default), GPT-J (`interleaved`), partial rotation (`rotaryDim`), linear, NTK, YaRN and Llama-3 scaling,
 * Qwen2-VL's `sections` and V-JEPA 2 (`{ axes: 3, interleaved: true, tiledAngles: true }`). Angles are formed in
 * float64, so that positions of millions keep their accuracy.
 *
 * @param x `[batch, sequence, heads, dim]` float32, bfloat16 or float16, dim 2 to 512
 * @returns a tensor of the same type and dims, on the device when x is; positions may be there or not
 * @throws HeddleError `ERR_ARGUMENT`, `ERR_SHAPE`, `ERR_DTYPE`, `ERR_OPTION`, `ERR_BACKEND`, `ERR_ABORTED`
 */
export async function rotaryEmbedding(
  x: TensorLike,
  options?: RotaryEmbeddingOptions & AsyncOpOptions,
): Promise<Tensor<FloatType>> {
  const { args, out } = prepare(x, options);
  await call(op, args, options);
  return out;
}

/** {@link rotaryEmbedding} on the calling thread (and helpers, when `threads` > 1). */
export function rotaryEmbeddingSync(
  x: TensorLike,
  options?: RotaryEmbeddingOptions & OpOptions,
): Tensor<FloatType> {
  const { args, out } = prepare(x, options);
  callSync(op, args, options);
  return out;
}
