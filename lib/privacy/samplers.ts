import { HeddleError } from '../errors.ts';
import { checkOptions, type OpOptions, optionInteger } from '../op.ts';
import { SAMPLING_STREAM, SHUFFLE_STREAM } from '../reference/privacy/gaussianNoise.ts';
import { chacha20Blocks, keyArgument, keyFingerprint } from './chacha20.ts';

/** What an accountant may assume about the batches of a sampler. */
export type SamplingGuarantee =
  /** Every example is in every batch with probability `sampleRate`, independently: what RDP and PRV here account for. */
  | 'poisson'
  /**
   * Poisson batches cut to at most `maxBatch` examples at random. Equal to Poisson batches except with probability τ
   * per step ({@link TruncatedPoissonSampler.overflowProbability}), which adds (1 + e^ε)·steps·τ to the Poisson δ: the
   * `overflowProbability` of a phase.
   */
  | 'poisson-truncated'
  /**
   * Fixed batches of a shuffle: no amplification by subsampling may be claimed. Each example is in one batch of an
   * epoch, so an epoch counts as one step with sample rate 1 (neighbours that differ by zeroing an example out).
   */
  | 'shuffled';

export interface SamplerOptions {
  /** 32 secret bytes; the run's noise key may be used, sampling reads another stream of it. */
  key: Uint8Array;
  /** Examples in the dataset. */
  size: number;
}

/**
 * What determines a sampler's batches, as a run saves it. A sampler has no other state: the batch of a step is a function
 * of this and the step.
 */
export interface SavedSampler {
  guarantee: SamplingGuarantee;
  size: number;
  sampleRate: number;
  maxBatch?: number;
  /** Recognises the key; does not reveal it. */
  keyFingerprint: string;
}

const BASE = ['key', 'size'];
const RATE_OPTIONS: ReadonlySet<string> = new Set([...BASE, 'sampleRate']);
const TRUNCATED_OPTIONS: ReadonlySet<string> = new Set([...BASE, 'sampleRate', 'maxBatch']);
const SHUFFLED_OPTIONS: ReadonlySet<string> = new Set([...BASE, 'batch', 'dropLast']);
const MAX_SIZE = 2 ** 31 - 1;

/** Random 64-bit integers of one step, as pairs of words: element i has words 2i, 2i + 1 of the step's stream. */
function stepWords(
  key: Uint32Array,
  stream: number,
  step: number,
  elements: number,
  options?: OpOptions,
): Uint32Array {
  optionInteger(step, 0, Number.MAX_SAFE_INTEGER, 'step');
  const nonce = Uint32Array.of(stream * 2 ** 24, step % 2 ** 32, Math.floor(step / 2 ** 32));
  return chacha20Blocks(key, 0, nonce, Math.ceil(elements / 8), options);
}

function checkRate(rate: unknown): number {
  if (typeof rate !== 'number' || !(rate > 0 && rate <= 1)) {
    throw new HeddleError('ERR_OPTION', `sampleRate must be above 0 and at most 1, got ${String(rate)}`);
  }
  return rate;
}

function checkBase(options: SamplerOptions, allowed: ReadonlySet<string>, name: string): Uint32Array {
  if (options === undefined) throw new HeddleError('ERR_ARGUMENT', `${name}: options are required`);
  checkOptions(options, allowed, name);
  optionInteger(options.size, 0, MAX_SIZE, 'size');
  return keyArgument(options.key);
}

/**
 * Poisson sampling, the batches that the accountants assume: every example joins every batch with probability
 * `sampleRate`, independently of all others. Batches vary in size and may be empty: an empty batch is a step of noise
 * only, and counts. Scale by the public {@link expectedBatch}, never by the size that was drawn.
 *
 * A batch is a function of (key, step) alone, so a resumed run draws the batches it would have drawn.
 */
export class PoissonSampler {
  readonly guarantee: SamplingGuarantee = 'poisson';
  readonly size: number;
  readonly sampleRate: number;
  protected readonly key: Uint32Array;
  readonly #fingerprint: string;

  /** @throws HeddleError `ERR_ARGUMENT`, `ERR_OPTION` */
  constructor(options: SamplerOptions & { sampleRate: number }) {
    this.key = checkBase(
      options,
      new.target === PoissonSampler ? RATE_OPTIONS : TRUNCATED_OPTIONS,
      new.target.name,
    );
    this.size = options.size;
    this.sampleRate = checkRate(options.sampleRate);
    this.#fingerprint = keyFingerprint(options.key, 'heddle.privacy.sampler');
  }

  /** size·sampleRate: public, and what a step divides by. */
  get expectedBatch(): number {
    return this.size * this.sampleRate;
  }

  /** The saved form, without the key; called by `JSON.stringify`. */
  toJSON(): SavedSampler {
    const { guarantee, size, sampleRate } = this;
    return { guarantee, size, sampleRate, keyFingerprint: this.#fingerprint };
  }

  /** Indices of the examples in the batch of `step`, ascending. */
  batch(step: number, options?: OpOptions): Int32Array {
    const words = stepWords(this.key, SAMPLING_STREAM, step, this.size, options);
    // u < rate for u of 64 bits, compared word by word: a double would round both.
    const scaled = this.sampleRate * 2 ** 32;
    const high = Math.floor(scaled);
    const low = (scaled - high) * 2 ** 32;
    const out = new Int32Array(this.size);
    let count = 0;
    for (let i = 0; i < this.size; i++) {
      const h = words[2 * i + 1];
      if (h < high || (h === high && words[2 * i] < low)) out[count++] = i;
    }
    return out.slice(0, count);
  }
}

/**
 * Poisson batches of at most `maxBatch` examples, for a fixed amount of memory: a larger draw is cut to a uniformly
 * random part of it. The cut makes examples depend on each other, so the Poisson accountants hold only up to the
 * probability of a cut: give them {@link overflowProbability} in the phase, as `PrivateOptimizer` does.
 */
export class TruncatedPoissonSampler extends PoissonSampler {
  override readonly guarantee: SamplingGuarantee = 'poisson-truncated';
  readonly maxBatch: number;

  constructor(options: SamplerOptions & { sampleRate: number; maxBatch: number }) {
    super(options);
    this.maxBatch = optionInteger(options.maxBatch, 1, MAX_SIZE, 'maxBatch');
  }

  override toJSON(): SavedSampler {
    return { ...super.toJSON(), maxBatch: this.maxBatch };
  }

  /**
   * τ: bound of the probability that one step's draw exceeds `maxBatch` (Chernoff: e^{−n·KL((maxBatch + 1)/n ‖ q)}); 1
   * where it says nothing. n is `size` + 1, so that it holds for the neighbouring dataset with one example more as well.
   */
  get overflowProbability(): number {
    const n = this.size + 1;
    const q = this.sampleRate;
    const a = (this.maxBatch + 1) / n;
    if (this.maxBatch >= n) return 0;
    if (a <= q) return 1;
    const rest = a === 1 ? 0 : (1 - a) * Math.log((1 - a) / (1 - q));
    return Math.exp(-n * (a * Math.log(a / q) + rest));
  }

  override batch(step: number, options?: OpOptions): Int32Array {
    const all = super.batch(step, options);
    if (all.length <= this.maxBatch) return all;
    // The part with the smallest numbers from words that no draw has read: those behind the dataset's own.
    const words = stepWords(this.key, SAMPLING_STREAM, step, 2 * this.size, options).subarray(2 * this.size);
    const order = Array.from(all);
    order.sort((a, b) => words[2 * a + 1] - words[2 * b + 1] || words[2 * a] - words[2 * b] || a - b);
    return Int32Array.from(order.slice(0, this.maxBatch)).sort();
  }
}

/**
 * Batches of one size from a fresh shuffle in every epoch: what most training code does. It is NOT Poisson sampling:
 * accounting it as such understates ε, sometimes several times. Account each epoch as one step with sample rate 1.
 */
export class ShuffledSampler {
  readonly guarantee: SamplingGuarantee = 'shuffled';
  readonly size: number;
  readonly batchSize: number;
  readonly batchesPerEpoch: number;
  private readonly key: Uint32Array;
  private order: { epoch: number; indices: Int32Array } | null = null;

  /** @param options `dropLast` (default true) leaves out a last batch that would be smaller. */
  constructor(options: SamplerOptions & { batch: number; dropLast?: boolean }) {
    this.key = checkBase(options, SHUFFLED_OPTIONS, 'ShuffledSampler');
    this.size = options.size;
    this.batchSize = optionInteger(options.batch, 1, MAX_SIZE, 'batch');
    const batches = this.size / this.batchSize;
    this.batchesPerEpoch = options.dropLast === false ? Math.ceil(batches) : Math.floor(batches);
  }

  /** Examples of the batch of `step`; steps count on through the epochs. */
  batch(step: number, options?: OpOptions): Int32Array {
    optionInteger(step, 0, Number.MAX_SAFE_INTEGER, 'step');
    if (this.batchesPerEpoch === 0) return new Int32Array(0);
    const epoch = Math.floor(step / this.batchesPerEpoch);
    if (this.order?.epoch !== epoch) this.order = { epoch, indices: this.shuffle(epoch, options) };
    const at = (step % this.batchesPerEpoch) * this.batchSize;
    return this.order.indices.slice(at, at + this.batchSize);
  }

  /** Fisher–Yates with 53-bit fractions of the epoch's words: biased by less than 2⁻²². */
  private shuffle(epoch: number, options?: OpOptions): Int32Array {
    const words = stepWords(this.key, SHUFFLE_STREAM, epoch, this.size, options);
    const out = Int32Array.from({ length: this.size }, (_, i) => i);
    for (let i = this.size - 1; i > 0; i--) {
      const fraction = (words[2 * i + 1] * 2 ** 21 + (words[2 * i] >>> 11)) * 2 ** -53;
      const j = Math.floor(fraction * (i + 1));
      const held = out[i];
      out[i] = out[j];
      out[j] = held;
    }
    return out;
  }
}
