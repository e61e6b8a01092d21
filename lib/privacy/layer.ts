import { HeddleError } from '../errors.ts';
import { checkOptions, optionInteger } from '../op.ts';
import { asTensor, checkDims, product, type TensorLike } from '../tensor.ts';
import { CONV_KEYS, type ConvLayer, prepareConv } from './convLayer.ts';
import { EXPERTS_KEYS, type ExpertsLayer, prepareExperts } from './expertsLayer.ts';
import {
  argsOf,
  asBoolean,
  asMask,
  checkIndices,
  checkLeading,
  featureTensor,
  type PreparedLayer,
  type Rows,
  tensorsOf,
  values,
} from './layerArguments.ts';
import { LORA_KEYS, type LoraLayer, prepareLora } from './loraLayer.ts';
import { prepareTied, TIED_KEYS, type TiedEmbeddingLayer } from './tiedLayer.ts';

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
  /** uint8 `[B, …]` without the channels: 0 marks a place of padding, which is not read in any channel. */
  mask?: TensorLike;
}

/**
 * Layers that per-sample clipping knows, with one weight and perhaps a bias ({@link LoraLayer} has two weights); any
 * other kind is an error, never skipped.
 */
export type PrivateLayer =
  | LinearLayer
  | EmbeddingLayer
  | NormLayer
  | GroupNormLayer
  | ConvLayer
  | TiedEmbeddingLayer
  | ExpertsLayer;

const KEYS: Readonly<Record<(PrivateLayer | LoraLayer)['kind'], ReadonlySet<string>>> = {
  linear: new Set(['kind', 'activations', 'gradOutputs', 'bias', 'mask']),
  embedding: new Set(['kind', 'indices', 'gradOutputs', 'numEmbeddings', 'paddingIndex', 'mask']),
  'layer-norm': new Set(['kind', 'normalized', 'gradOutputs', 'bias', 'mask']),
  'rms-norm': new Set(['kind', 'normalized', 'gradOutputs', 'bias', 'mask']),
  'group-norm': new Set(['kind', 'normalized', 'gradOutputs', 'bias', 'mask']),
  conv1d: CONV_KEYS,
  conv2d: CONV_KEYS,
  conv3d: CONV_KEYS,
  'tied-embedding': TIED_KEYS,
  lora: LORA_KEYS,
  experts: EXPERTS_KEYS,
};

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
    parameters: [
      ['weight', [outputs, inputs]],
      ['bias', bias ? [outputs] : null],
    ],
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
    parameters: [
      ['weight', [numEmbeddings, outputs]],
      ['bias', null],
    ],
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
  checkDims(g, x.dims, 'layer.gradOutputs', 'normalized');
  const { kind } = layer;
  const bias = asBoolean(layer.bias, kind !== 'rms-norm');
  const samples = x.dims[0];
  const common = { samples, input: x, gradOutputs: g, bias };
  if (kind === 'group-norm') {
    const channels = x.dims[1];
    const spatial = product(x.dims.slice(2));
    const mask = asMask(layer.mask, [samples, ...x.dims.slice(2)]);
    const rows: Rows = {
      ...common,
      positions: channels,
      inputs: spatial,
      outputs: spatial,
      mask,
    };
    return {
      stem: 'channel',
      args: argsOf(rows),
      samples,
      preferGhost: false,
      inputs: tensorsOf(rows),
      parameters: [
        ['weight', [channels]],
        ['bias', bias ? [channels] : null],
      ],
      reference: () => ({
        kind,
        normalized: values(x),
        gradOutputs: values(g),
        samples,
        channels,
        spatial,
        bias,
        mask: mask?.data,
      }),
    };
  }
  const outputs = x.dims[x.dims.length - 1];
  const positions = product(x.dims.slice(1, -1));
  const mask = asMask(layer.mask, x.dims.slice(0, -1));
  const rows: Rows = { ...common, positions, inputs: outputs, outputs, mask };
  return {
    stem: 'scale',
    args: argsOf(rows),
    samples,
    preferGhost: false,
    inputs: tensorsOf(rows),
    parameters: [
      ['weight', [outputs]],
      ['bias', bias ? [outputs] : null],
    ],
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
export function prepareLayer(layer: PrivateLayer | LoraLayer): PreparedLayer {
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
    case 'tied-embedding':
      return prepareTied(layer);
    case 'lora':
      return prepareLora(layer);
    case 'experts':
      return prepareExperts(layer);
    default:
      return prepareNorm(layer);
  }
}
