import { DTYPE_CODE, decodeFloats, type FloatType } from '../dtype.ts';
import { HeddleError } from '../errors.ts';
import { checkOptions, optionInteger } from '../op.ts';
import type { Layer } from '../reference/privacy/layers.ts';
import { asTensor, type Tensor, type TensorLike } from '../tensor.ts';
import { CONV_KEYS, type ConvLayer, prepareConv } from './convLayer.ts';

/**
 * `y = x·Wᵀ + b`: what went in and the gradient of each sample's own loss with respect to what came out (for a
 * mean over the batch, times the batch size). The first dimension is the sample, the last the features; what lies
 * between are positions (tokens, pixels).
 */
export interface LinearLayer {
  kind: 'linear';
  /** `[B, …, d]` float32, bfloat16 or float16. */
  activations: TensorLike;
  /** `[B, …, p]` float32, bfloat16 or float16. */
  gradOutputs: TensorLike;
  /** Whether the layer has a bias; there is no default, because leaving one out would void the privacy bound. */
  bias: boolean;
  /** uint8 `[B, …]`: 0 marks a position of padding, which is not read at all. */
  mask?: TensorLike;
}

/** A table `[numEmbeddings, p]` of which each position reads one row. */
export interface EmbeddingLayer {
  kind: 'embedding';
  /** `[B, …]` int32 or int64. */
  indices: TensorLike;
  /** `[B, …, p]`. */
  gradOutputs: TensorLike;
  numEmbeddings: number;
  /** The row that has no gradient. */
  paddingIndex?: number;
  mask?: TensorLike;
}

/** `y = γ∘x̂ + β` over the last dimension. */
export interface NormLayer {
  kind: 'layer-norm' | 'rms-norm';
  /** x̂ `[B, …, p]`: the input after normalisation, before γ. */
  normalized: TensorLike;
  /** `[B, …, p]`. */
  gradOutputs: TensorLike;
  /** Whether there is a β. Default: true for layer-norm, false for rms-norm. */
  bias?: boolean;
  mask?: TensorLike;
}

/** `y = γ_c·x̂ + β_c` per channel. */
export interface GroupNormLayer {
  kind: 'group-norm';
  /** x̂ `[B, C, …]`. */
  normalized: TensorLike;
  /** `[B, C, …]`. */
  gradOutputs: TensorLike;
  /** Whether there is a β. Default true. */
  bias?: boolean;
}

/** Layers that per-sample clipping knows; any other kind is an error, never skipped. */
export type PrivateLayer = LinearLayer | EmbeddingLayer | NormLayer | GroupNormLayer | ConvLayer;

/** @internal A checked layer: what the native ops and the reference take. */
export interface PreparedLayer {
  /** Native ops are `<stem>SquaredNorms` and `<stem>ClippedGradients`. */
  stem: string;
  /** In the order of native/binding/privacy.cpp. */
  args: unknown[];
  samples: number;
  /** Whether the ghost norm is the cheaper one. */
  preferGhost: boolean;
  inputs: Tensor[];
  weight: number[];
  bias: number[] | null;
  reference(): Layer;
}

const FLOATS: readonly FloatType[] = ['float32', 'bfloat16', 'float16'];
const KEYS: Readonly<Record<PrivateLayer['kind'], ReadonlySet<string>>> = {
  linear: new Set(['kind', 'activations', 'gradOutputs', 'bias', 'mask']),
  embedding: new Set(['kind', 'indices', 'gradOutputs', 'numEmbeddings', 'paddingIndex', 'mask']),
  'layer-norm': new Set(['kind', 'normalized', 'gradOutputs', 'bias', 'mask']),
  'rms-norm': new Set(['kind', 'normalized', 'gradOutputs', 'bias', 'mask']),
  'group-norm': new Set(['kind', 'normalized', 'gradOutputs', 'bias']),
  conv1d: CONV_KEYS,
  conv2d: CONV_KEYS,
  conv3d: CONV_KEYS,
};

/** @internal Floats as the reference reads them. */
export function values(t: Tensor<FloatType>): Float32Array {
  return t.type === 'float32' ? (t.data as Float32Array) : decodeFloats(t.data, t.type);
}

/** @internal */
export function featureTensor(value: TensorLike, name: string, rank = 2): Tensor<FloatType> {
  const t = asTensor(value, name, FLOATS);
  if (t.dims.length < rank) {
    throw new HeddleError(
      'ERR_SHAPE',
      `${name}: expected at least ${rank} dimensions, got [${t.dims.join(', ')}]`,
    );
  }
  return t;
}

const product = (dims: readonly number[]) => dims.reduce((a, b) => a * b, 1);

function checkLeading(dims: readonly number[], lead: readonly number[], name: string, of: string): void {
  if (dims.length !== lead.length || dims.some((d, i) => d !== lead[i])) {
    throw new HeddleError(
      'ERR_SHAPE',
      `${name}: expected leading dims [${lead.join(', ')}] as in ${of}, got [${dims.join(', ')}]`,
    );
  }
}

function asMask(value: TensorLike | undefined, lead: readonly number[]): Tensor<'uint8'> | null {
  if (value === undefined) return null;
  const t = asTensor(value, 'layer.mask', ['uint8']);
  if (t.dims.length !== lead.length || t.dims.some((d, i) => d !== lead[i])) {
    throw new HeddleError(
      'ERR_SHAPE',
      `layer.mask: expected [${lead.join(', ')}], got [${t.dims.join(', ')}]`,
    );
  }
  return t;
}

/** @internal */
export function asBoolean(value: unknown, fallback: boolean | undefined): boolean {
  const v = value === undefined ? fallback : value;
  if (typeof v !== 'boolean') {
    throw new HeddleError('ERR_ARGUMENT', `layer.bias: expected true or false, got ${String(value)}`);
  }
  return v;
}

interface Rows {
  stem: string;
  samples: number;
  positions: number;
  inputs: number;
  outputs: number;
  input: Tensor<FloatType> | null;
  gradOutputs: Tensor<FloatType>;
  indices?: Int32Array;
  paddingIndex?: number;
  mask?: Tensor<'uint8'> | null;
  bias: boolean;
}

function argsOf(r: Rows): unknown[] {
  return [
    r.samples,
    r.positions,
    r.inputs,
    r.outputs,
    r.input === null ? null : r.input.data,
    r.input === null ? 0 : DTYPE_CODE[r.input.type],
    r.gradOutputs.data,
    DTYPE_CODE[r.gradOutputs.type],
    r.indices ?? null,
    r.paddingIndex ?? -1,
    r.mask?.data ?? null,
    r.bias,
  ];
}

function tensorsOf(r: Rows): Tensor[] {
  return [r.input, r.gradOutputs, r.mask ?? null].filter((t) => t !== null) as Tensor[];
}

function prepareLinear(layer: LinearLayer): PreparedLayer {
  const a = featureTensor(layer.activations, 'layer.activations');
  const g = featureTensor(layer.gradOutputs, 'layer.gradOutputs');
  const lead = a.dims.slice(0, -1);
  checkLeading(g.dims.slice(0, -1), lead, 'layer.gradOutputs', 'activations');
  const inputs = a.dims[a.dims.length - 1];
  const outputs = g.dims[g.dims.length - 1];
  const positions = product(lead.slice(1));
  const bias = asBoolean(layer.bias, undefined);
  const mask = asMask(layer.mask, lead);
  const rows: Rows = {
    stem: 'linear',
    samples: lead[0],
    positions,
    inputs,
    outputs,
    input: a,
    gradOutputs: g,
    mask,
    bias,
  };
  return {
    stem: 'linear',
    args: argsOf(rows),
    samples: lead[0],
    preferGhost: 2 * positions * positions <= inputs * outputs,
    inputs: tensorsOf(rows),
    weight: [outputs, inputs],
    bias: bias ? [outputs] : null,
    reference: () => ({
      kind: 'linear',
      activations: values(a),
      gradOutputs: values(g),
      samples: lead[0],
      positions,
      inputs,
      outputs,
      bias,
      mask: mask?.data,
    }),
  };
}

function checkIndices(
  given: Tensor<'int32' | 'int64'>,
  count: number,
  mask: Uint8Array | undefined,
): Int32Array {
  const out = given.type === 'int32' ? (given.data as Int32Array) : new Int32Array(given.data.length);
  for (let i = 0; i < out.length; i++) {
    const id = given.data[i];
    const readable = mask === undefined || mask[i] !== 0;
    if (readable && (id < 0 || id >= count)) {
      throw new HeddleError('ERR_VALUE', `layer.indices: element ${i} is ${id}: expected 0 to ${count - 1}`);
    }
    if (given.type === 'int64') out[i] = readable ? Number(id) : 0;
  }
  return out;
}

function prepareEmbedding(layer: EmbeddingLayer): PreparedLayer {
  const ids = asTensor(layer.indices, 'layer.indices', ['int32', 'int64']);
  const g = featureTensor(layer.gradOutputs, 'layer.gradOutputs');
  if (ids.dims.length < 1) throw new HeddleError('ERR_SHAPE', 'layer.indices: expected [B, …], got []');
  checkLeading(g.dims.slice(0, -1), ids.dims, 'layer.gradOutputs', 'indices');
  const numEmbeddings = optionInteger(layer.numEmbeddings, 1, 2 ** 31 - 1, 'layer.numEmbeddings');
  const paddingIndex =
    layer.paddingIndex === undefined
      ? -1
      : optionInteger(layer.paddingIndex, 0, numEmbeddings - 1, 'layer.paddingIndex');
  const mask = asMask(layer.mask, ids.dims);
  const indices = checkIndices(ids, numEmbeddings, mask?.data);
  const outputs = g.dims[g.dims.length - 1];
  const samples = ids.dims[0];
  const positions = product(ids.dims.slice(1));
  const rows: Rows = {
    stem: 'embedding',
    samples,
    positions,
    inputs: 0,
    outputs,
    input: null,
    gradOutputs: g,
    indices,
    paddingIndex,
    mask,
    bias: false,
  };
  return {
    stem: 'embedding',
    args: argsOf(rows),
    samples,
    preferGhost: false,
    inputs: [...tensorsOf(rows), ids],
    weight: [numEmbeddings, outputs],
    bias: null,
    reference: () => ({
      kind: 'embedding',
      indices,
      gradOutputs: values(g),
      samples,
      positions,
      outputs,
      numEmbeddings,
      paddingIndex,
      mask: mask?.data,
    }),
  };
}

function prepareNorm(layer: NormLayer | GroupNormLayer): PreparedLayer {
  const x = featureTensor(layer.normalized, 'layer.normalized');
  const g = featureTensor(layer.gradOutputs, 'layer.gradOutputs');
  if (g.dims.length !== x.dims.length || g.dims.some((d, i) => d !== x.dims[i])) {
    throw new HeddleError(
      'ERR_SHAPE',
      `layer.gradOutputs: expected [${x.dims.join(', ')}] as normalized, got [${g.dims.join(', ')}]`,
    );
  }
  const { kind } = layer;
  const bias = asBoolean(layer.bias, kind !== 'rms-norm');
  const samples = x.dims[0];
  const common = { samples, input: x, gradOutputs: g, bias };
  if (kind === 'group-norm') {
    const channels = x.dims[1];
    const spatial = product(x.dims.slice(2));
    const rows: Rows = {
      ...common,
      stem: 'channel',
      positions: channels,
      inputs: spatial,
      outputs: spatial,
    };
    return {
      stem: rows.stem,
      args: argsOf(rows),
      samples,
      preferGhost: false,
      inputs: tensorsOf(rows),
      weight: [channels],
      bias: bias ? [channels] : null,
      reference: () => ({
        kind,
        normalized: values(x),
        gradOutputs: values(g),
        samples,
        channels,
        spatial,
        bias,
      }),
    };
  }
  const outputs = x.dims[x.dims.length - 1];
  const positions = product(x.dims.slice(1, -1));
  const mask = asMask(layer.mask, x.dims.slice(0, -1));
  const rows: Rows = { ...common, stem: 'scale', positions, inputs: outputs, outputs, mask };
  return {
    stem: rows.stem,
    args: argsOf(rows),
    samples,
    preferGhost: false,
    inputs: tensorsOf(rows),
    weight: [outputs],
    bias: bias ? [outputs] : null,
    reference: () => ({
      kind,
      normalized: values(x),
      gradOutputs: values(g),
      samples,
      positions,
      outputs,
      bias,
      mask: mask?.data,
    }),
  };
}

/** @internal Checks a layer. */
export function prepareLayer(layer: PrivateLayer): PreparedLayer {
  if (layer === null || typeof layer !== 'object') {
    throw new HeddleError('ERR_ARGUMENT', `layer: expected an object with a kind, got ${String(layer)}`);
  }
  const kind = layer.kind;
  if (!Object.hasOwn(KEYS, kind)) {
    throw new HeddleError(
      'ERR_ARGUMENT',
      `layer.kind must be one of ${Object.keys(KEYS).join(', ')}, got ${JSON.stringify(kind)}`,
    );
  }
  checkOptions(layer, KEYS[kind], `layer (${kind})`);
  switch (layer.kind) {
    case 'linear':
      return prepareLinear(layer);
    case 'embedding':
      return prepareEmbedding(layer);
    case 'conv1d':
    case 'conv2d':
    case 'conv3d':
      return prepareConv(layer);
    default:
      return prepareNorm(layer);
  }
}
