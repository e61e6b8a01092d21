import { DTYPE_CODE, FLOAT_TYPES } from '../dtype.ts';
import { HeddleError } from '../errors.ts';
import { WEIGHT_CODE } from '../gemm/linear.ts';
import {
  type AsyncOpOptions,
  call,
  callSync,
  checkOptions,
  checkOut,
  type Op,
  type OpOptions,
  optionChoice,
  optionNumber,
} from '../op.ts';
import { ACTIVATIONS, type Activation } from '../reference/gemm/activation.ts';
import { expertsBackwardReference } from '../reference/moe/expertsBackward.ts';
import { asTensor, type DType, elementCount, Tensor, type TensorLike } from '../tensor.ts';
import { biasLists, type ExpertBiases, type ExpertSources, layoutOf, type Stacked } from './expertSources.ts';
import type { Routing } from './routeTopK.ts';
import { checkRouting, routeIdError } from './routing.ts';

type Float32Tensor = Tensor<'float32'>;

/** Gradient of stacked matrices: a list where the sources were a list, else one tensor. */
export type StackedGradient = Float32Tensor | Float32Tensor[];

/** What {@link expertsBackward} returns: float32 gradients, named and shaped as what was given. */
export interface ExpertGradients {
  /** `[tokens, hidden]` */
  x: Float32Tensor;
  /** Gradient of the routing weights, `[tokens, k]`; 0 for routes of id -1. */
  weights: Float32Tensor;
  gate?: StackedGradient;
  up?: StackedGradient;
  gateUp?: StackedGradient;
  down: StackedGradient;
  /** Present when biases were given, with the same keys. */
  biases?: { gate?: Float32Tensor; up?: Float32Tensor; gateUp?: Float32Tensor; down?: Float32Tensor };
}

export interface ExpertsBackwardOptions {
  /** As given to `packExperts` for the forward. Default `'silu'`. */
  activation?: Activation;
  /** alpha of clamped SwiGLU. Default 1.702. */
  alpha?: number;
  /** Clamp of clamped SwiGLU. Default 7. */
  limit?: number;
  biases?: ExpertBiases;
  /** Type that the forward's weights were packed to. Default: the sources' type (float16 becomes float32). */
  type?: 'float32' | 'bfloat16';
  /** Gradients of an earlier call on the same shapes, overwritten. */
  out?: ExpertGradients;
}

const OPTIONS: ReadonlySet<string> = new Set([
  'activation',
  'alpha',
  'limit',
  'biases',
  'type',
  'out',
  'backend',
  'threads',
  'signal',
]);

const backwardOp: Op = {
  name: 'expertsBackward',
  reference: expertsBackwardReference,
  invalid: (index, args) => routeIdError(index, args[5] as number, args[6] as Int32Array),
};

/** Hands out the gradients: fresh ones, or those of `out` after checking them. */
class Outputs {
  private readonly taken: Tensor<DType>[];
  private readonly given: ExpertGradients | undefined;

  constructor(given: ExpertGradients | undefined, inputs: readonly Tensor<DType>[]) {
    if (given !== undefined && (given === null || typeof given !== 'object'))
      throw new HeddleError('ERR_ARGUMENT', 'out: expected the gradients of an earlier call');
    this.given = given;
    this.taken = inputs.slice();
  }

  tensor(given: TensorLike | undefined, dims: readonly number[], name: string): Float32Tensor {
    if (this.given === undefined) return Tensor.zeros('float32', dims);
    const out = asTensor(given as TensorLike, `out.${name}`, ['float32']);
    checkOut(out, dims, this.taken, `out.${name}`);
    this.taken.push(out); // gradients must not overlap each other either
    return out;
  }

  /** The gradient of `source`, and its data per expert. */
  stacked(
    source: Stacked,
    name: 'gate' | 'up' | 'gateUp' | 'down',
  ): { value: StackedGradient; data: Float32Array[] } {
    const given = this.given?.[name];
    if (Array.isArray(source)) {
      const value = source.map((s: TensorLike, i) =>
        this.tensor(Array.isArray(given) ? given[i] : undefined, s.dims, `${name}[${i}]`),
      );
      return { value, data: value.map((t) => t.data) };
    }
    const dims = (source as TensorLike).dims;
    const value = this.tensor(given as TensorLike | undefined, dims, name);
    const size = elementCount(dims.slice(1), name);
    return {
      value,
      data: Array.from({ length: dims[0] }, (_, e) => value.data.subarray(e * size, (e + 1) * size)),
    };
  }
}

/** Rows of a bias gradient, from element `first` of each row. */
function rowsFrom(t: Float32Tensor, first = 0): Float32Array[] {
  const width = t.dims[1];
  return Array.from({ length: t.dims[0] }, (_, e) => t.data.subarray(e * width + first, (e + 1) * width));
}

function checkBiases(b: ExpertBiases | undefined, gated: boolean): void {
  if (b === undefined || b === null || typeof b !== 'object') return;
  if (b.gateUp !== undefined && (b.gate !== undefined || b.up !== undefined))
    throw new HeddleError('ERR_ARGUMENT', 'biases: give either gateUp or gate and up, not both');
  const extra = gated
    ? undefined
    : b.gate !== undefined
      ? 'gate'
      : b.gateUp !== undefined
        ? 'gateUp'
        : undefined;
  if (extra !== undefined)
    throw new HeddleError('ERR_ARGUMENT', `biases.${extra}: the experts have no gate matrix`);
}

function matrix(value: TensorLike, name: string, rows: number, columns: number): Tensor<DType> {
  const t = asTensor(value, name, FLOAT_TYPES, 2);
  if (t.dims[0] !== rows || t.dims[1] !== columns) {
    throw new HeddleError('ERR_SHAPE', `${name}: expected [${rows}, ${columns}], got [${t.dims.join(', ')}]`);
  }
  return t;
}

function prepare(
  gradOutput: TensorLike,
  x: TensorLike,
  routing: Routing,
  sources: ExpertSources,
  options: (ExpertsBackwardOptions & OpOptions) | undefined,
) {
  checkOptions(options, OPTIONS, 'expertsBackward');
  const o = options ?? {};
  const l = layoutOf(sources);
  const source = l.source;
  if (source === 'mxfp4')
    throw new HeddleError('ERR_DTYPE', 'down: MXFP4 blocks have no gradient; those of unpackMxfp4 have');
  if (source === 'float8_e4m3')
    throw new HeddleError('ERR_DTYPE', 'down: float8_e4m3 weights have no gradient; float weights have');
  const { experts, hidden: d, intermediate: f, gated } = l.shape;
  if (d === 0 || f === 0) throw new HeddleError('ERR_SHAPE', `experts of size ${d} x ${f} have no weights`);
  const input = asTensor(x, 'x', FLOAT_TYPES, 2);
  const tokens = input.dims[0];
  if (input.dims[1] !== d)
    throw new HeddleError('ERR_SHAPE', `x: expected [tokens, ${d}], got [${input.dims.join(', ')}]`);
  const dout = matrix(gradOutput, 'gradOutput', tokens, d);
  const { indices, weights, k } = checkRouting(routing, tokens);
  const activation = optionChoice(o.activation, ACTIVATIONS, 'silu', 'activation');
  const alpha = optionNumber(o.alpha, -Infinity, 1.702, 'alpha');
  const limit = optionNumber(o.limit, 0, 7, 'limit');
  const type = optionChoice(
    o.type,
    ['float32', 'bfloat16'] as const,
    source === 'bfloat16' ? 'bfloat16' : 'float32',
    'type',
  );
  checkBiases(o.biases, gated);
  const interleaved = sources.interleaved === true;
  const biases = biasLists(o.biases, l.shape, interleaved);

  const sourceTensors = [sources.gate, sources.up, sources.gateUp, sources.down].flatMap((s) =>
    s === undefined ? [] : ((Array.isArray(s) ? s : [s]) as Tensor<DType>[]),
  );
  const biasTensors = Object.values(o.biases ?? {}).filter((b) => b !== undefined) as Tensor<DType>[];
  const outputs = new Outputs(o.out, [dout, input, indices, weights, ...sourceTensors, ...biasTensors]);
  const result: ExpertGradients = {
    x: outputs.tensor(o.out?.x, [tokens, d], 'x'),
    weights: outputs.tensor(o.out?.weights, [tokens, k], 'weights'),
    down: [],
  };
  let gateData: Float32Array[] | null = null;
  let upData: Float32Array[];
  if (sources.gateUp !== undefined) {
    const both = outputs.stacked(sources.gateUp, 'gateUp');
    result.gateUp = both.value;
    const offset = interleaved ? l.upStrides[0] / 2 : l.upStrides[0] * f;
    gateData = both.data;
    upData = both.data.map((m) => m.subarray(offset));
  } else {
    if (sources.gate !== undefined) {
      const gate = outputs.stacked(sources.gate, 'gate');
      result.gate = gate.value;
      gateData = gate.data;
    }
    const up = outputs.stacked(sources.up as Stacked, 'up');
    result.up = up.value;
    upData = up.data;
  }
  const down = outputs.stacked(sources.down, 'down');
  result.down = down.value;

  let biasGradients: (Float32Array[] | null)[] = [null, null, null];
  let biasStride = 1;
  const b = o.biases;
  if (b !== undefined) {
    const given = o.out?.biases;
    const make = (key: 'gate' | 'up' | 'gateUp' | 'down', width: number) =>
      b[key] === undefined ? undefined : outputs.tensor(given?.[key], [experts, width], `biases.${key}`);
    const gate = make('gate', f);
    const up = make('up', f);
    const gateUp = make('gateUp', 2 * f);
    const downBias = make('down', d);
    result.biases = {
      ...(gate && { gate }),
      ...(up && { up }),
      ...(gateUp && { gateUp }),
      ...(downBias && { down: downBias }),
    };
    if (gateUp !== undefined && interleaved) biasStride = 2;
    biasGradients = [
      gateUp ? rowsFrom(gateUp) : gate ? rowsFrom(gate) : null,
      gateUp ? rowsFrom(gateUp, interleaved ? 1 : f) : up ? rowsFrom(up) : null,
      downBias ? rowsFrom(downBias) : null,
    ];
  }
  const args = [
    dout.data,
    DTYPE_CODE[dout.type],
    input.data,
    DTYPE_CODE[input.type],
    tokens,
    k,
    indices.data,
    weights.data,
    WEIGHT_CODE[type],
    ACTIVATIONS.indexOf(activation),
    alpha,
    limit,
    d,
    f,
    DTYPE_CODE[source],
    l.gate,
    l.up,
    ...l.upStrides,
    l.down,
    ...l.downStrides,
    ...biases,
    result.x.data,
    result.weights.data,
    gateData,
    upData,
    down.data,
    ...biasGradients,
    biasStride,
  ];
  return { result, args };
}

/**
 * Gradients of `expertsForward`: what a training step needs. Gate, up and the activation are recomputed, so nothing
 * has to be kept from the forward. It takes the weights as they were given to `packExperts`, not packed: training
 * changes them at every step, and the products here read them the other way round.
 *
 * Sums over an expert's routes run in ascending order: results are bitwise the same on any threads, and a token's
 * `x` and `weights` gradients do not depend on the batch. Beyond the clamps of clamped SwiGLU the gradient is 0.
 *
 * Shared experts: call again with one slot of id 0 for every token and `sharedGate` (or 1) as routing weights; add the
 * two `x` gradients. The second call's `weights` are then the gradient of `sharedGate`.
 *
 * @param gradOutput `[tokens, hidden]` gradient of the forward's result; float32, bfloat16 or float16
 * @param x `[tokens, hidden]`, as given to the forward
 * @param routing as given to the forward
 * @param sources as given to `packExperts`
 * @returns float32 gradients in the sources' shapes and layout
 * @throws HeddleError `ERR_SHAPE`, `ERR_DTYPE`, `ERR_OPTION` (also for integer weight types), `ERR_ARGUMENT`,
 *   `ERR_VALUE` (id out of range), `ERR_BACKEND`, `ERR_MEMORY`, `ERR_ABORTED`
 */
export async function expertsBackward(
  gradOutput: TensorLike,
  x: TensorLike,
  routing: Routing,
  sources: ExpertSources,
  options?: ExpertsBackwardOptions & AsyncOpOptions,
): Promise<ExpertGradients> {
  const { result, args } = prepare(gradOutput, x, routing, sources, options);
  await call(backwardOp, args, options);
  return result;
}

/** {@link expertsBackward} on the calling thread. */
export function expertsBackwardSync(
  gradOutput: TensorLike,
  x: TensorLike,
  routing: Routing,
  sources: ExpertSources,
  options?: ExpertsBackwardOptions & OpOptions,
): ExpertGradients {
  const { result, args } = prepare(gradOutput, x, routing, sources, options);
  callSync(backwardOp, args, options);
  return result;
}
