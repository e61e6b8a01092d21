import { HeddleError } from '../errors.ts';
import { optionChoice, optionNumber } from '../op.ts';
import { AdaptiveClipping, type SavedAdaptiveClipping } from '../privacy/adaptiveClipping.ts';
import { discreteNoisePlan } from '../privacy/discreteNoise.ts';
import type { PrivateOptimizerOptions } from './optimizerOptions.ts';

/** @internal What `addNoise` is told besides key, step and offset. */
export interface NoiseParameters {
  mode: 'continuous' | 'discrete';
  stddev: number;
  granularity?: number;
}

/** The expected batch that the share of unclipped samples is taken of may be off by so much, relatively. */
const SAME = 1e-6;

/** @internal R of the step to come, fixed or following the norms, and the noise on the sum that belongs to it. */
export class ClippingNorm {
  readonly #fixed: number;
  #adaptive: AdaptiveClipping | null = null;
  readonly #layers: number;
  readonly #elements: number;
  readonly #key: Uint8Array;
  readonly #mode: NoiseParameters['mode'];
  /** σ of the sum alone: the noise's standard deviation over R. The count of an adaptive norm has the rest of z. */
  readonly #multiplier: number;
  /** Squared norms of what was accumulated, by micro-batch and layer. */
  #norms: (readonly Float32Array[])[] = [];

  constructor(options: PrivateOptimizerOptions, expectedBatch: number, layers: number, elements: number) {
    const { maxNorm, noiseMultiplier, key } = options;
    this.#layers = layers;
    this.#elements = elements;
    this.#key = key;
    this.#mode = optionChoice(options.noise, ['continuous', 'discrete'], 'continuous', 'noise');
    this.#multiplier = noiseMultiplier;
    if (!(maxNorm instanceof AdaptiveClipping)) {
      this.#fixed = optionNumber(maxNorm ?? Number.NaN, 0, 0, 'maxNorm');
      return;
    }
    const saved = maxNorm.toJSON();
    if (saved.nextStep !== 0) {
      throw new HeddleError(
        'ERR_ARGUMENT',
        `maxNorm: expected an AdaptiveClipping before its first step, got one after step ${saved.nextStep - 1}; a saved optimizer state restores it`,
      );
    }
    if (Math.abs(saved.expectedBatch - expectedBatch) > SAME * expectedBatch) {
      throw new HeddleError(
        'ERR_OPTION',
        `maxNorm.expectedBatch must be the sampler's ${expectedBatch}, got ${saved.expectedBatch}`,
      );
    }
    this.#fixed = saved.maxNorm;
    this.#adaptive = AdaptiveClipping.fromJSON(saved, key);
    if (noiseMultiplier > 0) this.#multiplier = this.#adaptive.gradientNoiseMultiplier(noiseMultiplier);
  }

  get value(): number {
    return this.#adaptive?.maxNorm ?? this.#fixed;
  }

  /** The noise on this step's sum. R was released by the steps before, so a grid may be made from it. */
  noise(): NoiseParameters {
    const maxNorm = this.value;
    const noiseMultiplier = this.#multiplier;
    if (this.#mode === 'continuous' || noiseMultiplier === 0) {
      return { mode: 'continuous', stddev: noiseMultiplier * maxNorm };
    }
    const elements = this.#elements;
    const { stddev, granularity } = discreteNoisePlan({ maxNorm, noiseMultiplier, elements });
    return { mode: 'discrete', stddev, granularity };
  }

  /** Keeps the squared norms of a micro-batch, a list per layer, for the count at the end of the step. */
  collect(squaredNorms: readonly Float32Array[]): void {
    if (this.#adaptive !== null) this.#norms.push(squaredNorms);
  }

  /** Ends a step: R moves by the noised share of its samples that were within R. */
  update(step: number): void {
    if (this.#adaptive === null) return;
    const norms = Array.from({ length: this.#layers }, (_, l) => joined(this.#norms.map((part) => part[l])));
    this.#adaptive.update(norms, step);
    this.#norms = [];
  }

  /** What a run that goes on must have begun with. */
  identity(): unknown {
    if (this.#adaptive === null) return this.#fixed;
    const { quantile, rate, expectedBatch, countStddev } = this.#adaptive;
    return { initial: this.#fixed, quantile, rate, expectedBatch, countStddev };
  }

  toJSON(): SavedAdaptiveClipping | null {
    return this.#adaptive?.toJSON() ?? null;
  }

  /** Checks what {@link toJSON} gave after `steps` steps; the function that it returns goes on from it. */
  open(saved: SavedAdaptiveClipping | null | undefined, steps: number): () => void {
    const restored = this.#adaptive === null ? null : AdaptiveClipping.fromJSON(saved as never, this.#key);
    if (restored !== null) {
      const { nextStep } = restored.toJSON();
      const configuration = (a: AdaptiveClipping | null) =>
        JSON.stringify({ ...a?.toJSON(), maxNorm: 0, nextStep: 0 });
      const same = configuration(restored) === configuration(this.#adaptive);
      if (nextStep !== steps || !same) {
        const found = same ? `that of step ${nextStep}, not ${steps}` : 'of another configuration';
        throw new HeddleError('ERR_CHECKPOINT', `optimizer state: its clipping norm is ${found}`);
      }
    }
    return () => {
      this.#adaptive = restored;
      this.#norms = [];
    };
  }
}

function joined(parts: readonly Float32Array[]): Float32Array {
  const out = new Float32Array(parts.reduce((sum, p) => sum + p.length, 0));
  let at = 0;
  for (const part of parts) {
    out.set(part, at);
    at += part.length;
  }
  return out;
}
