import { backendOf, resolveBackend } from '../backend.ts';
import { placeOf } from '../device.ts';
import { DTYPE_CODE, FLOAT_TYPES, type FloatType } from '../dtype.ts';
import { HeddleError } from '../errors.ts';
import type { DeviceWeights } from '../gemm/deviceWeights.ts';
import { outputTensor, weightOptions } from '../gemm/linear.ts';
import {
  type AsyncOpOptions,
  call,
  callSync,
  checkOptions,
  nativeOnly,
  type Op,
  type OpOptions,
} from '../op.ts';
import type { Activation } from '../reference/gemm/activation.ts';
import type { WeightType } from '../reference/gemm/quantize.ts';
import { expertsForwardReference } from '../reference/moe/expertsForward.ts';
import { asTensor, Tensor, type TensorLike } from '../tensor.ts';
import type { ExpertData } from './expertReader.ts';
import {
  biasLists,
  type ExpertSources,
  type ExpertSourceType,
  type Layout,
  layoutOf,
} from './expertSources.ts';
import { packOpOf, scaleLists } from './expertWeights.ts';
import { ExpertWeights, type PackExpertsOptions } from './packedExperts.ts';
import type { Routing } from './routeTopK.ts';
import { checkRouting, routeIdError } from './routing.ts';

export type { ExpertBiases, ExpertSources, Stacked } from './expertSources.ts';
export { ExpertWeights, type PackExpertsOptions } from './packedExperts.ts';
export type { Activation };

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

function preparePack(sources: ExpertSources, options: (PackExpertsOptions & OpOptions) | undefined) {
  const o = options ?? {};
  checkOptions(o, PACK_OPTIONS, 'packExperts');
  const l = layoutOf(sources);
  const { hidden, intermediate } = l.shape;
  if (hidden === 0 || intermediate === 0)
    throw new HeddleError('ERR_SHAPE', `experts of size ${hidden} x ${intermediate} have no weights`);
  const [type, group] = expertWeightOptions(o, l.source, hidden, intermediate);
  // For the device they are packed on the host, and copied there.
  const toDevice = backendOf(resolveBackend(o.backend)) === 'cuda';
  const weights = new ExpertWeights(l.shape, o, type, group, toDevice ? 'cpu' : o.backend);
  return { weights, toDevice, ...packCall(weights, l, o, sources, 0) };
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
  o: Pick<PackExpertsOptions, 'biases' | 'scales'>,
  sources: ExpertSources,
  first: number,
): { op: Op; args: unknown[] } {
  const { type, groupSize: group } = weights;
  const biases = biasLists(o.biases, l.shape, sources.interleaved === true);
  const { symmetric, search, meanSquares } = weights.rounding;
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
  { sources, biases, scales }: Pick<ExpertData, 'sources' | 'biases' | 'scales'>,
): { op: Op; args: unknown[] } {
  return packCall(weights, layoutOf(sources), { biases, scales }, sources, first);
}

/**
 * Packs the experts of a layer once for many forwards. The sources are not kept. With `backend: 'cuda'` they are packed on
 * the host and copied to the device, as `weights.to('cuda')` does.
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
  const { weights, toDevice, args, op } = preparePack(sources, options);
  await call(op, args, { ...options, backend: weights.backend });
  weights.account();
  if (!toDevice) return weights;
  try {
    return await weights.to('cuda', { threads: options?.threads, signal: options?.signal });
  } finally {
    weights.dispose();
  }
}

/** {@link packExperts} on the calling thread. */
export function packExpertsSync(
  sources: ExpertSources,
  options?: PackExpertsOptions & OpOptions,
): ExpertWeights {
  const { weights, toDevice, args, op } = preparePack(sources, options);
  callSync(op, args, { ...options, backend: weights.backend });
  weights.account();
  if (!toDevice) return weights;
  try {
    return weights.toSync('cuda', { threads: options?.threads });
  } finally {
    weights.dispose();
  }
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
  invalid: (index, args) => routeIdError(index, args[6] as number, args[7] as Int32Array),
};

/** Two arguments for each bank instead of one, and no routes' outputs. */
const deviceForwardOp = nativeOnly('expertsForward', (index, args) =>
  routeIdError(index, args[8] as number, args[9] as Int32Array),
);

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
  const input = asTensor(x, 'x', FLOAT_TYPES, 2, 'device');
  const [tokens, d] = input.dims;
  if (d !== weights.hiddenSize) {
    throw new HeddleError(
      'ERR_SHAPE',
      `x: expected [tokens, ${weights.hiddenSize}], got [${input.dims.join(', ')}]`,
    );
  }
  const { indices, weights: routeWeights, k } = checkRouting(routing, tokens, 'device');
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
    gate = asTensor(options.sharedGate, 'sharedGate', ['float32'], 1, 'device');
    if (gate.dims[0] !== tokens)
      throw new HeddleError('ERR_SHAPE', `sharedGate: expected [${tokens}], got [${gate.dims[0]}]`);
  }
  const place = placeOf('expertsForward', options, {
    x: input,
    'routing.indices': indices,
    'routing.weights': routeWeights,
    sharedGate: gate,
    out: options?.out instanceof Tensor ? options.out : null,
  });
  const bank = weights.use(options?.backend);
  if (place === 'cuda' && weights.backend !== 'cuda') {
    throw new HeddleError(
      'ERR_BACKEND',
      `expertsForward: x is on cuda but weights were packed for backend ${weights.backend}; use await weights.to('cuda')`,
    );
  }
  const sharedBank = shared === undefined ? null : shared.use(weights.backend);
  const out = outputTensor(
    options?.out,
    options?.outType,
    [tokens, d],
    [input, indices, routeWeights],
    place,
  );
  const rest = [
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
  if (weights.backend === 'cuda') {
    const parts = (b: object | null) => {
      const { data, numbers } = (b ?? { data: null, numbers: null }) as DeviceWeights;
      return [data, numbers];
    };
    return { op: deviceForwardOp, out, args: [...parts(bank), ...parts(sharedBank), ...rest] };
  }
  const args = [bank, sharedBank, ...rest];
  return { op: forwardOp, out, args };
}

/**
 * Runs tokens through their experts: dispatch, gate and up with the activation, down, weighted combine, shared
 * experts. Fixed orders of summation make a token's result bitwise the same alone, in any batch, in any order of the
 * batch, on any threads. Integer weight types quantise activations to int8 (see native/moe/experts.h).
 *
 * With weights on backend cuda the tensors may all be on the device, and so is then the result.
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
  const { op, out, args } = prepareForward(x, routing, weights, options);
  await call(op, args, { ...options, backend: weights.backend });
  return out;
}

/** {@link expertsForward} on the calling thread. */
export function expertsForwardSync(
  x: TensorLike,
  routing: Routing,
  weights: ExpertWeights,
  options?: ExpertsForwardOptions & OpOptions,
): Tensor<FloatType> {
  const { op, out, args } = prepareForward(x, routing, weights, options);
  callSync(op, args, { ...options, backend: weights.backend });
  return out;
}
