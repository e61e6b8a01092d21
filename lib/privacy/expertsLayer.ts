import { HeddleError } from '../errors.ts';
import { optionInteger } from '../op.ts';
import { asTensor, type Tensor, type TensorLike } from '../tensor.ts';
import {
  argsOf,
  asBoolean,
  asMask,
  checkIndices,
  featureTensor,
  type PreparedLayer,
  type Rows,
  tensorsOf,
  values,
} from './layerArguments.ts';

/**
 * One linear layer per expert, W `[E, p, d]`, as a mixture of experts routes to them: the rows of a batch are spread
 * over the experts, and a sample's gradient is what all its rows left at every expert.
 */
export interface ExpertsLayer {
  kind: 'experts';
  /** What the experts read, one row for each route, in any order: `[N, d]`. */
  activations: TensorLike;
  /** Gradients of each sample's own loss with respect to the experts' outputs, route weights included: `[N, p]`. */
  gradOutputs: TensorLike;
  /** int32 or int64 `[N]`: the sample that a row belongs to, or −1 for a row that is not read. */
  sampleIds: TensorLike;
  /** int32 or int64 `[N]`: the expert that it went to, or −1 for a row that was dropped. */
  expertIds: TensorLike;
  /** B. */
  samples: number;
  /** E. */
  numExperts: number;
  /** Whether the experts have biases; no default, as for linear layers. */
  bias: boolean;
  /** uint8 `[N]`: 0 marks a row of padding, which is not read at all. */
  mask?: TensorLike;
}

export const EXPERTS_KEYS: ReadonlySet<string> = new Set([
  'kind',
  'activations',
  'gradOutputs',
  'sampleIds',
  'expertIds',
  'samples',
  'numExperts',
  'bias',
  'mask',
]);

const MAX_SAMPLES = 2 ** 31 - 1;
const MAX_EXPERTS = 2 ** 20;

/** @internal */
export function prepareExperts(layer: ExpertsLayer): PreparedLayer {
  const a = featureTensor(layer.activations, 'layer.activations');
  const g = featureTensor(layer.gradOutputs, 'layer.gradOutputs');
  const [count, inputs] = a.dims;
  if (a.dims.length !== 2) {
    throw new HeddleError('ERR_SHAPE', `layer.activations: expected [N, d], got [${a.dims.join(', ')}]`);
  }
  if (g.dims.length !== 2 || g.dims[0] !== count) {
    throw new HeddleError(
      'ERR_SHAPE',
      `layer.gradOutputs: expected [${count}, p], got [${g.dims.join(', ')}]`,
    );
  }
  const outputs = g.dims[1];
  const samples = optionInteger(layer.samples, 0, MAX_SAMPLES, 'layer.samples');
  const experts = optionInteger(layer.numExperts, 1, MAX_EXPERTS, 'layer.numExperts');
  const bias = asBoolean(layer.bias, undefined);
  const mask = asMask(layer.mask, [count]);
  const ids = (name: 'sampleIds' | 'expertIds', limit: number): [Tensor, Int32Array] => {
    const t = asTensor(layer[name], `layer.${name}`, ['int32', 'int64'], 1);
    if (t.dims[0] !== count) {
      throw new HeddleError('ERR_SHAPE', `layer.${name}: expected [${count}], got [${t.dims[0]}]`);
    }
    return [t as Tensor, checkIndices(t, limit, mask?.data, `layer.${name}`, -1)];
  };
  const [sampleTensor, sampleOf] = ids('sampleIds', samples);
  const [expertTensor, expertOf] = ids('expertIds', experts);
  const rows: Rows = { samples, positions: count, inputs, outputs, input: a, gradOutputs: g, mask, bias };
  return {
    stem: 'experts',
    args: [...argsOf(rows), sampleOf, expertOf, experts],
    samples,
    preferGhost: null,
    inputs: [...tensorsOf(rows), sampleTensor, expertTensor],
    parameters: [
      ['weight', [experts, outputs, inputs]],
      ['bias', bias ? [experts, outputs] : null],
    ],
    reference: () => ({
      kind: 'experts',
      activations: values(a),
      gradOutputs: values(g),
      sampleOf,
      expertOf,
      rows: count,
      samples,
      experts,
      inputs,
      outputs,
      bias,
      mask: mask?.data,
    }),
  };
}
