import { HeddleError } from '../errors.ts';
import { optionChoice, optionFlag, optionNumber } from '../op.ts';

export type RouterScore = 'softmax' | 'sigmoid' | 'sqrt-softplus';

/** How logits become weights: the options shared by routing, routing replay and their backward. */
export interface RouterOptions {
  /** Score of an expert: softmax over experts, sigmoid (DeepSeek-V3, Llama 4) or sqrt(softplus). Default softmax. */
  score?: RouterScore;
  /** `'selected'`: softmax over the k selected logits only (gpt-oss). Needs score softmax. Default `'all'`. */
  softmaxOver?: 'all' | 'selected';
  /** Divide each token's k weights by their sum. Default false. */
  normalize?: boolean;
  /** Added to that sum (DeepSeek-V3: 1e-20). Default 0. */
  normalizeEpsilon?: number;
  /** Lower bound of that sum (some implementations use 2^-14). Default 0. */
  normalizeFloor?: number;
  /** Multiplies the weights last (`routed_scaling_factor`). Default 1. */
  scale?: number;
}

export const ROUTER_OPTION_NAMES = [
  'score',
  'softmaxOver',
  'normalize',
  'normalizeEpsilon',
  'normalizeFloor',
  'scale',
] as const;

export const SCORE_CODE: Readonly<Record<RouterScore, number>> = {
  softmax: 0,
  sigmoid: 1,
  'sqrt-softplus': 2,
};
export const SCORES = Object.keys(SCORE_CODE) as RouterScore[];
const OVER = ['all', 'selected'] as const;

/** Validated options in the order of the native boundary. */
export type RouterArguments = [
  score: number,
  overSelected: boolean,
  normalize: boolean,
  epsilon: number,
  floor: number,
  scale: number,
];

const DEFAULTS: RouterArguments = [0, false, false, 0, 0, 1];

export function routerArguments(o: RouterOptions | undefined): RouterArguments {
  if (o === undefined) return DEFAULTS;
  const score = optionChoice(o.score, SCORES, 'softmax', 'score');
  const over = optionChoice(o.softmaxOver, OVER, 'all', 'softmaxOver');
  if (over === 'selected' && score !== 'softmax') {
    throw new HeddleError('ERR_OPTION', `softmaxOver 'selected' needs score 'softmax', got '${score}'`);
  }
  const normalize = optionFlag(o.normalize, false, 'normalize');
  return [
    SCORE_CODE[score],
    over === 'selected',
    normalize,
    optionNumber(o.normalizeEpsilon, 0, 0, 'normalizeEpsilon'),
    optionNumber(o.normalizeFloor, 0, 0, 'normalizeFloor'),
    optionNumber(o.scale, -Infinity, 1, 'scale'),
  ];
}
