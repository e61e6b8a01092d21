import { DTYPE_CODE } from '../dtype.ts';
import { HeddleError } from '../errors.ts';
import { optionInteger } from '../op.ts';
import { asTensor, product, type Tensor, type TensorLike } from '../tensor.ts';
import {
  asMask,
  checkIndices,
  checkLeading,
  featureTensor,
  type PreparedLayer,
  values,
} from './layerArguments.ts';

/**
 * One matrix W `[vocabulary, d]` used twice, as embedding `x_t = W[a_t]` and as head `logits_t = W·h_t`. The norm is
 * that of the one shared gradient, with the cross term that adding the two layers' norms leaves out.
 */
export interface TiedEmbeddingLayer {
  kind: 'tied-embedding';
  /** int32 or int64 `[B, …]`. */
  indices: TensorLike;
  /** Gradients of the embedding's output, `[B, …, d]`. */
  gradEmbeddings: TensorLike;
  /** What the head read, `[B, …, d]`. */
  hidden: TensorLike;
  /** Gradients of the logits, `[B, …, vocabulary]`. */
  gradLogits: TensorLike;
  /** The row to which the embedding (not the head) gives no gradient. */
  paddingIndex?: number;
  /** uint8 `[B, …]`: 0 marks a position of padding, which is not read in either use. */
  mask?: TensorLike;
}

export const TIED_KEYS: ReadonlySet<string> = new Set([
  'kind',
  'indices',
  'gradEmbeddings',
  'hidden',
  'gradLogits',
  'paddingIndex',
  'mask',
]);

/** @internal */
export function prepareTied(layer: TiedEmbeddingLayer): PreparedLayer {
  const ids = asTensor(layer.indices, 'layer.indices', ['int32', 'int64']);
  if (ids.dims.length < 1) throw new HeddleError('ERR_SHAPE', 'layer.indices: expected [B, …], got []');
  const e = featureTensor(layer.gradEmbeddings, 'layer.gradEmbeddings');
  const h = featureTensor(layer.hidden, 'layer.hidden');
  const g = featureTensor(layer.gradLogits, 'layer.gradLogits');
  const lead = ids.dims;
  checkLeading(e.dims.slice(0, -1), lead, 'layer.gradEmbeddings', 'indices');
  checkLeading(h.dims.slice(0, -1), lead, 'layer.hidden', 'indices');
  checkLeading(g.dims.slice(0, -1), lead, 'layer.gradLogits', 'indices');
  const width = e.dims[e.dims.length - 1];
  if (h.dims[h.dims.length - 1] !== width) {
    throw new HeddleError(
      'ERR_SHAPE',
      `layer.hidden: expected ${width} features as gradEmbeddings, got [${h.dims.join(', ')}]`,
    );
  }
  const numEmbeddings = g.dims[g.dims.length - 1];
  const paddingIndex =
    layer.paddingIndex === undefined
      ? -1
      : optionInteger(layer.paddingIndex, 0, numEmbeddings - 1, 'layer.paddingIndex');
  const mask = asMask(layer.mask, lead);
  const indices = checkIndices(ids, numEmbeddings, mask?.data);
  const samples = lead[0];
  const positions = product(lead.slice(1));
  return {
    stem: 'tiedEmbedding',
    args: [
      samples,
      positions,
      width,
      numEmbeddings,
      indices,
      paddingIndex,
      mask?.data ?? null,
      e.data,
      DTYPE_CODE[e.type],
      h.data,
      DTYPE_CODE[h.type],
      g.data,
      DTYPE_CODE[g.type],
    ],
    samples,
    preferGhost: 2 * positions * positions <= width * numEmbeddings,
    inputs: [ids, e, h, g, ...(mask === null ? [] : [mask])] as Tensor[],
    parameters: [['weight', [numEmbeddings, width]]],
    reference: () => ({
      kind: 'tied-embedding',
      indices,
      gradEmbeddings: values(e),
      hidden: values(h),
      gradLogits: values(g),
      samples,
      positions,
      width,
      numEmbeddings,
      paddingIndex,
      mask: mask?.data,
    }),
  };
}
