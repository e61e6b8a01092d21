import { HeddleError } from '../errors.ts';
import { checkOptions, optionChoice, optionInteger, optionNumber } from '../op.ts';

/** Context extension by changed frequencies; `originalLength` is the context length of the pretrained model. */
export type RotaryScaling =
  | { type: 'linear'; factor: number }
  /** The base becomes `base * factor^(d / (d - 2))`. */
  | { type: 'ntk'; factor: number }
  | {
      type: 'yarn';
      factor: number;
      originalLength: number;
      /** Rotations in the original context above which a frequency stays. Default 32. */
      betaFast?: number;
      /** Rotations below which it is divided by factor. Default 1. */
      betaSlow?: number;
      /** Factor of the rotated elements. Default `0.1 ln(factor) + 1`. */
      attentionFactor?: number;
    }
  | {
      type: 'llama3';
      factor: number;
      originalLength: number;
      lowFrequencyFactor: number;
      highFrequencyFactor: number;
    };

const TYPES = ['linear', 'ntk', 'yarn', 'llama3'] as const;
const PROPERTIES: Readonly<Record<(typeof TYPES)[number], ReadonlySet<string>>> = {
  linear: new Set(['type', 'factor']),
  ntk: new Set(['type', 'factor']),
  yarn: new Set(['type', 'factor', 'originalLength', 'betaFast', 'betaSlow', 'attentionFactor']),
  llama3: new Set(['type', 'factor', 'originalLength', 'lowFrequencyFactor', 'highFrequencyFactor']),
};

/** A number above 0; without a fallback it is required. */
function positive(value: unknown, fallback: number | undefined, name: string): number {
  const n = optionNumber(value ?? fallback ?? Number.NaN, 0, 0, name);
  if (n === 0) throw new HeddleError('ERR_OPTION', `${name} must be greater than 0`);
  return n;
}

/** The dim / 2 frequencies (radians per position), and the factor of the rotated elements. */
export function rotaryFrequencies(
  dim: number,
  baseOption: number | undefined,
  scaling: RotaryScaling | undefined,
): { frequencies: Float64Array; factor: number } {
  let base = positive(baseOption, 10000, 'base');
  const plain = () => Float64Array.from({ length: dim / 2 }, (_, i) => base ** ((-2 * i) / dim));
  if (scaling === undefined) return { frequencies: plain(), factor: 1 };
  const type = optionChoice(scaling?.type ?? null, TYPES, 'linear', 'scaling.type');
  checkOptions(scaling, PROPERTIES[type], 'scaling');
  const factor = positive(scaling.factor, undefined, 'scaling.factor');
  if (scaling.type === 'linear') return { frequencies: plain().map((f) => f / factor), factor: 1 };
  if (scaling.type === 'ntk') {
    if (dim === 2) throw new HeddleError('ERR_OPTION', 'scaling ntk needs more than 2 rotated elements');
    base *= factor ** (dim / (dim - 2));
    return { frequencies: plain(), factor: 1 };
  }
  const original = optionInteger(scaling.originalLength, 1, 2 ** 31 - 1, 'scaling.originalLength');
  if (scaling.type === 'llama3') {
    const low = positive(scaling.lowFrequencyFactor, undefined, 'scaling.lowFrequencyFactor');
    const high = positive(scaling.highFrequencyFactor, undefined, 'scaling.highFrequencyFactor');
    if (high <= low) {
      throw new HeddleError('ERR_OPTION', 'scaling.highFrequencyFactor must be above lowFrequencyFactor');
    }
    const frequencies = plain().map((f) => {
      const turns = (original * f) / (2 * Math.PI);
      const smooth = Math.min(1, Math.max(0, (turns - low) / (high - low)));
      return (1 - smooth) * (f / factor) + smooth * f;
    });
    return { frequencies, factor: 1 };
  }
  const fast = positive(scaling.betaFast, 32, 'scaling.betaFast');
  const slow = positive(scaling.betaSlow, 1, 'scaling.betaSlow');
  // Index of the frequency that turns `rotations` times in the original context.
  const indexOf = (rotations: number) =>
    (dim * Math.log(original / (rotations * 2 * Math.PI))) / (2 * Math.log(base));
  const low = Math.max(Math.floor(indexOf(fast)), 0);
  let high = Math.min(Math.ceil(indexOf(slow)), dim - 1);
  if (low === high) high += 0.001;
  const frequencies = plain().map((f, i) => {
    const ramp = Math.min(1, Math.max(0, (i - low) / (high - low)));
    return (f / factor) * ramp + f * (1 - ramp);
  });
  const standard = factor <= 1 ? 1 : 0.1 * Math.log(factor) + 1;
  return { frequencies, factor: positive(scaling.attentionFactor, standard, 'scaling.attentionFactor') };
}
