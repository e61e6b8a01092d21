import { HeddleError } from '../errors.ts';
import { checkOptions, optionInteger, optionNumber } from '../op.ts';

/**
 * Dynamic loss scaling that stays private. The scale of later steps may depend on this step's data only through what is
 * released with noise: the number of overflowing samples is released with Gaussian noise of its own in every step, and
 * that release is accounted for. A sample that overflows is left out of its step; no step is skipped.
 */
export interface DynamicLossScale {
  /** A power of two. Default 2¹⁶. */
  initial?: number;
  /** Steps without an overflow after which the scale doubles. Default 200. */
  growthInterval?: number;
  /**
   * Standard deviation of the noise on the number of overflowing samples. It costs privacy: a step counts as one with
   * noise multiplier (σ⁻² + countNoise⁻²)^−½. Default 10·σ, which is 0.5 % of σ.
   */
  countNoise?: number;
}

const OPTIONS: ReadonlySet<string> = new Set(['initial', 'growthInterval', 'countNoise']);
const LARGEST = 2 ** 40;
/** Released counts above so many standard deviations are overflows: 4 happen by chance once in 30,000 steps. */
const THRESHOLD = 4;

const powerOfTwo = (x: number) => Number.isInteger(Math.log2(x));

/** @internal The scale and how it moves. */
export class LossScale {
  value: number;
  /** Steps since the last overflow or change. */
  quiet = 0;
  readonly countNoise: number | null;
  readonly growthInterval: number;

  constructor(options: number | DynamicLossScale | undefined, noiseMultiplier: number) {
    if (options === undefined || typeof options === 'number') {
      this.value = optionNumber(options, 0, 1, 'lossScale');
      this.countNoise = null;
      this.growthInterval = 0;
    } else {
      checkOptions(options, OPTIONS, 'lossScale');
      this.value = optionNumber(options.initial, 0, 2 ** 16, 'lossScale.initial');
      this.growthInterval = optionInteger(
        options.growthInterval ?? 200,
        1,
        2 ** 31 - 1,
        'lossScale.growthInterval',
      );
      this.countNoise = optionNumber(options.countNoise, 0, 10 * noiseMultiplier, 'lossScale.countNoise');
      if (this.countNoise === 0 && noiseMultiplier > 0) {
        throw new HeddleError(
          'ERR_OPTION',
          'lossScale.countNoise must be above 0: the scale would depend on the data',
        );
      }
    }
    if (!powerOfTwo(this.value)) {
      throw new HeddleError('ERR_OPTION', `lossScale must be a power of two, got ${this.value}`);
    }
  }

  /** The noise multiplier of a whole step: gradients and count together are one Gaussian release. */
  combined(noiseMultiplier: number): number {
    if (this.countNoise === null || noiseMultiplier === 0) return noiseMultiplier;
    return 1 / Math.sqrt(noiseMultiplier ** -2 + this.countNoise ** -2);
  }

  /** Moves the scale by a released (noisy) number of overflows. */
  update(released: number): void {
    if (this.countNoise === null) return;
    if (released > Math.max(0.5, THRESHOLD * this.countNoise)) {
      this.value = Math.max(1, this.value / 2);
      this.quiet = 0;
    } else if (++this.quiet >= this.growthInterval) {
      this.value = Math.min(LARGEST, this.value * 2);
      this.quiet = 0;
    }
  }
}
