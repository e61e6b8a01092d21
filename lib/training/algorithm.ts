import { HeddleError } from '../errors.ts';
import { checkOptions, optionChoice, optionNumber } from '../op.ts';
import { UPDATE_RULES, type UpdateRule } from './ops/optimizerUpdate.ts';

/** Stochastic gradient descent, as torch.optim.SGD. */
export interface SgdOptions {
  type: 'sgd';
  learningRate: number;
  /** Default 0. */
  momentum?: number;
  /** Default false; needs momentum. */
  nesterov?: boolean;
  /** L2 penalty, added to the gradient. Default 0. */
  weightDecay?: number;
}

/** Adam with decoupled weight decay (torch.optim.AdamW), or LAMB (You et al. 2019). */
export interface AdamOptions {
  type: 'adamw' | 'lamb';
  learningRate: number;
  /** Default 0.9. */
  beta1?: number;
  /** Default 0.999. */
  beta2?: number;
  /** Default 1e-8 (lamb: 1e-6). */
  epsilon?: number;
  /** Default 0.01. */
  weightDecay?: number;
}

export type AlgorithmOptions = SgdOptions | AdamOptions;

/** @internal Checked; every field set. */
export interface Algorithm {
  type: UpdateRule;
  learningRate: number;
  weightDecay: number;
  /** sgd: momentum, else β₁. */
  momentum: number;
  nesterov: boolean;
  beta2: number;
  epsilon: number;
}

const SGD: ReadonlySet<string> = new Set(['type', 'learningRate', 'momentum', 'nesterov', 'weightDecay']);
const ADAM: ReadonlySet<string> = new Set([
  'type',
  'learningRate',
  'beta1',
  'beta2',
  'epsilon',
  'weightDecay',
]);

function fraction(value: number | undefined, fallback: number, name: string): number {
  const v = optionNumber(value, 0, fallback, name);
  if (v >= 1) throw new HeddleError('ERR_OPTION', `${name} must be at least 0 and below 1, got ${v}`);
  return v;
}

/** @internal */
export function checkAlgorithm(options: AlgorithmOptions): Algorithm {
  if (options === null || typeof options !== 'object') {
    throw new HeddleError('ERR_ARGUMENT', 'algorithm: expected an object with type and learningRate');
  }
  const type = optionChoice(options.type ?? '', UPDATE_RULES, 'sgd', 'algorithm.type');
  checkOptions(options, type === 'sgd' ? SGD : ADAM, `algorithm (${type})`);
  const learningRate = optionNumber(options.learningRate ?? Number.NaN, 0, 0, 'algorithm.learningRate');
  const o = options as Omit<SgdOptions, 'type'> & Omit<AdamOptions, 'type'>;
  const sgd = type === 'sgd';
  const weightDecay = optionNumber(o.weightDecay, 0, sgd ? 0 : 0.01, 'algorithm.weightDecay');
  const momentum = sgd
    ? fraction(o.momentum, 0, 'algorithm.momentum')
    : fraction(o.beta1, 0.9, 'algorithm.beta1');
  const nesterov = sgd && o.nesterov === true;
  if (nesterov && momentum === 0) {
    throw new HeddleError('ERR_OPTION', 'algorithm.nesterov needs a momentum above 0');
  }
  const beta2 = sgd ? 0 : fraction(o.beta2, 0.999, 'algorithm.beta2');
  const epsilon = sgd ? 0 : optionNumber(o.epsilon, 0, type === 'lamb' ? 1e-6 : 1e-8, 'algorithm.epsilon');
  return { type, learningRate, weightDecay, momentum, nesterov, beta2, epsilon };
}
