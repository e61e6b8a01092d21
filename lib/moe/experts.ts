import type { Addon } from '../backend.ts';
import { DTYPE_CODE, type FloatType } from '../dtype.ts';
import { HeddleError } from '../errors.ts';
import { FLOAT_TYPES, outputTensor, WEIGHT_CODE, weightOptions } from '../gemm/linear.ts';
import { checkMxfp4, isMxfp4, type Mxfp4Blocks } from '../gemm/mxfp4.ts';
import {
  meanSquareOf,
  type RoundingOptions,
  roundingOf,
  SOURCE_TYPES,
  type SourceData,
  type SourceType,
} from '../gemm/weights.ts';
import { Handle } from '../handle.ts';
import {
  type AsyncOpOptions,
  call,
  callSync,
  checkOptions,
  type Op,
  type OpOptions,
  optionChoice,
  optionNumber,
} from '../op.ts';
import { ACTIVATIONS, type Activation } from '../reference/gemm/activation.ts';
import type { WeightType } from '../reference/gemm/quantize.ts';
import { expertsForwardReference, type ReferenceBank } from '../reference/moe/expertsForward.ts';
import { asTensor, type Tensor, type TensorLike } from '../tensor.ts';
import { type ExpertScales, packOpOf, scaleLists } from './expertWeights.ts';
import type { Routing } from './routeTopK.ts';

export type { Activation };

/**
 * One matrix per expert: a list of `[out, in]` tensors, one tensor `[experts, out, in]`, or MXFP4 blocks of gpt-oss
 * `[experts, out, in / 32, 16]` with their scales.
 */
export type Stacked = TensorLike | readonly TensorLike[] | Mxfp4Blocks;

/**
 * Expert weights as checkpoints store them. f = intermediate size, d = hidden size. With `layout: 'in-out'` every
 * matrix is transposed (gpt-oss: gateUp `[experts, d, 2f]`, down `[experts, f, d]`).
 */
export interface ExpertSources {
  /** `[experts, f, d]`; leave out for ungated layers. */
  gate?: Stacked;
  /** `[experts, f, d]` */
  up?: Stacked;
  /** `[experts, 2f, d]` instead of gate and up: gate rows, then up rows. */
  gateUp?: Stacked;
  /** gateUp alternates gate and up (g0, u0, g1, u1 …), as gpt-oss. Default false. */
  interleaved?: boolean;
  /** `[experts, d, f]` */
  down: Stacked;
  layout?: 'out-in' | 'in-out';
}

/** float32 biases: `[experts, f]`, `[experts, f]` or together `[experts, 2f]`, and `[experts, d]`. */
export interface ExpertBiases {
  gate?: TensorLike;
  up?: TensorLike;
  gateUp?: TensorLike;
  down?: TensorLike;
}

export interface PackExpertsOptions extends RoundingOptions {
  /**
   * How the weights are stored. Default: the sources' type (float16 becomes float32, float8_e4m3 is float8). MXFP4
   * sources packed as `'mxfp4'` keep their bits.
   */
  type?: WeightType;
  /** k values per scale: int4 32, 64 or 128 (default 32), MXFP4 32. Must divide d and f. */
  groupSize?: number;
  /** `'silu'` is SwiGLU, `'gelu'` and `'gelu-tanh'` are GeGLU, `'clamped-swiglu'` is gpt-oss. Default `'silu'`. */
  activation?: Activation;
  /** alpha of clamped SwiGLU. Default 1.702. */
  alpha?: number;
  /** Clamp of clamped SwiGLU. Default 7. */
  limit?: number;
  biases?: ExpertBiases;
  /**
   * int4: mean square of each input seen on calibration data, float32: `hidden` `[d]` of gate and up, `intermediate`
   * `[f]` of down. What an error of a weight is multiplied by in the search. Turns `search` on.
   */
  calibration?: { hidden?: TensorLike | Float32Array; intermediate?: TensorLike | Float32Array };
  /** Sources of type float8_e4m3: factors of their blocks of 128 x 128 (DeepSeek-V3's `weight_scale_inv`). */
  scales?: ExpertScales;
}

/** Packed weights of a layer's experts; made by {@link packExperts}. */
export class ExpertWeights extends Handle<ReferenceBank> {
  readonly experts: number;
  readonly hiddenSize: number;
  readonly intermediateSize: number;
  readonly type: WeightType;
  readonly groupSize: number;
  /** Bytes of native memory. */
  bytes = 0;

  /** @internal */
  constructor(
    shape: BankShape,
    options: PackExpertsOptions,
    type: WeightType,
    group: number,
    backend: OpOptions['backend'],
  ) {
    const activation = optionChoice(options.activation, ACTIVATIONS, 'silu', 'activation');
    const alpha = optionNumber(options.alpha, -Infinity, 1.702, 'alpha');
    const limit = optionNumber(options.limit, 0, 7, 'limit');
    const { experts, hidden, intermediate, gated } = shape;
    super(
      'the expert weights',
      backend,
      (addon) =>
        (addon['createBank'] as unknown as (...args: unknown[]) => object)(
          WEIGHT_CODE[type],
          ACTIVATIONS.indexOf(activation),
          alpha,
          limit,
          gated,
          hidden,
          intermediate,
          experts,
          group,
        ),
      () => ({ activation, alpha, limit, hidden, intermediate, experts: new Array(experts) }),
    );
    this.experts = experts;
    this.hiddenSize = hidden;
    this.intermediateSize = intermediate;
    this.type = type;
    this.groupSize = group;
  }

  /** @internal */
  account(): void {
    if (this.addon === null || this.data === null) return;
    this.bytes = (this.addon['accountBank'] as unknown as (h: object) => number)(this.data);
  }

  /** @internal Bytes that each expert takes once packed; biases are all there or none. */
  expertBytes(biased: boolean): number {
    const { hiddenSize: d, intermediateSize: f } = this;
    if (this.addon === null) return 4 * (3 * d * f + (biased ? 2 * f + d : 0)); // rows of float32
    return (this.addon['expertBytes'] as unknown as (h: object, b: boolean) => number)(
      this.use(undefined),
      biased,
    );
  }

  /** @internal Frees the slot of an expert that no running call uses. */
  evict(expert: number): void {
    const data = this.use(undefined);
    if (this.addon === null) delete (data as ReferenceBank).experts[expert];
    else (this.addon['evictExpert'] as unknown as (h: object, e: number) => void)(data, expert);
  }

  /** @internal Tells the garbage collector how much is packed now. */
  accountAs(bytes: number): void {
    this.bytes = bytes;
    if (this.addon === null) return;
    (this.addon['setBankBytes'] as unknown as (h: object, b: number) => void)(this.use(undefined), bytes);
  }

  protected override release(addon: Addon, data: object): void {
    (addon['releaseBank'] as unknown as (h: object) => void)(data);
  }
}

export interface BankShape {
  experts: number;
  hidden: number;
  intermediate: number;
  gated: boolean;
}

/** @internal */
export type ExpertSourceType = SourceType | 'mxfp4';

interface Matrices {
  type: ExpertSourceType;
  rows: number;
  columns: number;
  data: SourceData[];
  /** e8m0 of MXFP4 sources. */
  exponents?: Uint8Array[];
}

/** Splits a stacked tensor or checks a list: the same type and `[rows, columns]` for each expert. */
function matricesOf(value: Stacked, name: string): Matrices {
  if (isMxfp4(value)) {
    const m = checkMxfp4(value, name, 3);
    const [experts, rows, columns] = m.dims;
    if (experts === 0) throw new HeddleError('ERR_SHAPE', `${name}: at least one expert is needed`);
    const part = (data: Uint8Array) => {
      const size = data.length / experts;
      return Array.from({ length: experts }, (_, e) => data.subarray(e * size, (e + 1) * size));
    };
    return { type: 'mxfp4', rows, columns, data: part(m.blocks), exponents: part(m.scales) };
  }
  if (Array.isArray(value)) {
    if (value.length === 0) throw new HeddleError('ERR_SHAPE', `${name}: at least one expert is needed`);
    const tensors = value.map((v, i) => asTensor(v as TensorLike, `${name}[${i}]`, SOURCE_TYPES, 2));
    const [first] = tensors;
    for (const [i, t] of tensors.entries()) {
      if (t.type !== first.type)
        throw new HeddleError('ERR_DTYPE', `${name}[${i}] is ${t.type}, ${name}[0] is ${first.type}`);
      if (t.dims[0] !== first.dims[0] || t.dims[1] !== first.dims[1]) {
        throw new HeddleError(
          'ERR_SHAPE',
          `${name}[${i}]: expected [${first.dims.join(', ')}] as ${name}[0], got [${t.dims.join(', ')}]`,
        );
      }
    }
    return {
      type: first.type,
      rows: first.dims[0],
      columns: first.dims[1],
      data: tensors.map((t) => t.data),
    };
  }
  const t = asTensor(value as TensorLike, name, SOURCE_TYPES, 3);
  const [experts, rows, columns] = t.dims;
  if (experts === 0) throw new HeddleError('ERR_SHAPE', `${name}: at least one expert is needed`);
  const size = rows * columns;
  const data = Array.from({ length: experts }, (_, e) => t.data.subarray(e * size, (e + 1) * size));
  return { type: t.type, rows, columns, data };
}

function biasesOf(
  value: TensorLike | undefined,
  name: string,
  experts: number,
  width: number,
): Float32Array[] | null {
  if (value === undefined) return null;
  const t = asTensor(value, name, ['float32'], 2);
  if (t.dims[0] !== experts || t.dims[1] !== width) {
    throw new HeddleError(
      'ERR_SHAPE',
      `${name}: expected [${experts}, ${width}], got [${t.dims.join(', ')}]`,
    );
  }
  return Array.from({ length: experts }, (_, e) => t.data.subarray(e * width, (e + 1) * width));
}

/** Everything the boundary needs: pointers per expert and shared strides (native/binding/experts.cpp). */
export interface Layout {
  shape: BankShape;
  source: ExpertSourceType;
  gate: SourceData[] | null;
  up: SourceData[];
  upStrides: [n: number, k: number];
  down: SourceData[];
  downStrides: [n: number, k: number];
  /** MXFP4: exponents of gate, up and down; their row stride is a 16th of the blocks' (16 bytes a block). */
  exponents: [Uint8Array[] | null, Uint8Array[] | null, Uint8Array[] | null];
}

/** @internal */
export function layoutOf(s: ExpertSources): Layout {
  if (s === null || typeof s !== 'object')
    throw new HeddleError('ERR_ARGUMENT', 'sources: expected { gate, up, down } or { gateUp, down }');
  checkOptions(s, SOURCE_KEYS, 'sources');
  if (s.down === undefined) throw new HeddleError('ERR_ARGUMENT', 'down: required');
  const transposed = optionChoice(s.layout, ['out-in', 'in-out'] as const, 'out-in', 'layout') === 'in-out';
  const down = matricesOf(s.down, 'down');
  const experts = down.data.length;
  const [hidden, intermediate] = transposed ? [down.columns, down.rows] : [down.rows, down.columns];
  const check = (m: Matrices, name: string, width: number) => {
    const [rows, columns] = transposed ? [hidden, width] : [width, hidden];
    if (m.data.length !== experts) {
      throw new HeddleError(
        'ERR_SHAPE',
        `${name}: expected ${experts} experts as down, got ${m.data.length}`,
      );
    }
    if (m.rows !== rows || m.columns !== columns) {
      throw new HeddleError(
        'ERR_SHAPE',
        `${name}: expected [${rows}, ${columns}] to fit down [${down.rows}, ${down.columns}], got [${m.rows}, ${m.columns}]`,
      );
    }
    if (m.type !== down.type)
      throw new HeddleError('ERR_DTYPE', `${name} is ${m.type}, down is ${down.type}`);
    return m;
  };
  const mxfp4 = down.type === 'mxfp4';
  if (mxfp4 && transposed)
    throw new HeddleError('ERR_OPTION', "layout: MXFP4 blocks are 'out-in', got 'in-out'");
  const perElement = mxfp4 ? 2 : 1; // strides count array elements, and a byte of blocks holds two values
  const strides = (width: number): [number, number] => (transposed ? [1, width] : [hidden / perElement, 1]);
  const downStrides: [number, number] = transposed ? [1, hidden] : [intermediate / perElement, 1];
  const common = { source: down.type, down: down.data, downStrides };
  if (s.gateUp !== undefined) {
    if (s.gate !== undefined || s.up !== undefined) {
      throw new HeddleError('ERR_ARGUMENT', 'give either gateUp or gate and up, not both');
    }
    const both = check(matricesOf(s.gateUp, 'gateUp'), 'gateUp', 2 * intermediate);
    const [n, k] = strides(2 * intermediate);
    const offset = s.interleaved ? n : n * intermediate;
    return {
      ...common,
      shape: { experts, hidden, intermediate, gated: true },
      gate: both.data,
      up: both.data.map((m) => m.subarray(offset)),
      upStrides: [s.interleaved ? 2 * n : n, k],
      exponents: both.exponents
        ? [both.exponents, both.exponents.map((m) => m.subarray(offset / 16)), down.exponents ?? null]
        : NO_EXPONENTS,
    };
  }
  if (s.up === undefined) throw new HeddleError('ERR_ARGUMENT', 'up: required (or gateUp)');
  if (s.interleaved) throw new HeddleError('ERR_OPTION', 'interleaved needs gateUp');
  const up = check(matricesOf(s.up, 'up'), 'up', intermediate);
  const gate = s.gate === undefined ? null : check(matricesOf(s.gate, 'gate'), 'gate', intermediate);
  return {
    ...common,
    shape: { experts, hidden, intermediate, gated: gate !== null },
    gate: gate?.data ?? null,
    up: up.data,
    upStrides: strides(intermediate),
    exponents: up.exponents ? [gate?.exponents ?? null, up.exponents, down.exponents ?? null] : NO_EXPONENTS,
  };
}

const NO_EXPONENTS: Layout['exponents'] = [null, null, null];
const SOURCE_KEYS: ReadonlySet<string> = new Set(['gate', 'up', 'gateUp', 'interleaved', 'down', 'layout']);
const PACK_OPTIONS: ReadonlySet<string> = new Set([
  'type',
  'groupSize',
  'activation',
  'alpha',
  'limit',
  'biases',
  'symmetric',
  'search',
  'calibration',
  'scales',
  'backend',
  'threads',
  'signal',
]);
const CALIBRATION_KEYS: ReadonlySet<string> = new Set(['hidden', 'intermediate']);
const BIAS_KEYS: ReadonlySet<string> = new Set(['gate', 'up', 'gateUp', 'down']);

export type Biases = [Float32Array[] | null, Float32Array[] | null, Float32Array[] | null];

/** @internal */
export function biasLists(b: ExpertBiases | undefined, shape: BankShape, interleaved: boolean): Biases {
  if (b === undefined) return [null, null, null];
  checkOptions(b, BIAS_KEYS, 'biases');
  const { experts, hidden, intermediate } = shape;
  const down = biasesOf(b.down, 'biases.down', experts, hidden);
  if (b.gateUp !== undefined) {
    const both = biasesOf(b.gateUp, 'biases.gateUp', experts, 2 * intermediate) as Float32Array[];
    const part = (first: number) =>
      both.map((row) =>
        interleaved
          ? Float32Array.from({ length: intermediate }, (_, i) => row[2 * i + first])
          : row.subarray(first * intermediate, (first + 1) * intermediate),
      );
    return [part(0), part(1), down];
  }
  const gate = biasesOf(b.gate, 'biases.gate', experts, intermediate);
  const up = biasesOf(b.up, 'biases.up', experts, intermediate);
  if (shape.gated && (gate === null) !== (up === null)) {
    throw new HeddleError('ERR_ARGUMENT', 'biases: give gate and up together');
  }
  return [gate, up, down];
}

function preparePack(sources: ExpertSources, options: (PackExpertsOptions & OpOptions) | undefined) {
  const o = options ?? {};
  checkOptions(o, PACK_OPTIONS, 'packExperts');
  const l = layoutOf(sources);
  const { hidden, intermediate } = l.shape;
  if (hidden === 0 || intermediate === 0)
    throw new HeddleError('ERR_SHAPE', `experts of size ${hidden} x ${intermediate} have no weights`);
  const [type, group] = expertWeightOptions(o, l.source, hidden, intermediate);
  const weights = new ExpertWeights(l.shape, o, type, group, o.backend);
  return { weights, ...packCall(weights, l, o, sources, 0) };
}

/** @internal Type and group of packed experts; MXFP4 sources stay MXFP4 unless told otherwise. */
export function expertWeightOptions(
  o: Pick<PackExpertsOptions, 'type' | 'groupSize'>,
  source: ExpertSourceType,
  hidden: number,
  intermediate: number,
): [WeightType, number] {
  const [type, float] = source === 'mxfp4' ? [o.type ?? source, 'float32' as const] : [o.type, source];
  return weightOptions(type, o.groupSize, float, [hidden, intermediate]);
}

function packCall(
  weights: ExpertWeights,
  l: Layout,
  o: Pick<PackExpertsOptions, 'biases' | 'calibration' | 'symmetric' | 'search' | 'scales'>,
  sources: ExpertSources,
  first: number,
): { op: Op; args: unknown[] } {
  const { type, groupSize: group } = weights;
  const { hidden, intermediate } = l.shape;
  const biases = biasLists(o.biases, l.shape, sources.interleaved === true);
  checkOptions(o.calibration, CALIBRATION_KEYS, 'calibration');
  const meanSquares = [
    meanSquareOf(o.calibration?.hidden, hidden, 'calibration.hidden'),
    meanSquareOf(o.calibration?.intermediate, intermediate, 'calibration.intermediate'),
  ];
  const calibrated = meanSquares.some((m) => m !== null);
  const { symmetric, search } = roundingOf(o, type, calibrated);
  const scales = scaleLists(o.scales, sources, l);
  const args = [
    weights.use(undefined),
    group,
    DTYPE_CODE[l.source === 'mxfp4' ? 'uint8' : l.source],
    l.gate,
    l.up,
    ...l.upStrides,
    l.down,
    ...l.downStrides,
    ...biases,
    symmetric,
    search,
    ...meanSquares,
    scales.gate,
    scales.up,
    scales.upRow0,
    scales.down,
    ...l.exponents,
    first,
  ];
  return { op: packOpOf(l, biases, scales, type, first), args };
}

/** @internal The pack op's call for experts that go to slots `first` … of a bank that no forward reads there. */
export function preparePackInto(
  weights: ExpertWeights,
  first: number,
  sources: ExpertSources,
  biases: ExpertBiases | undefined,
): { op: Op; args: unknown[] } {
  return packCall(weights, layoutOf(sources), { biases }, sources, first);
}

/**
 * Packs the experts of a layer once for many forwards. The sources are not kept.
 *
 * @param sources weights as the checkpoint stores them, float32, bfloat16, float16 or float8_e4m3
 * @throws HeddleError `ERR_SHAPE` when expert shapes do not fit each other, `ERR_DTYPE`, `ERR_OPTION` (for example
 *   a group size that does not divide), `ERR_VALUE` for a weight that is NaN or infinite where the packed type cannot
 *   hold it, `ERR_ARGUMENT`, `ERR_MEMORY`, `ERR_ABORTED`
 */
export async function packExperts(
  sources: ExpertSources,
  options?: PackExpertsOptions & AsyncOpOptions,
): Promise<ExpertWeights> {
  const { weights, args, op } = preparePack(sources, options);
  await call(op, args, { ...options, backend: weights.backend });
  weights.account();
  return weights;
}

/** {@link packExperts} on the calling thread. */
export function packExpertsSync(
  sources: ExpertSources,
  options?: PackExpertsOptions & OpOptions,
): ExpertWeights {
  const { weights, args, op } = preparePack(sources, options);
  callSync(op, args, { ...options, backend: weights.backend });
  weights.account();
  return weights;
}

export interface ExpertsForwardOptions {
  /** Shared experts (packed as one expert): added for every token. */
  shared?: ExpertWeights;
  /** float32 `[tokens]`: multiplies the shared experts' output (Qwen2-MoE). Default 1. */
  sharedGate?: TensorLike;
  /** Type of the result. Default float32. */
  outType?: FloatType;
  out?: Tensor;
}

const FORWARD_OPTIONS: ReadonlySet<string> = new Set([
  'shared',
  'sharedGate',
  'outType',
  'out',
  'backend',
  'threads',
  'signal',
]);

/** @internal */
export const forwardOp: Op = {
  name: 'expertsForward',
  reference: expertsForwardReference,
  invalid: (index, args) => {
    const k = args[6] as number;
    const ids = args[7] as Int32Array;
    return new HeddleError(
      'ERR_VALUE',
      `routing.indices[${Math.floor(index / k)}, ${index % k}] is ${ids[index]}: expected -1 or the id of an expert`,
    );
  },
};

/** @internal Checks a forward's arguments; the op's last argument, the routes' outputs, is left out. */
export function prepareForward(
  x: TensorLike,
  routing: Routing,
  weights: ExpertWeights,
  options: (ExpertsForwardOptions & OpOptions) | undefined,
) {
  checkOptions(options, FORWARD_OPTIONS, 'expertsForward');
  if (!(weights instanceof ExpertWeights))
    throw new HeddleError('ERR_ARGUMENT', 'weights: expected ExpertWeights from packExperts');
  const input = asTensor(x, 'x', FLOAT_TYPES, 2);
  const [tokens, d] = input.dims;
  if (d !== weights.hiddenSize) {
    throw new HeddleError(
      'ERR_SHAPE',
      `x: expected [tokens, ${weights.hiddenSize}], got [${input.dims.join(', ')}]`,
    );
  }
  if (routing === null || typeof routing !== 'object')
    throw new HeddleError('ERR_ARGUMENT', 'routing: expected { indices, weights }');
  const indices = asTensor(routing.indices, 'routing.indices', ['int32'], 2);
  const routeWeights = asTensor(routing.weights, 'routing.weights', ['float32'], 2);
  const k = indices.dims[1];
  for (const [t, name] of [
    [indices, 'routing.indices'],
    [routeWeights, 'routing.weights'],
  ] as const) {
    if (t.dims[0] !== tokens || t.dims[1] !== k) {
      throw new HeddleError('ERR_SHAPE', `${name}: expected [${tokens}, ${k}], got [${t.dims.join(', ')}]`);
    }
  }
  const shared = options?.shared;
  if (shared !== undefined) {
    if (!(shared instanceof ExpertWeights))
      throw new HeddleError('ERR_ARGUMENT', 'shared: expected ExpertWeights from packExperts');
    if (shared.experts !== 1 || shared.hiddenSize !== d) {
      throw new HeddleError(
        'ERR_SHAPE',
        `shared: expected 1 expert of hidden size ${d}, got ${shared.experts} of ${shared.hiddenSize}`,
      );
    }
  }
  let gate: Tensor<'float32'> | null = null;
  if (options?.sharedGate !== undefined) {
    if (shared === undefined) throw new HeddleError('ERR_OPTION', 'sharedGate needs shared');
    gate = asTensor(options.sharedGate, 'sharedGate', ['float32'], 1);
    if (gate.dims[0] !== tokens)
      throw new HeddleError('ERR_SHAPE', `sharedGate: expected [${tokens}], got [${gate.dims[0]}]`);
  }
  const out = outputTensor(options?.out, options?.outType, [tokens, d], [input, indices, routeWeights]);
  const args = [
    weights.use(options?.backend),
    shared === undefined ? null : shared.use(weights.backend),
    gate === null ? null : gate.data,
    input.data,
    DTYPE_CODE[input.type],
    tokens,
    k,
    indices.data,
    routeWeights.data,
    out.data,
    DTYPE_CODE[out.type],
  ];
  return { out, args };
}

/**
 * Runs tokens through their experts: dispatch, gate and up with the activation, down, weighted combine, shared
 * experts. Fixed orders of summation make a token's result bitwise the same alone, in any batch, in any order of the
 * batch, on any threads. Integer weight types quantise activations to int8 (see native/moe/experts.h).
 *
 * @param x `[tokens, hidden]` float32, bfloat16 or float16
 * @param routing indices int32 and weights float32 `[tokens, k]`, as `routeTopK` returns; an id of -1 contributes 0
 * @returns `[tokens, hidden]`
 * @throws HeddleError `ERR_SHAPE`, `ERR_DTYPE`, `ERR_VALUE` (id out of range), `ERR_DISPOSED`, `ERR_BACKEND`,
 *   `ERR_MEMORY`, `ERR_ABORTED`
 */
export async function expertsForward(
  x: TensorLike,
  routing: Routing,
  weights: ExpertWeights,
  options?: ExpertsForwardOptions & AsyncOpOptions,
): Promise<Tensor<FloatType>> {
  const { out, args } = prepareForward(x, routing, weights, options);
  await call(forwardOp, args, { ...options, backend: weights.backend });
  return out;
}

/** {@link expertsForward} on the calling thread. */
export function expertsForwardSync(
  x: TensorLike,
  routing: Routing,
  weights: ExpertWeights,
  options?: ExpertsForwardOptions & OpOptions,
): Tensor<FloatType> {
  const { out, args } = prepareForward(x, routing, weights, options);
  callSync(forwardOp, args, { ...options, backend: weights.backend });
  return out;
}
