import { runAsync, runSync, type Steps } from '../checkpoint/steps.ts';
import { HeddleError } from '../errors.ts';
import {
  type AsyncOpOptions,
  checkOptions,
  type Op,
  type OpOptions,
  optionChoice,
  optionNumber,
} from '../op.ts';
import { crossEntropyReference } from '../reference/training/crossEntropy.ts';
import { asTensor, checkDims, makeTensor, product, type Tensor, type TensorLike } from '../tensor.ts';
import { asMask } from './blocks/mask.ts';
import { float32, perform, zeros } from './ops/perform.ts';

export interface CrossEntropyOptions {
  /** What a sample's loss is over its own positions. Default mean. Samples are never averaged. */
  reduction?: 'mean' | 'sum';
  /** The gradient is multiplied by it: the optimizer's `lossScale`. Default 1. */
  scale?: number;
  /** uint8 in the dims of the labels, `Pass.mask`: 0 marks padding, whose label is not read and which has no loss. */
  mask?: TensorLike | null;
}

/** What {@link crossEntropy} returns. */
export interface CrossEntropyResult {
  /** float32 `[B]`: each sample's own loss, unscaled. */
  losses: Tensor<'float32'>;
  /** float32, dims of the logits: gradient of each sample's own loss, not averaged over samples. */
  gradient: Tensor<'float32'>;
  /** int32, dims of the labels: the most likely class. */
  prediction: Tensor<'int32'>;
}

const OPTIONS: ReadonlySet<string> = new Set(['reduction', 'scale', 'mask', 'backend', 'threads', 'signal']);

const op: Op = {
  name: 'crossEntropy',
  reference: crossEntropyReference,
  invalid: (index, args) =>
    new HeddleError(
      'ERR_VALUE',
      `labels: element ${index} is ${args[3][index]}: expected -1 to ${args[1] - 1}`,
    ),
};

function* run(
  logits: TensorLike,
  labels: TensorLike,
  options: (CrossEntropyOptions & AsyncOpOptions) | undefined,
): Steps<CrossEntropyResult> {
  checkOptions(options, OPTIONS, 'crossEntropy');
  const x = float32(logits, 'logits');
  let y = asTensor(labels, 'labels', ['int32']);
  if (x.dims.length < 2)
    throw new HeddleError('ERR_SHAPE', `logits: expected [B, …, classes], got [${x.dims.join(', ')}]`);
  const lead = x.dims.slice(0, -1);
  checkDims(y, lead, 'labels', 'the logits');
  const mask = asMask(options?.mask ?? undefined, lead, 'the labels');
  if (mask !== null) {
    const own = y.data.map((label, i) => (mask.data[i] === 0 ? -1 : label));
    y = makeTensor('int32', own, lead);
  }
  const reduction = optionChoice(options?.reduction, ['mean', 'sum'], 'mean', 'reduction');
  const scale = optionNumber(options?.scale, 0, 1, 'scale');
  const classes = x.dims[x.dims.length - 1];
  const rows = product(lead);
  const positions = product(lead.slice(1));
  const factors = new Float32Array(rows).fill(scale);
  const weights = new Float32Array(lead[0]).fill(1);
  if (reduction === 'mean') {
    for (let b = 0; b < lead[0]; b++) {
      let count = 0;
      for (let t = 0; t < positions; t++) if (y.data[b * positions + t] >= 0) count++;
      weights[b] = count === 0 ? 0 : 1 / count;
      factors.fill(scale * weights[b], b * positions, (b + 1) * positions);
    }
  }
  const perRow = new Float32Array(rows);
  const result = {
    losses: zeros([lead[0]]),
    gradient: zeros(x.dims),
    prediction: makeTensor('int32', new Int32Array(rows), lead),
  };
  const args = [rows, classes, x.data, y.data, factors, perRow, result.gradient.data, result.prediction.data];
  yield* perform(op, args, undefined, options);
  for (let b = 0; b < lead[0]; b++) {
    let sum = 0;
    for (let t = 0; t < positions; t++) sum += perRow[b * positions + t];
    result.losses.data[b] = sum * weights[b];
  }
  return result;
}

/**
 * Softmax cross-entropy of each sample, its gradient, and the predicted classes: where a private backward begins.
 * The gradient is that of each sample's own loss, as per-sample clipping needs it.
 * @param logits float32 `[B, …, classes]`
 * @param labels int32 `[B, …]`; −1 marks a position without a label
 * @throws HeddleError `ERR_ARGUMENT`, `ERR_SHAPE`, `ERR_DTYPE`, `ERR_OPTION`, `ERR_VALUE` (a label out of range),
 *   `ERR_BACKEND`, `ERR_ABORTED`
 */
export async function crossEntropy(
  logits: TensorLike,
  labels: TensorLike,
  options?: CrossEntropyOptions & AsyncOpOptions,
): Promise<CrossEntropyResult> {
  return runAsync(run(logits, labels, options));
}

/** {@link crossEntropy} on the calling thread. */
export function crossEntropySync(
  logits: TensorLike,
  labels: TensorLike,
  options?: CrossEntropyOptions & OpOptions,
): CrossEntropyResult {
  return runSync(run(logits, labels, options));
}
