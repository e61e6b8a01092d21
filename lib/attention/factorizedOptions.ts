import { isOnDevice, type Location, placeOf } from '../device.ts';
import { DTYPE_CODE, FLOAT_TYPES, type FloatType } from '../dtype.ts';
import { HeddleError } from '../errors.ts';
import { optionChoice, optionNumber } from '../op.ts';
import { asTensor, makeTensor, type Tensor, type TensorLike } from '../tensor.ts';
import { AXIS_CODE, F, type FactorizedArguments } from './factorizedLayout.ts';
import { indexTokens, type KeptTokens, type TokenIndex } from './keptTokens.ts';
import {
  type AttentionOptions,
  asInput,
  checkKeys,
  contiguousStrides,
  EMPTY_ROWS,
  headVector,
  MAX_HEAD_DIM,
  type Strides,
  shapeError,
  windowOf,
} from './options.ts';

/** What a token attends to; see {@link factorizedAttention}. */
export type AttentionAxis = keyof typeof AXIS_CODE;

/** Element strides in the dims of the tensor: `[batch, frame, patch, head, element]`, or of packed tokens. */
export type VideoStrides = readonly number[];

/** A class token beside the patches. */
export interface ClassToken {
  /**
   * TimeSformer's divided attention (Bertasius et al. 2021): over time the class token takes no part; over space it is
   * copied to every frame, attends there with the frame's patches, and its outputs are averaged over the frames.
   */
  mode: 'time-skip-space-mean';
  /** `[batch, 1, heads, dim]`, in q's type. */
  query: TensorLike;
  /** `[batch, 1, key heads, dim]` */
  key: TensorLike;
  /** `[batch, 1, key heads, value dim]` */
  value: TensorLike;
  /** Element strides, as {@link AttentionOptions.strides}; the element stride must be that of q, k or v. */
  strides?: { query?: Strides; key?: Strides; value?: Strides; output?: Strides };
}

/** Options that the factorized forward and backward share. */
export interface FactorizedAttentionOptions
  extends Pick<
    AttentionOptions,
    'causal' | 'window' | 'softcap' | 'scale' | 'bias' | 'mask' | 'alibiSlopes' | 'sinks' | 'emptyRows'
  > {
  axis: AttentionAxis;
  classToken?: ClassToken;
  /** q, k, v hold only these tokens, packed. Not with classToken, bias or mask. */
  tokens?: KeptTokens;
  /** Element strides of tensors that are not contiguous; `data` starts at their first element. */
  strides?: { query?: VideoStrides; key?: VideoStrides; value?: VideoStrides; output?: VideoStrides };
}

export const FACTORIZED_OPTION_NAMES = [
  'axis',
  'causal',
  'window',
  'softcap',
  'scale',
  'bias',
  'mask',
  'alibiSlopes',
  'sinks',
  'emptyRows',
  'classToken',
  'tokens',
  'strides',
] as const;

const AXES = Object.keys(AXIS_CODE) as AttentionAxis[];
const MODES = ['time-skip-space-mean'] as const;

interface Input {
  tensor: Tensor<FloatType>;
  strides: readonly number[];
}

export interface FactorizedPrepared {
  args: FactorizedArguments;
  inputs: Tensor[];
  query: Tensor<FloatType>;
  key: Tensor<FloatType>;
  value: Tensor<FloatType>;
  /** Dims of the output and of the log-sum-exp. */
  outputDims: number[];
  lseDims: number[];
  /** Present when a class token takes part. */
  classToken?: { query: Input; key: Input; value: Input; outputStrides: readonly number[] };
  batch: number;
  frames: number;
  /** Where the inputs are. */
  place: Location;
}

function sameType(t: Tensor<FloatType>, type: FloatType, name: string): void {
  if (t.type !== type) throw new HeddleError('ERR_DTYPE', `${name}: expected ${type} as q, got ${t.type}`);
}

function sameDims(t: Tensor, dims: readonly number[], name: string): void {
  if (t.dims.length !== dims.length || t.dims.some((d, i) => d !== dims[i])) {
    throw shapeError(name, `[${dims.join(', ')}]`, t.dims);
  }
}

/** Strides over batch, sequence, head and query of a bias or mask `[batch, sequences,] heads, length, length`. */
function broadcast(t: Tensor, full: readonly number[], name: string): number[] {
  const d = t.dims.length === 4 ? [t.dims[0], 1, ...t.dims.slice(1)] : t.dims;
  const fits =
    d.length === 5 && d[4] === full[4] && [0, 1, 2, 3].every((i) => d[i] === full[i] || d[i] === 1);
  if (!fits) {
    const shown = full.map((x, i) => (i < 4 ? `${x} or 1` : `${x}`)).join(', ');
    throw shapeError(name, `[${shown}] (batch, sequences, heads, queries, keys)`, t.dims);
  }
  const steps = contiguousStrides(d);
  return [0, 1, 2, 3].map((i) => (d[i] === 1 ? 0 : steps[i]));
}

/** Batch, frame, patch, head and element strides, whatever the rank. */
function fiveStrides(x: Input, name: string): number[] {
  const s = x.strides;
  if (s.length === 5) return [...s];
  if (s.length === 3) return [0, 0, s[0], s[1], s[2]];
  if (s[0] !== x.tensor.dims[1] * s[1] && x.tensor.dims[0] > 1) {
    throw new HeddleError('ERR_OPTION', `strides of ${name}: the batch entries of packed tokens must touch`);
  }
  return [0, 0, s[1], s[2], s[3]];
}

function refuse(present: boolean, what: string, why: string): void {
  if (present) throw new HeddleError('ERR_OPTION', `${what} is not available ${why}`);
}

/** Checks the class token; null where it takes no part. */
function classInputs(
  o: FactorizedAttentionOptions,
  batch: number,
  q: Input,
  k: Input,
  v: Input,
): FactorizedPrepared['classToken'] {
  const c = o.classToken as ClassToken;
  checkKeys(c, ['mode', 'query', 'key', 'value', 'strides'], 'classToken');
  optionChoice(c.mode ?? null, MODES, MODES[0], 'classToken.mode');
  if (o.axis !== 'time' && o.axis !== 'space') {
    throw new HeddleError('ERR_OPTION', `classToken: axis must be time or space, got ${o.axis}`);
  }
  if (c.strides !== undefined)
    checkKeys(c.strides, ['query', 'key', 'value', 'output'], 'classToken.strides');
  for (const name of ['causal', 'window', 'alibiSlopes'] as const) {
    refuse(
      o.axis === 'space' && o[name] !== undefined && o[name] !== false,
      name,
      'over space with a class token',
    );
  }
  if (o.axis === 'time') return undefined;
  const part = (name: 'query' | 'key' | 'value', of: Input) => {
    const label = `classToken.${name}`;
    const x = asInput(c[name], c.strides?.[name], label, 4, 'device');
    sameType(x.tensor, of.tensor.type, label);
    sameDims(x.tensor, [batch, 1, ...of.tensor.dims.slice(3)], label);
    if (x.strides[3] !== of.strides[4]) {
      throw new HeddleError('ERR_OPTION', `strides of ${label}: the element stride must be ${of.strides[4]}`);
    }
    return x;
  };
  const outputDims = [batch, 1, q.tensor.dims[3], v.tensor.dims[4]];
  const outputStrides = c.strides?.output ?? contiguousStrides(outputDims);
  if (outputStrides.length !== 4 || outputStrides[3] !== 1) {
    throw new HeddleError(
      'ERR_OPTION',
      'classToken.strides.output must be four integers, the last of them 1',
    );
  }
  return { query: part('query', q), key: part('key', k), value: part('value', v), outputStrides };
}

/**
 * Checks q, k, v and the options; the caller has refused unknown ones.
 * @param op name of the op, for messages
 */
export function prepareFactorized(
  op: string,
  q: TensorLike,
  k: TensorLike,
  v: TensorLike,
  o: FactorizedAttentionOptions,
): FactorizedPrepared {
  const axis = optionChoice(o?.axis ?? null, AXES, 'joint', 'axis');
  if (o.strides !== undefined) checkKeys(o.strides, ['query', 'key', 'value', 'output'], 'strides');
  const packed = o.tokens !== undefined;
  const rank = packed ? (q?.dims?.length === 4 ? 4 : 3) : 5;
  const query = asInput(q, o.strides?.query, 'q', rank, 'device');
  const key = asInput(k, o.strides?.key, 'k', rank, 'device');
  const value = asInput(v, o.strides?.value, 'v', rank, 'device');
  const qd = query.tensor.dims;
  const kd = key.tensor.dims;
  const vd = value.tensor.dims;
  const lead = qd.slice(0, rank - 2);
  const [heads, dim] = qd.slice(rank - 2);
  const keyHeads = kd[rank - 2];
  const valueDim = vd[rank - 1];
  sameType(key.tensor, query.tensor.type, 'k');
  sameType(value.tensor, query.tensor.type, 'v');
  sameDims(key.tensor, [...lead, keyHeads, dim], 'k');
  sameDims(value.tensor, [...lead, keyHeads, valueDim], 'v');
  if (keyHeads === 0 ? heads !== 0 : heads % keyHeads !== 0) {
    throw new HeddleError(
      'ERR_SHAPE',
      `q: the number of heads must be a multiple of the ${keyHeads} heads of k, got ${heads}`,
    );
  }
  if (axis === 'split-heads' && (heads % 2 !== 0 || keyHeads % 2 !== 0)) {
    throw new HeddleError(
      'ERR_SHAPE',
      `axis split-heads needs even numbers of heads, got ${heads} in q and ${keyHeads} in k`,
    );
  }
  for (const [d, name] of [
    [dim, 'q'],
    [valueDim, 'v'],
  ] as const) {
    if (d < 1 || d > MAX_HEAD_DIM) {
      throw new HeddleError('ERR_SHAPE', `${name}: the head dim must be 1 to ${MAX_HEAD_DIM}, got ${d}`);
    }
  }

  const n = new Float64Array(F.count);
  let [batch, frames, patches] = lead;
  let tokens: TokenIndex | null = null;
  if (o.tokens !== undefined) {
    tokens = indexTokens(o.tokens, 'tokens');
    ({ frames, patches } = o.tokens);
    batch = tokens.batch;
    const count = rank === 4 ? lead[0] * lead[1] : lead[0];
    const equal = rank === 3 || o.tokens.batchOffsets.every((x, b) => x === b * lead[1]);
    if (count !== tokens.tokens || (rank === 4 && (lead[0] !== batch || !equal))) {
      throw shapeError('q', `the ${tokens.tokens} tokens of ${batch} batch entries, packed`, qd);
    }
    n[F.tokens] = count;
    n[F.lseBatch] = rank === 4 ? (heads - 1) * lead[1] : 0;
    n[F.lseHead] = rank === 4 ? lead[1] : count;
    for (const name of ['classToken', 'bias', 'mask'] as const)
      refuse(o[name] !== undefined, name, 'with tokens');
    if (axis === 'joint') {
      refuse(o.causal === true, 'causal', 'over joint packed tokens');
      refuse(o.window !== undefined, 'window', 'over joint packed tokens');
    }
  }
  if (frames * patches > 2 ** 31 - 1) {
    throw new HeddleError('ERR_SHAPE', 'q: at most 2147483647 tokens in a batch entry');
  }
  n.set([AXIS_CODE[axis], batch, frames, patches, heads, keyHeads, dim, valueDim]);
  const outputDims = [...lead, heads, valueDim];
  const output: Input = {
    tensor: makeTensor(query.tensor.type, query.tensor.data, outputDims),
    strides: o.strides?.output ?? contiguousStrides(outputDims),
  };
  if (output.strides.length !== rank || output.strides[rank - 1] !== 1) {
    throw new HeddleError('ERR_OPTION', `strides.output must be ${rank} integers, the last of them 1`);
  }
  for (const [x, at, name] of [
    [query, F.queryStrides, 'q'],
    [key, F.keyStrides, 'k'],
    [value, F.valueStrides, 'v'],
    [output, F.outputStrides, 'output'],
  ] as const) {
    const s = fiveStrides(x, name);
    if (!packed && axis === 'joint' && frames > 1 && patches > 0 && s[1] !== patches * s[2]) {
      throw new HeddleError('ERR_OPTION', `strides of ${name}: the frames must touch for axis joint`);
    }
    n.set(s, at);
  }
  n.set(windowOf(o), F.left);
  n[F.scale] = optionNumber(o.scale, -Infinity, 1 / Math.sqrt(dim), 'scale');
  n[F.softcap] = optionNumber(o.softcap, 0, 0, 'softcap');
  n[F.uniformEmpty] = optionChoice(o.emptyRows, EMPTY_ROWS, 'zero', 'emptyRows') === 'uniform' ? 1 : 0;

  const inputs: Tensor[] = [query.tensor, key.tensor, value.tensor];
  const classToken = o.classToken === undefined ? undefined : classInputs(o, batch, query, key, value);
  if (classToken !== undefined) {
    for (const [x, at] of [
      [classToken.query, F.classQueryStrides],
      [classToken.key, F.classKeyStrides],
      [classToken.value, F.classValueStrides],
    ] as const) {
      n.set([x.strides[0], x.strides[2]], at);
      inputs.push(x.tensor);
    }
    n.set([classToken.outputStrides[0], classToken.outputStrides[2]], F.classOutputStrides);
  }
  const [sequences, length] =
    axis === 'time' ? [patches, frames] : axis === 'space' ? [frames, patches] : [1, frames * patches];
  const places = length + (classToken === undefined ? 0 : 1);
  const full = [batch, sequences, heads, places, places];
  let bias: Tensor<FloatType> | null = null;
  if (o.bias !== undefined) {
    refuse(axis === 'split-heads', 'bias', 'for axis split-heads');
    bias = asTensor(o.bias, 'bias', FLOAT_TYPES, undefined, 'device');
    n.set(broadcast(bias, full, 'bias'), F.biasStrides);
    inputs.push(bias);
  }
  let mask: Tensor<'uint8'> | null = null;
  if (o.mask !== undefined) {
    refuse(axis === 'split-heads', 'mask', 'for axis split-heads');
    mask = asTensor(o.mask, 'mask', ['uint8'], undefined, 'device');
    n.set(broadcast(mask, full, 'mask'), F.maskStrides);
    inputs.push(mask);
  }
  const alibi = headVector(o.alibiSlopes, heads, 'alibiSlopes', 'device');
  const sinks = headVector(o.sinks, heads, 'sinks', 'device');
  const perHead = [alibi, sinks].map((x) => (x === null ? null : makeTensor('float32', x, [x.length])));
  for (const x of perHead) if (x !== null) inputs.push(x);
  // Numbers per head and the tokens' indices may stay on the host: they are small, and copied with the call.
  const [alibiSlopes, headSinks] = perHead.map((x) => (x !== null && isOnDevice(x) ? x : null));
  const place = placeOf(op, o, {
    q: query.tensor,
    k: key.tensor,
    v: value.tensor,
    'classToken.query': classToken?.query.tensor,
    'classToken.key': classToken?.key.tensor,
    'classToken.value': classToken?.value.tensor,
    bias,
    mask,
    alibiSlopes,
    sinks: headSinks,
  });
  const args: FactorizedArguments = [
    n,
    DTYPE_CODE[query.tensor.type],
    query.tensor.data,
    key.tensor.data,
    value.tensor.data,
    classToken?.query.tensor.data ?? null,
    classToken?.key.tensor.data ?? null,
    classToken?.value.tensor.data ?? null,
    bias === null ? null : bias.data,
    bias === null ? 0 : DTYPE_CODE[bias.type],
    alibi,
    sinks,
    mask === null ? null : mask.data,
    o.tokens?.batchOffsets ?? null,
    tokens?.frameOffsets ?? null,
    tokens?.patchOffsets ?? null,
    tokens?.patchOrder ?? null,
  ];
  const lseDims =
    rank === 5 ? [batch, heads, frames, patches] : rank === 4 ? [lead[0], heads, lead[1]] : [heads, lead[0]];
  return {
    args,
    inputs,
    query: query.tensor,
    key: key.tensor,
    value: value.tensor,
    outputDims,
    lseDims,
    classToken,
    batch,
    frames,
    place,
  };
}
