import { encodeFloats, type FloatType } from '../../../lib/dtype.ts';
import type { ConvLayer } from '../../../lib/privacy/convLayer.ts';
import type { PrivateLayer } from '../../../lib/privacy/layer.ts';
import type { LoraLayer } from '../../../lib/privacy/loraLayer.ts';
import { Tensor } from '../../../lib/tensor.ts';
import type { Random } from '../random.ts';

/** One layer of the privacy tables: shapes first, data drawn when the case is prepared. */
export interface LayerShape {
  name: string;
  kind: (PrivateLayer | LoraLayer)['kind'];
  /** `[B, …]`; for group-norm `[B, C, …]`; for experts `[rows]`. */
  lead: number[];
  inputs?: number;
  outputs?: number;
  bias?: boolean;
  numEmbeddings?: number;
  paddingIndex?: number;
  /** Of an adapter. */
  rank?: number;
  /** Experts: B and E. */
  samples?: number;
  experts?: number;
  /** Share of positions that are padding; their data is NaN. The last sample is all padding. */
  padded?: number;
  /** Types of what goes in and of the gradients. */
  types?: [FloatType, FloatType];
  wide?: boolean;
  /** Convolutions: `lead` is `[B, C_in, …]`, `outputs` C_out. */
  conv?: Pick<ConvLayer, 'kernel' | 'stride' | 'padding' | 'dilation' | 'groups'>;
  bench?: boolean;
}

const product = (dims: readonly number[]) => dims.reduce((a, b) => a * b, 1);

function floats(random: Random, dims: number[], type: FloatType, skip: Uint8Array | null): Tensor {
  const count = product(dims);
  const data = random.normals(count);
  if (skip !== null) {
    const width = dims[dims.length - 1];
    skip.forEach((on, row) => {
      if (on === 0) data.fill(Number.NaN, row * width, (row + 1) * width);
    });
  }
  return new Tensor(type, encodeFloats(data, type) as never, dims);
}

/** Output places of a convolution. */
export function outputSize(shape: LayerShape): number[] {
  const { kernel, stride, padding, dilation } = shape.conv as ConvLayer;
  const at = (v: number | readonly number[] | undefined, i: number, none: number) =>
    v === undefined ? none : typeof v === 'number' ? v : v[i];
  return shape.lead.slice(2).map((n, i) => {
    const reach = at(dilation, i, 1) * (at(kernel, i, 1) - 1) + 1;
    return Math.floor((n + 2 * at(padding, i, 0) - reach) / at(stride, i, 1)) + 1;
  });
}

/** One group of a convolution as a linear layer: samples, places, inputs, outputs and how many of it. */
export function asLinear(shape: LayerShape) {
  const axes = shape.lead.length - 2;
  const { kernel, groups = 1 } = shape.conv as ConvLayer;
  const taps = typeof kernel === 'number' ? kernel ** axes : kernel.reduce((a, b) => a * b, 1);
  return {
    samples: shape.lead[0],
    places: outputSize(shape).reduce((a, b) => a * b, 1),
    inputs: (shape.lead[1] / groups) * taps,
    outputs: (shape.outputs as number) / groups,
    groups,
  };
}

/** Extents beside `lead`, for a case's name. */
export function sizes(shape: LayerShape): string {
  const of = { d: shape.inputs, p: shape.outputs, V: shape.numEmbeddings, r: shape.rank, E: shape.experts };
  const known = Object.entries(of).filter(([, n]) => n !== undefined);
  return known.map(([name, n]) => `${name}=${n}`).join(' ');
}

/** Samples of a shape. */
export function samplesOf(shape: LayerShape): number {
  return shape.samples ?? shape.lead[0];
}

/** 0 for each padded position: a share at random, and the whole last sample. */
function drawPadding(shape: LayerShape, random: Random, lead: number[]): Uint8Array | null {
  if (shape.padded === undefined) return null;
  const rows = product(lead);
  const last = shape.kind === 'experts' ? rows : rows - rows / lead[0];
  return Uint8Array.from({ length: rows }, (_, r) =>
    r >= last || random.uniform() < (shape.padded as number) ? 0 : 1,
  );
}

/** As {@link floats}, with NaN in every channel of a padded place. */
function channels(random: Random, dims: number[], type: FloatType, skip: Uint8Array | null): Tensor {
  const t = floats(random, dims, 'float32', null);
  const places = product(dims.slice(2));
  const data = t.data as Float32Array;
  if (skip !== null) {
    for (let i = 0; i < data.length; i++) {
      const sample = Math.floor(i / (places * dims[1]));
      if (skip[sample * places + (i % places)] === 0) data[i] = Number.NaN;
    }
  }
  return new Tensor(type, encodeFloats(data, type) as never, dims);
}

function indices(random: Random, shape: LayerShape, least: number, limit: number, skip: Uint8Array | null) {
  // What a padded position holds must not matter, not even an index out of range.
  const ids = Int32Array.from({ length: product(shape.lead) }, (_, r) =>
    skip?.[r] === 0 ? -7 : random.integer(least, limit - 1),
  );
  if (!shape.wide) return new Tensor('int32', ids, shape.lead);
  return new Tensor(
    'int64',
    BigInt64Array.from(ids, (x) => BigInt(x)),
    shape.lead,
  );
}

/** Draws a layer's data. */
export function makeLayer(shape: LayerShape, random: Random): PrivateLayer | LoraLayer {
  const { kind, lead } = shape;
  const [inputType, gradType] = shape.types ?? ['float32', 'float32'];
  const outputs = shape.outputs as number;
  const inputs = shape.inputs as number;
  const numEmbeddings = shape.numEmbeddings as number;
  const bias = shape.bias as boolean;
  const padding = shape.paddingIndex === undefined ? {} : { paddingIndex: shape.paddingIndex };
  const withMask = (skip: Uint8Array | null, dims: number[]) =>
    skip === null ? {} : { mask: new Tensor('uint8', skip, dims) };
  if (kind === 'group-norm') {
    const places = [lead[0], ...lead.slice(2)];
    const skip = drawPadding(shape, random, places);
    return {
      kind,
      normalized: channels(random, lead, inputType, skip),
      gradOutputs: channels(random, lead, gradType, skip),
      bias,
      ...withMask(skip, places),
    };
  }
  if (kind === 'conv1d' || kind === 'conv2d' || kind === 'conv3d') {
    const places = [lead[0], ...outputSize(shape)];
    const skip = drawPadding(shape, random, places);
    return {
      kind,
      ...(shape.conv as NonNullable<LayerShape['conv']>),
      input: floats(random, lead, inputType, null),
      gradOutputs: channels(random, [lead[0], outputs, ...places.slice(1)], gradType, skip),
      bias,
      ...withMask(skip, places),
    };
  }
  const skip = drawPadding(shape, random, lead);
  const mask = withMask(skip, lead);
  const rows = (width: number, type: FloatType) => floats(random, [...lead, width], type, skip);
  switch (kind) {
    case 'linear':
      return {
        kind,
        activations: rows(inputs, inputType),
        gradOutputs: rows(outputs, gradType),
        bias,
        ...mask,
      };
    case 'lora':
      return {
        kind,
        activations: rows(inputs, inputType),
        gradOutputs: rows(outputs, gradType),
        a: floats(random, [shape.rank as number, inputs], inputType, null),
        b: floats(random, [outputs, shape.rank as number], gradType, null),
        scale: 0.75,
        ...mask,
      };
    case 'experts':
      return {
        kind,
        activations: rows(inputs, inputType),
        gradOutputs: rows(outputs, gradType),
        sampleIds: indices(random, shape, 0, samplesOf(shape), skip),
        expertIds: indices(random, shape, -1, shape.experts as number, skip),
        samples: samplesOf(shape),
        numExperts: shape.experts as number,
        bias,
        ...mask,
      };
    case 'tied-embedding':
      return {
        kind,
        indices: indices(random, shape, 0, numEmbeddings, skip),
        gradEmbeddings: rows(inputs, gradType),
        hidden: rows(inputs, inputType),
        gradLogits: rows(numEmbeddings, gradType),
        ...padding,
        ...mask,
      };
    case 'embedding':
      return {
        kind,
        gradOutputs: rows(outputs, gradType),
        indices: indices(random, shape, 0, numEmbeddings, skip),
        numEmbeddings,
        ...padding,
        ...mask,
      };
    default:
      return {
        kind,
        normalized: rows(outputs, inputType),
        gradOutputs: rows(outputs, gradType),
        bias,
        ...mask,
      };
  }
}
