import { encodeFloats, type FloatType } from '../../../lib/dtype.ts';
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
