import { encodeFloats, type FloatType } from '../../../lib/dtype.ts';
import type { ConvLayer } from '../../../lib/privacy/convLayer.ts';
import type { PrivateLayer } from '../../../lib/privacy/layer.ts';
import { Tensor } from '../../../lib/tensor.ts';
import type { Random } from '../random.ts';

/** One layer of the privacy tables: shapes first, data drawn when the case is prepared. */
export interface LayerShape {
  name: string;
  kind: PrivateLayer['kind'];
  /** `[B, …]`; for group-norm `[B, C, …]`. */
  lead: number[];
  inputs?: number;
  outputs?: number;
  bias?: boolean;
  numEmbeddings?: number;
  paddingIndex?: number;
  /** Share of positions that are padding; their data is NaN. The last sample is all padding. */
  padded?: number;
  /** Types of what goes in and of the gradients. */
  types?: [FloatType, FloatType];
  wide?: boolean;
  /** Convolutions: `lead` is `[B, C_in, …]`, `outputs` C_out. */
  conv?: Pick<ConvLayer, 'kernel' | 'stride' | 'padding' | 'dilation' | 'groups'>;
  bench?: boolean;
}

/** Every layer kind: odd extents, one position, no position, padding, mixed types, several chunks. */
export const layerShapes: LayerShape[] = [
  { name: 'linear', kind: 'linear', lead: [3, 37], inputs: 45, outputs: 67, bias: true },
  { name: 'linear, no bias', kind: 'linear', lead: [2, 16], inputs: 32, outputs: 16, bias: false },
  { name: 'linear, two leading axes', kind: 'linear', lead: [2, 3, 5], inputs: 9, outputs: 7, bias: true },
  { name: 'linear, one position', kind: 'linear', lead: [67], inputs: 45, outputs: 31, bias: true },
  { name: 'linear, one of everything', kind: 'linear', lead: [1], inputs: 1, outputs: 1, bias: true },
  { name: 'linear, padded', kind: 'linear', lead: [4, 35], inputs: 33, outputs: 20, bias: true, padded: 0.4 },
  { name: 'linear, chunks of positions', kind: 'linear', lead: [2, 300], inputs: 13, outputs: 6, bias: true },
  { name: 'linear, chunks of features', kind: 'linear', lead: [2, 5], inputs: 290, outputs: 270, bias: true },
  { name: 'linear, no samples', kind: 'linear', lead: [0, 5], inputs: 3, outputs: 4, bias: true },
  { name: 'linear, no positions', kind: 'linear', lead: [3, 0], inputs: 3, outputs: 4, bias: true },
  { name: 'linear, no inputs', kind: 'linear', lead: [3, 5], inputs: 0, outputs: 4, bias: true },
  {
    name: 'linear bf16',
    kind: 'linear',
    lead: [3, 29],
    inputs: 51,
    outputs: 37,
    bias: true,
    types: ['bfloat16', 'bfloat16'],
  },
  {
    name: 'linear bf16 x fp16',
    kind: 'linear',
    lead: [3, 18],
    inputs: 21,
    outputs: 35,
    bias: true,
    types: ['bfloat16', 'float16'],
  },
  { name: 'embedding', kind: 'embedding', lead: [4, 41], outputs: 19, numEmbeddings: 13 },
  {
    name: 'embedding, padding index and mask',
    kind: 'embedding',
    lead: [4, 30],
    outputs: 70,
    numEmbeddings: 11,
    paddingIndex: 3,
    padded: 0.3,
  },
  {
    name: 'embedding int64 bf16',
    kind: 'embedding',
    lead: [3, 20],
    outputs: 33,
    numEmbeddings: 50,
    wide: true,
    types: ['float32', 'bfloat16'],
  },
  { name: 'layer-norm', kind: 'layer-norm', lead: [3, 140], outputs: 75, bias: true },
  { name: 'layer-norm, padded', kind: 'layer-norm', lead: [3, 17], outputs: 300, bias: true, padded: 0.3 },
  { name: 'rms-norm', kind: 'rms-norm', lead: [3, 21], outputs: 40, bias: false },
  {
    name: 'rms-norm bf16',
    kind: 'rms-norm',
    lead: [3, 21],
    outputs: 40,
    bias: false,
    types: ['bfloat16', 'bfloat16'],
  },
  { name: 'group-norm', kind: 'group-norm', lead: [3, 10, 7, 9], bias: true },
  { name: 'group-norm, no bias', kind: 'group-norm', lead: [2, 6], bias: false },
  {
    name: 'conv1d',
    kind: 'conv1d',
    lead: [3, 6, 41],
    outputs: 8,
    bias: true,
    conv: { kernel: 3, stride: 2, padding: 2, dilation: 2 },
  },
  {
    name: 'conv2d',
    kind: 'conv2d',
    lead: [3, 5, 9, 11],
    outputs: 7,
    bias: true,
    conv: { kernel: 3, padding: 1 },
  },
  {
    name: 'conv2d, groups bf16',
    kind: 'conv2d',
    lead: [2, 6, 8, 7],
    outputs: 9,
    bias: true,
    types: ['bfloat16', 'bfloat16'],
    conv: { kernel: [2, 3], stride: [1, 2], padding: [0, 1], groups: 3 },
  },
  {
    name: 'conv2d, depthwise',
    kind: 'conv2d',
    lead: [3, 4, 6, 6],
    outputs: 8,
    bias: false,
    conv: { kernel: 3, groups: 4 },
  },
  {
    name: 'conv2d, chunks of places',
    kind: 'conv2d',
    lead: [1, 1, 18, 18],
    outputs: 2,
    bias: true,
    conv: { kernel: 2 },
  },
  {
    name: 'conv2d, chunks of inputs',
    kind: 'conv2d',
    lead: [2, 35, 4, 4],
    outputs: 3,
    bias: true,
    conv: { kernel: 3 },
  },
  {
    name: 'conv3d',
    kind: 'conv3d',
    lead: [2, 2, 4, 5, 6],
    outputs: 4,
    bias: true,
    conv: { kernel: [2, 3, 2], stride: [2, 1, 1], padding: [1, 0, 2], dilation: [1, 2, 1], groups: 2 },
  },
  {
    name: 'conv1d, no samples',
    kind: 'conv1d',
    lead: [0, 2, 5],
    outputs: 2,
    bias: true,
    conv: { kernel: 3 },
  },
];

/** The same layers at the size of real ones. */
export const benchShapes: LayerShape[] = [
  { name: 'linear', kind: 'linear', lead: [32, 256], inputs: 1024, outputs: 1024, bias: true, bench: true },
  {
    name: 'linear GPT-2 fc',
    kind: 'linear',
    lead: [8, 512],
    inputs: 768,
    outputs: 3072,
    bias: true,
    bench: true,
  },
  {
    name: 'linear, one position',
    kind: 'linear',
    lead: [4096],
    inputs: 512,
    outputs: 512,
    bias: true,
    bench: true,
  },
  {
    name: 'embedding GPT-2',
    kind: 'embedding',
    lead: [8, 512],
    outputs: 768,
    numEmbeddings: 50257,
    bench: true,
  },
  { name: 'layer-norm', kind: 'layer-norm', lead: [8, 512], outputs: 768, bias: true, bench: true },
  {
    name: 'conv2d ResNet',
    kind: 'conv2d',
    lead: [16, 128, 28, 28],
    outputs: 128,
    bias: true,
    conv: { kernel: 3, padding: 1 },
    bench: true,
  },
];

function floats(random: Random, dims: number[], type: FloatType, skip: Uint8Array | null): Tensor {
  const count = dims.reduce((a, b) => a * b, 1);
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

/** Draws a layer's data. */
export function makeLayer(shape: LayerShape, random: Random): PrivateLayer {
  const { kind, lead } = shape;
  const rows = lead.reduce((a, b) => a * b, 1);
  const [inputType, gradType] = shape.types ?? ['float32', 'float32'];
  let skip: Uint8Array | null = null;
  if (shape.padded !== undefined) {
    const last = rows - rows / lead[0];
    skip = Uint8Array.from({ length: rows }, (_, r) =>
      r >= last || random.uniform() < (shape.padded as number) ? 0 : 1,
    );
  }
  const mask = skip === null ? {} : { mask: new Tensor('uint8', skip, lead) };
  if (kind === 'group-norm') {
    return {
      kind,
      normalized: floats(random, lead, inputType, null),
      gradOutputs: floats(random, lead, gradType, null),
      bias: shape.bias,
    };
  }
  const outputs = shape.outputs as number;
  if (kind === 'conv1d' || kind === 'conv2d' || kind === 'conv3d') {
    return {
      kind,
      ...(shape.conv as NonNullable<LayerShape['conv']>),
      input: floats(random, lead, inputType, null),
      gradOutputs: floats(random, [lead[0], outputs, ...outputSize(shape)], gradType, null),
      bias: shape.bias as boolean,
    };
  }
  const gradOutputs = floats(random, [...lead, outputs], gradType, skip);
  switch (kind) {
    case 'linear':
      return {
        kind,
        activations: floats(random, [...lead, shape.inputs as number], inputType, skip),
        gradOutputs,
        bias: shape.bias as boolean,
        ...mask,
      };
    case 'embedding': {
      const numEmbeddings = shape.numEmbeddings as number;
      // What a padded position holds must not matter, not even an index out of range.
      const ids = Int32Array.from({ length: rows }, (_, r) =>
        skip !== null && skip[r] === 0 ? -7 : random.integer(0, numEmbeddings - 1),
      );
      const indices = shape.wide
        ? new Tensor(
            'int64',
            BigInt64Array.from(ids, (x) => BigInt(x)),
            lead,
          )
        : new Tensor('int32', ids, lead);
      const { paddingIndex } = shape;
      return {
        kind,
        indices,
        gradOutputs,
        numEmbeddings,
        ...(paddingIndex === undefined ? {} : { paddingIndex }),
        ...mask,
      };
    }
    default:
      return {
        kind,
        normalized: floats(random, [...lead, outputs], inputType, skip),
        gradOutputs,
        bias: shape.bias,
        ...mask,
      };
  }
}
