import { product } from '../../tensor.ts';
/**
 * What the privacy references take: a layer's inputs and output gradients, already checked and flattened.
 *
 * Notation of the formulas: sample i < B, position t < T; A_t is the activation row (length d) and G_t the row
 * of ∂L_i/∂output (length p) of one sample, not averaged over the batch.
 */

/** Row-major values; anything that reads as numbers. */
export type Values = ArrayLike<number>;

/** One byte for each sample and position, 0 where the position is padding and must not be read at all. */
export type Mask = ArrayLike<number>;

interface Positions {
  samples: number;
  positions: number;
  mask?: Mask | null;
}

/** output_t = W·A_t + b; W [outputs, inputs], b [outputs]. */
export interface LinearLayer extends Positions {
  kind: 'linear';
  activations: Values;
  gradOutputs: Values;
  inputs: number;
  outputs: number;
  bias: boolean;
}

/** output_t = W[a_t]; W [numEmbeddings, outputs]. */
export interface EmbeddingLayer extends Positions {
  kind: 'embedding';
  indices: Values;
  gradOutputs: Values;
  outputs: number;
  numEmbeddings: number;
  /** Row that has no gradient; −1 for none. */
  paddingIndex: number;
}

/** output_t = γ∘x̂_t + β; γ, β [outputs], x̂ the normalised input before γ. */
export interface NormLayer extends Positions {
  kind: 'layer-norm' | 'rms-norm';
  normalized: Values;
  gradOutputs: Values;
  outputs: number;
  bias: boolean;
}

/** output[c, s] = γ_c·x̂[c, s] + β_c; x̂ and gradients [samples, channels, spatial], mask [samples, spatial]. */
export interface GroupNormLayer {
  kind: 'group-norm';
  normalized: Values;
  gradOutputs: Values;
  samples: number;
  channels: number;
  spatial: number;
  bias: boolean;
  mask?: Mask | null;
}

/**
 * Cross-correlation, as frameworks call convolution. input [samples, inChannels, ...size], gradOutputs
 * [samples, outChannels, ...outputSize], weight [outChannels, inChannels/groups, ...kernel], mask
 * [samples, ...outputSize].
 */
export interface ConvLayer {
  kind: 'conv1d' | 'conv2d' | 'conv3d';
  input: Values;
  gradOutputs: Values;
  samples: number;
  inChannels: number;
  outChannels: number;
  size: readonly number[];
  outputSize: readonly number[];
  kernel: readonly number[];
  stride: readonly number[];
  padding: readonly number[];
  dilation: readonly number[];
  groups: number;
  bias: boolean;
  mask?: Mask | null;
}

/**
 * One matrix W [numEmbeddings, width] used as embedding, x_t = W[a_t], and as head, logits_s = W·h_s. Gradients
 * of both uses: gradEmbeddings [samples, positions, width], gradLogits [samples, positions, numEmbeddings].
 */
export interface TiedEmbeddingLayer extends Positions {
  kind: 'tied-embedding';
  indices: Values;
  gradEmbeddings: Values;
  hidden: Values;
  gradLogits: Values;
  width: number;
  numEmbeddings: number;
  paddingIndex: number;
}

/** Adapter s·B·A·x_t beside a frozen matrix; A [rank, inputs], B [outputs, rank], s = scale, x the activations. */
export interface LoraLayer extends Positions {
  kind: 'lora';
  activations: Values;
  gradOutputs: Values;
  a: Values;
  b: Values;
  inputs: number;
  outputs: number;
  rank: number;
  scale: number;
}

/**
 * One linear layer per expert, W [experts, outputs, inputs]; the rows of a batch are spread over the experts.
 * Row n belongs to sample `sampleOf[n]` and went to expert `expertOf[n]`; −1 in either: dropped. mask [rows].
 */
export interface ExpertsLayer {
  kind: 'experts';
  activations: Values;
  gradOutputs: Values;
  sampleOf: Values;
  expertOf: Values;
  rows: number;
  samples: number;
  experts: number;
  inputs: number;
  outputs: number;
  bias: boolean;
  mask?: Mask | null;
}

export type Layer =
  | LinearLayer
  | EmbeddingLayer
  | NormLayer
  | GroupNormLayer
  | ConvLayer
  | TiedEmbeddingLayer
  | LoraLayer
  | ExpertsLayer;

/** Gradients by parameter: `weight` and `bias`; `a` and `b` of an adapter. */
export type Gradients = Record<string, Float64Array>;

/** Zeros in the shapes of a layer's parameters. */
export function zeroGradients(layer: Layer): Gradients {
  const withBias = (weight: number, bias: number, has: boolean): Gradients =>
    has
      ? { weight: new Float64Array(weight), bias: new Float64Array(bias) }
      : { weight: new Float64Array(weight) };
  switch (layer.kind) {
    case 'linear':
      return withBias(layer.outputs * layer.inputs, layer.outputs, layer.bias);
    case 'embedding':
      return withBias(layer.numEmbeddings * layer.outputs, 0, false);
    case 'layer-norm':
    case 'rms-norm':
      return withBias(layer.outputs, layer.outputs, layer.bias);
    case 'group-norm':
      return withBias(layer.channels, layer.channels, layer.bias);
    case 'tied-embedding':
      return withBias(layer.numEmbeddings * layer.width, 0, false);
    case 'lora':
      return {
        a: new Float64Array(layer.rank * layer.inputs),
        b: new Float64Array(layer.outputs * layer.rank),
      };
    case 'experts':
      return withBias(
        layer.experts * layer.outputs * layer.inputs,
        layer.experts * layer.outputs,
        layer.bias,
      );
    default: {
      const taps = product(layer.kernel);
      return withBias(
        layer.outChannels * (layer.inChannels / layer.groups) * taps,
        layer.outChannels,
        layer.bias,
      );
    }
  }
}

/** Product of a list of extents. */
/** The positions of a sample that are not padding. */
export function positionsOf(layer: Omit<Positions, 'samples'>, sample: number): number[] {
  const { positions, mask } = layer;
  return Array.from({ length: positions }, (_, t) => t).filter(
    (t) => mask === undefined || mask === null || mask[sample * positions + t] !== 0,
  );
}

/** Row `index` of a matrix of `width` columns. */
export function rowOf(values: Values, index: number, width: number): Float64Array {
  return Float64Array.from({ length: width }, (_, j) => values[index * width + j]);
}

/** Every coordinate of a box, last axis fastest. */
export function* coordinates(extents: readonly number[]): Generator<number[]> {
  const count = product(extents);
  for (let flat = 0; flat < count; flat++) {
    const at = new Array<number>(extents.length);
    let rest = flat;
    for (let axis = extents.length - 1; axis >= 0; axis--) {
      at[axis] = rest % extents[axis];
      rest = Math.floor(rest / extents[axis]);
    }
    yield at;
  }
}
