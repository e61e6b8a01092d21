import { DTYPE_CODE, FLOAT_TYPES } from '../dtype.ts';
import { HeddleError } from '../errors.ts';
import { optionNumber } from '../op.ts';
import { asTensor, product, type TensorLike } from '../tensor.ts';
import {
  argsOf,
  asMask,
  checkLeading,
  featureTensor,
  type PreparedLayer,
  type Rows,
  tensorsOf,
  values,
} from './layerArguments.ts';

/**
 * A low-rank adapter `y = s·B·A·x` beside a frozen matrix (Hu et al. 2021, "LoRA"): gradients of A and B, without a
 * p × d matrix anywhere. Float32, bfloat16 or float16, each tensor its own.
 */
export interface LoraLayer {
  kind: 'lora';
  /** What the adapted layer read, `[B, …, d]`. */
  activations: TensorLike;
  /** Gradients of each sample's own loss with respect to its output, `[B, …, p]`. */
  gradOutputs: TensorLike;
  /** A `[rank, d]`. */
  a: TensorLike;
  /** B `[p, rank]`. */
  b: TensorLike;
  /** s, usually α/rank. Default 1. */
  scale?: number;
  /** uint8 `[B, …]`: 0 marks a position of padding, which is not read at all. */
  mask?: TensorLike;
}

export const LORA_KEYS: ReadonlySet<string> = new Set([
  'kind',
  'activations',
  'gradOutputs',
  'a',
  'b',
  'scale',
  'mask',
]);

/** @internal */
export function prepareLora(layer: LoraLayer): PreparedLayer {
  const x = featureTensor(layer.activations, 'layer.activations');
  const g = featureTensor(layer.gradOutputs, 'layer.gradOutputs');
  const lead = x.dims.slice(0, -1);
  checkLeading(g.dims.slice(0, -1), lead, 'layer.gradOutputs', 'activations');
  const inputs = x.dims[x.dims.length - 1];
  const outputs = g.dims[g.dims.length - 1];
  const a = asTensor(layer.a, 'layer.a', FLOAT_TYPES, 2);
  const b = asTensor(layer.b, 'layer.b', FLOAT_TYPES, 2);
  const rank = a.dims[0];
  if (a.dims[1] !== inputs || rank < 1) {
    throw new HeddleError('ERR_SHAPE', `layer.a: expected [rank, ${inputs}], got [${a.dims.join(', ')}]`);
  }
  if (b.dims[0] !== outputs || b.dims[1] !== rank) {
    throw new HeddleError('ERR_SHAPE', `layer.b: expected [${outputs}, ${rank}], got [${b.dims.join(', ')}]`);
  }
  const scale = optionNumber(layer.scale, -Infinity, 1, 'layer.scale');
  const mask = asMask(layer.mask, lead);
  const positions = product(lead.slice(1));
  const rows: Rows = {
    samples: lead[0],
    positions,
    inputs,
    outputs,
    input: x,
    gradOutputs: g,
    mask,
    bias: false,
  };
  return {
    stem: 'lora',
    args: [...argsOf(rows), rank, a.data, DTYPE_CODE[a.type], b.data, DTYPE_CODE[b.type], scale],
    samples: lead[0],
    preferGhost: null,
    inputs: [...tensorsOf(rows), a, b],
    parameters: [
      ['a', [rank, inputs]],
      ['b', [outputs, rank]],
    ],
    reference: () => ({
      kind: 'lora',
      activations: values(x),
      gradOutputs: values(g),
      a: values(a),
      b: values(b),
      samples: lead[0],
      positions,
      inputs,
      outputs,
      rank,
      scale: Math.fround(scale),
      mask: mask?.data,
    }),
  };
}
