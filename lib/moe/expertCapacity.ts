import { HeddleError } from '../errors.ts';
import { checkOptions, optionChoice, optionInteger, optionNumber } from '../op.ts';

/** Whose rounding {@link expertCapacity} follows. */
export type CapacityStyle = 'megablocks' | 'tutel' | 'megatron' | 'vmoe';

export interface ExpertCapacityOptions {
  tokens: number;
  /** Routes per token; 1 for expert choice. */
  k: number;
  numExperts: number;
  /** Capacity factor: 1 leaves room for exactly the average load. */
  factor: number;
  style: CapacityStyle;
}

const STYLES = ['megablocks', 'tutel', 'megatron', 'vmoe'] as const;
const OPTIONS: ReadonlySet<string> = new Set(['tokens', 'k', 'numExperts', 'factor', 'style']);

/**
 * Capacity of one expert from a capacity factor f, as other projects round it:
 * - `'megablocks'`: ⌊f · kT/E⌋ (may be 0)
 * - `'tutel'`: k · ⌊f · ⌈T/E⌉⌋
 * - `'megatron'`: ⌈kT/E · f⌉ (DeepSpeed, too)
 * - `'vmoe'`: ⌈f · kT/E⌉, then up to a multiple of 4
 *
 * @throws HeddleError `ERR_OPTION`
 */
export function expertCapacity(options: ExpertCapacityOptions): number {
  checkOptions(options, OPTIONS, 'expertCapacity');
  if (options === undefined) throw new HeddleError('ERR_ARGUMENT', 'expertCapacity: options are required');
  const tokens = optionInteger(options.tokens, 0, Number.MAX_SAFE_INTEGER, 'tokens');
  const k = optionInteger(options.k, 1, Number.MAX_SAFE_INTEGER, 'k');
  const experts = optionInteger(options.numExperts, 1, Number.MAX_SAFE_INTEGER, 'numExperts');
  const factor = optionNumber(options.factor, 0, Number.NaN, 'factor');
  if (Number.isNaN(factor)) throw new HeddleError('ERR_OPTION', 'factor is required');
  if (options.style === undefined) {
    throw new HeddleError('ERR_OPTION', `style is required: one of ${STYLES.join(', ')}`);
  }
  // The order of the operations is that of each project: it decides where a product lands just above an integer.
  switch (optionChoice(options.style, STYLES, 'megatron', 'style')) {
    case 'megablocks':
      return Math.floor(factor * ((k * tokens) / experts));
    case 'tutel':
      return k * Math.floor(factor * Math.ceil(tokens / experts));
    case 'megatron':
      return Math.ceil(((k * tokens) / experts) * factor);
    case 'vmoe':
      return Math.ceil(Math.ceil((tokens * k * factor) / experts) / 4) * 4;
  }
}
