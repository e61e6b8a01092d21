import { runAsync, runSync, type Steps, step } from '../checkpoint/steps.ts';
import { encodeFloats, FLOAT_TYPES, type FloatType } from '../dtype.ts';
import { HeddleError } from '../errors.ts';
import { linear, linearSync, PackedMatrix } from '../gemm/linear.ts';
import { meanTokens, meanTokensSync } from '../nn/meanTokens.ts';
import {
  type AsyncOpOptions,
  checkOptions,
  checkOut,
  type OpOptions,
  optionChoice,
  optionInteger,
  optionNumber,
} from '../op.ts';
import { allocate, asTensor, makeTensor, type Tensor, type TensorLike } from '../tensor.ts';
import { attention, attentionSync } from './attention.ts';

/** The mean over all tokens. */
export interface MeanPooling {
  kind: 'mean';
}

/** One token: the class token of ViViT and TimeSformer. */
export interface ClassPooling {
  kind: 'class';
  /** Default 0. */
  index?: number;
}

/**
 * Learned queries attend over the tokens (VideoPrism's and CoCa's attentional pooling):
 * `(softmax((query Wqᵀ + bq) s (x Wkᵀ + bk)ᵀ) (x Wvᵀ + bv)) Woᵀ + bo`.
 */
export interface AttentionPooling {
  kind: 'attention';
  /** `[queries, width]`, float32. */
  query: TensorLike;
  heads: number;
  /** Packed `[heads * dim, width]`, all three; `outputWeight` is `[outputs, heads * dim]`. */
  queryWeight: PackedMatrix;
  keyWeight: PackedMatrix;
  valueWeight: PackedMatrix;
  outputWeight: PackedMatrix;
  /** float32, one element per output of the matrix. */
  queryBias?: TensorLike;
  keyBias?: TensorLike;
  valueBias?: TensorLike;
  outputBias?: TensorLike;
  /** Factor s of the logits. Default 1 / sqrt(dim). */
  scale?: number;
  /** p of a factor softplus(p) / softplus(0) on each element of q, float32 `[dim]` (VideoPrism, AQT). Default: none. */
  perDimScale?: TensorLike;
}

export type PoolTokensOptions = (MeanPooling | ClassPooling | AttentionPooling) & {
  /** `[batch, width]`, or `[batch, queries, outputs]` for attention, of the type of x. */
  out?: TensorLike;
};

const COMMON = ['kind', 'out', 'backend', 'threads', 'signal'];
const ATTENTION = [
  'query',
  'heads',
  'queryWeight',
  'keyWeight',
  'valueWeight',
  'outputWeight',
  'queryBias',
  'keyBias',
  'valueBias',
  'outputBias',
  'scale',
  'perDimScale',
];
const OPTIONS = {
  mean: new Set(COMMON),
  class: new Set([...COMMON, 'index']),
  attention: new Set([...COMMON, ...ATTENTION]),
} as const;
const KINDS = ['mean', 'class', 'attention'] as const;

const softplus = (p: number) => Math.max(p, 0) + Math.log1p(Math.exp(-Math.abs(p)));

function classToken(x: Tensor<FloatType>, index: number | undefined, given: TensorLike | undefined) {
  const [batch, tokens, width] = x.dims;
  const at = index ?? 0;
  if (!Number.isInteger(at) || at < 0 || at >= tokens) {
    throw new HeddleError(
      'ERR_OPTION',
      `index must be an integer from 0 to ${tokens - 1}, got ${String(at)}`,
    );
  }
  const out =
    given === undefined
      ? makeTensor(x.type, allocate(x.type, batch * width), [batch, width])
      : asTensor(given, 'out', [x.type]);
  checkOut(out, [batch, width], [x], 'out');
  for (let b = 0; b < batch; b++) {
    const from = (b * tokens + at) * width;
    out.data.set(x.data.subarray(from, from + width), b * width);
  }
  return out;
}

function checkMatrix(value: unknown, outputs: number | null, inputs: number, name: string): PackedMatrix {
  if (!(value instanceof PackedMatrix)) {
    throw new HeddleError('ERR_ARGUMENT', `${name}: expected a PackedMatrix`);
  }
  if (value.inputs !== inputs || (outputs !== null && value.outputs !== outputs)) {
    throw new HeddleError(
      'ERR_SHAPE',
      `${name}: expected [${outputs ?? 'outputs'}, ${inputs}], got [${value.outputs}, ${value.inputs}]`,
    );
  }
  return value;
}

/** The factor on each element of q: scale, times the learned factor of its dim. */
function factorsOf(o: AttentionPooling, dim: number): Float64Array {
  const scale = optionNumber(o.scale, -Infinity, dim ** -0.5, 'scale');
  const factors = new Float64Array(dim).fill(scale);
  if (o.perDimScale === undefined) return factors;
  const p = asTensor(o.perDimScale, 'perDimScale', ['float32']);
  if (p.dims.length !== 1 || p.dims[0] !== dim) {
    throw new HeddleError('ERR_SHAPE', `perDimScale: expected [${dim}], got [${p.dims.join(', ')}]`);
  }
  return factors.map((f, i) => (f * softplus(p.data[i])) / Math.LN2);
}

function* attend(
  x: Tensor<FloatType>,
  o: AttentionPooling & { out?: TensorLike },
  options: AsyncOpOptions,
): Steps<Tensor<FloatType>> {
  const [batch, tokens, width] = x.dims;
  const query = asTensor(o.query, 'query', ['float32'], 2);
  const queries = query.dims[0];
  if (query.dims[1] !== width) {
    throw new HeddleError('ERR_SHAPE', `query: expected [queries, ${width}], got [${query.dims.join(', ')}]`);
  }
  const heads = optionInteger(o.heads, 1, 2 ** 20, 'heads');
  const queryWeight = checkMatrix(o.queryWeight, null, width, 'queryWeight');
  const inner = queryWeight.outputs;
  if (inner % heads !== 0) {
    throw new HeddleError(
      'ERR_OPTION',
      `heads: ${heads} does not divide the ${inner} outputs of queryWeight`,
    );
  }
  const dim = inner / heads;
  const keyWeight = checkMatrix(o.keyWeight, inner, width, 'keyWeight');
  const valueWeight = checkMatrix(o.valueWeight, inner, width, 'valueWeight');
  const outputWeight = checkMatrix(o.outputWeight, null, inner, 'outputWeight');
  const factors = factorsOf(o, dim);
  const run = { ...options, backend: queryWeight.backend };
  const product = (
    t: Tensor,
    w: PackedMatrix,
    bias: TensorLike | undefined,
    outType: FloatType,
    out?: TensorLike,
  ) => {
    const all = { ...run, bias, outType, out: out as Tensor | undefined };
    return step(
      () => linearSync(t, w, all),
      () => linear(t, w, all),
    );
  };

  // The query is the same for every sequence: projected once, read by all through a stride of 0.
  const q = yield* product(query, queryWeight, o.queryBias, 'float32');
  const scaled = (q.data as Float32Array).map((value, i) => value * factors[i % dim]);
  const qx = { type: x.type, data: encodeFloats(scaled, x.type), dims: [batch, queries, heads, dim] };
  const k = yield* product(x, keyWeight, o.keyBias, x.type);
  const v = yield* product(x, valueWeight, o.valueBias, x.type);
  const dims = [batch, tokens, heads, dim];
  const core = {
    ...run,
    scale: 1,
    strides: { query: [0, inner, dim, 1] as [number, number, number, number] },
  };
  const attended = yield* step(
    () => attentionSync(qx, k.reshape(dims), v.reshape(dims), core),
    () => attention(qx, k.reshape(dims), v.reshape(dims), core),
  );
  const rows = attended.output.reshape([batch, queries, inner]) as Tensor<FloatType>;
  return yield* product(rows, outputWeight, o.outputBias, x.type, o.out);
}

function* pool(x: TensorLike, options: PoolTokensOptions & AsyncOpOptions): Steps<Tensor<FloatType>> {
  if (options === undefined || options === null || typeof options !== 'object') {
    throw new HeddleError('ERR_ARGUMENT', 'poolTokens: options with a kind are required');
  }
  const kind = optionChoice(options.kind, KINDS, undefined as never, 'kind');
  if (kind === undefined) {
    throw new HeddleError('ERR_OPTION', `kind is required: ${KINDS.join(', ')}`);
  }
  checkOptions(options, OPTIONS[kind], `poolTokens of kind ${kind}`);
  const input = asTensor(x, 'x', FLOAT_TYPES, 3);
  if (input.dims[1] === 0) throw new HeddleError('ERR_SHAPE', 'x: there are no tokens to pool');
  const { backend, threads, signal } = options;
  if (options.kind === 'attention') return yield* attend(input, options, { backend, threads, signal });
  if (options.kind === 'class') return classToken(input, options.index, options.out);
  const run = { backend, threads, signal, out: options.out };
  return yield* step(
    () => meanTokensSync(input, run),
    () => meanTokens(input, run),
  );
}

/**
 * One vector (or a few) for all tokens of a sequence: their mean, the class token, or what learned queries attend to.
 *
 * @param x `[batch, tokens, width]` float32, bfloat16 or float16; at least one token
 * @returns `[batch, width]`, or `[batch, queries, outputs]` for attention, of the type of x
 * @throws HeddleError `ERR_ARGUMENT`, `ERR_SHAPE`, `ERR_DTYPE`, `ERR_OPTION`, `ERR_DISPOSED`, `ERR_MEMORY`,
 *   `ERR_BACKEND`, `ERR_ABORTED`
 */
export async function poolTokens(
  x: TensorLike,
  options: PoolTokensOptions & AsyncOpOptions,
): Promise<Tensor<FloatType>> {
  return runAsync(pool(x, options));
}

/** {@link poolTokens} on the calling thread (and helpers, when `threads` > 1). */
export function poolTokensSync(x: TensorLike, options: PoolTokensOptions & OpOptions): Tensor<FloatType> {
  return runSync(pool(x, options));
}
