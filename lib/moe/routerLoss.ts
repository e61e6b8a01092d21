import { DTYPE_CODE } from '../dtype.ts';
import { HeddleError } from '../errors.ts';
import { checkOptions, checkOut, type Op, optionChoice, optionFlag, optionNumber } from '../op.ts';
import { allocate, asTensor, makeTensor, type Tensor, type TensorLike } from '../tensor.ts';
import { type RouterScore, SCORE_CODE } from './routerOptions.ts';
import { checkLogits } from './routeTopK.ts';

/** An auxiliary loss. */
export interface RouterLoss {
  value: number;
  /** float32 `[tokens, experts]`: gradient by the logits, where the option `gradient` asked for it. */
  gradient?: Tensor<'float32'>;
}

/** Options that the losses share. */
export interface RouterLossOptions {
  /** uint8 `[tokens]`: 0 = padding, which counts for nothing and gets a gradient of zero. */
  mask?: TensorLike;
  /** Multiplies the value and the gradient. Default 1. */
  coefficient?: number;
  /** Also compute the gradient by the logits. Default false. */
  gradient?: boolean;
  /** float32 `[tokens, experts]` that receives the gradient; needs `gradient: true`. */
  out?: TensorLike;
}

/** How the losses that look at probabilities make them from the logits. */
export interface LossScoreOptions {
  /** Default softmax. `'none'`: what is passed as logits are the probabilities themselves. */
  score?: RouterScore | 'none';
  /** Divide each token's scores by their sum (DeepSeek-V3, Megatron with sigmoid). Default false. */
  normalize?: boolean;
}

const RUN = ['backend', 'threads', 'signal'];
export const LOSS_OPTIONS = ['mask', 'coefficient', 'gradient', 'out', ...RUN];
export const SCORE_OPTIONS = ['score', 'normalize'];
const LOSS_SCORES: Readonly<Record<RouterScore | 'none', number>> = { ...SCORE_CODE, none: 3 };
const SCORES = Object.keys(LOSS_SCORES) as (RouterScore | 'none')[];

/** What {@link prepareLoss} needs from one loss. */
export interface LossSetup {
  name: string;
  allowed: ReadonlySet<string>;
  logits?: TensorLike;
  indices?: TensorLike;
  /** For a loss without logits. */
  numExperts?: number;
  perToken?: boolean;
}

/** Words the error for an id out of range. */
export const invalidIndex: Op['invalid'] = (index, args) => {
  const [, , , experts, , , , indices, k] = args;
  const at = `[${Math.floor(index / k)}, ${index % k}]`;
  return new HeddleError('ERR_VALUE', `indices${at} is ${indices[index]}: expected -1 to ${experts - 1}`);
};

function checkIndices(indices: TensorLike, tokens: number | undefined): Tensor<'int32'> {
  const ids = asTensor(indices, 'indices', ['int32'], 2);
  if (tokens !== undefined && ids.dims[0] !== tokens) {
    throw new HeddleError('ERR_SHAPE', `indices: expected ${tokens} tokens as in logits, got ${ids.dims[0]}`);
  }
  if (ids.dims[1] < 1) throw new HeddleError('ERR_SHAPE', 'indices: expected at least 1 id per token, got 0');
  return ids;
}

/** Checks the arguments of a loss and lays them out for the native boundary. */
export function prepareLoss(
  setup: LossSetup,
  options: (RouterLossOptions & LossScoreOptions) | undefined,
): { args: unknown[]; finish: () => RouterLoss } {
  checkOptions(options, setup.allowed, setup.name);
  const l = setup.logits === undefined ? null : checkLogits(setup.logits);
  const ids = setup.indices === undefined ? null : checkIndices(setup.indices, l?.dims[0]);
  const tokens = l === null ? (ids as Tensor).dims[0] : l.dims[0];
  const experts = l === null ? (setup.numExperts as number) : l.dims[1];
  const score = optionChoice(options?.score, SCORES, 'softmax', 'score');
  const normalize = optionFlag(options?.normalize, false, 'normalize');
  const wantsGradient = optionFlag(options?.gradient, false, 'gradient');
  const coefficient = optionNumber(options?.coefficient, -Infinity, 1, 'coefficient');
  let mask: Tensor<'uint8'> | null = null;
  if (options?.mask !== undefined) {
    mask = asTensor(options.mask, 'mask', ['uint8'], 1);
    if (mask.dims[0] !== tokens) {
      throw new HeddleError('ERR_SHAPE', `mask: expected [${tokens}], got [${mask.dims[0]}]`);
    }
  }
  let gradient: Tensor<'float32'> | null = null;
  if (options?.out !== undefined) {
    if (!wantsGradient)
      throw new HeddleError('ERR_OPTION', 'out receives the gradient: it needs gradient: true');
    gradient = asTensor(options.out, 'out', ['float32']);
    checkOut(gradient, [tokens, experts], [l, ids, mask], 'out');
  } else if (wantsGradient) {
    gradient = makeTensor('float32', allocate('float32', tokens * experts), [tokens, experts]);
  }
  const value = new Float64Array(1);
  const args = [
    l === null ? null : l.data,
    l === null ? 0 : DTYPE_CODE[l.type],
    tokens,
    experts,
    LOSS_SCORES[score],
    normalize,
    mask === null ? null : mask.data,
    ids === null ? null : ids.data,
    ids === null ? 0 : ids.dims[1],
    setup.perToken === true,
    coefficient,
    value,
    gradient === null ? null : gradient.data,
  ];
  return {
    args,
    finish: () => (gradient === null ? { value: value[0] } : { value: value[0], gradient }),
  };
}
