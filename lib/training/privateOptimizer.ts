import { runAsync, runSync, type Steps, step } from '../checkpoint/steps.ts';
import { HeddleError } from '../errors.ts';
import { checkOptions, optionInteger, optionNumber } from '../op.ts';
import type { AccountantOptions, EpsilonResult } from '../privacy/accountants/epsilon.ts';
import { PrivacyLedger } from '../privacy/accountants/ledger.ts';
import { keyArgument } from '../privacy/chacha20.ts';
import { type ClipFactors, type ClipFactorsOptions, clipFactorsSync } from '../privacy/clipFactors.ts';
import {
  type ClippedGradientsOptions,
  clippedGradients,
  clippedGradientsSync,
} from '../privacy/clippedGradients.ts';
import { addNoise, addNoiseSync, gaussianNoiseSync } from '../privacy/gaussianNoise.ts';
import type { PrivateLayer } from '../privacy/layer.ts';
import { perSampleSquaredNorms, perSampleSquaredNormsSync } from '../privacy/perSampleSquaredNorms.ts';
import { type Algorithm, checkAlgorithm } from './algorithm.ts';
import { ClippingNorm } from './clippingNorm.ts';
import { LossScale } from './lossScale.ts';
import { optimizerUpdate } from './ops/optimizerUpdate.ts';
import type { RunOptions } from './ops/perform.ts';
import {
  type Accumulated,
  checkLayers,
  checkSampler,
  groupsOf,
  type Layers,
  OPTIONS,
  type PrivateOptimizerOptions,
  type Sampling,
  type Slot,
  type StepReport,
  slotsOf,
} from './optimizerOptions.ts';
import { type OptimizerState, openState, readState, sealState, writeState } from './optimizerState.ts';

const SIGNAL: ReadonlySet<string> = new Set(['signal']);

/**
 * DP-SGD, DP-AdamW and DP-LAMB on what any backward pass computed: per-sample norms, clip factors, clipped sums into
 * accumulation buffers, and, once per logical step, noise, scaling by the expected batch, and the update.
 *
 * ```js
 * const optimizer = new PrivateOptimizer({ layers: model.layers, algorithm: { type: 'sgd', learningRate: 2 },
 *   maxNorm: 0.1, noiseMultiplier: 1.1, sampler, key });
 * for (const part of microBatches(sampler.batch(optimizer.steps))) {
 *   const pass = await model.forward(part.images);
 *   const { gradient } = await crossEntropy(pass.output, part.labels);
 *   await optimizer.accumulate(await pass.backward(gradient));
 * }
 * await optimizer.step();
 * ```
 *
 * The noise of an element is a function of (key, step, global index), so the same steps may be computed again after a
 * crash, but a key must never serve a changed run: {@link load} refuses one. Nothing here averages over the batch that
 * was drawn, and no step is left out: an empty batch is a step of noise alone, and counts.
 */
export class PrivateOptimizer {
  /** May be changed between steps; saved. */
  learningRate: number;
  /** What was spent; saved with the state. */
  #ledger = new PrivacyLedger();
  #steps = 0;
  #samples = 0;
  #nonFinite = 0;
  /** Accumulated, not yet stepped. */
  #open = false;
  #busy = false;
  /** A call has begun to change sums or parameters; failing now leaves them half done. */
  #changing = false;
  #broken = false;
  readonly #slots: readonly Slot[];
  readonly #names: readonly string[];
  readonly #frozen: ReadonlySet<string>;
  readonly #algorithm: Algorithm;
  readonly #clip: Omit<ClipFactorsOptions, 'maxNorm'> & { grouping: readonly number[] };
  readonly #norm: ClippingNorm;
  readonly #scale: LossScale;
  readonly #key: Uint8Array;
  readonly #noiseMultiplier: number;
  readonly #noiseMode: 'continuous' | 'discrete';
  readonly #sampling: Sampling;
  /** Index of the noise behind the last parameter's. */
  readonly #end: number;
  readonly #run: RunOptions;

  /** @throws HeddleError `ERR_ARGUMENT`, `ERR_OPTION`, `ERR_DTYPE`, `ERR_SHAPE` */
  constructor(options: PrivateOptimizerOptions) {
    if (options === undefined)
      throw new HeddleError('ERR_ARGUMENT', 'PrivateOptimizer: options are required');
    checkOptions(options, OPTIONS, 'PrivateOptimizer');
    this.#algorithm = checkAlgorithm(options.algorithm);
    this.learningRate = this.#algorithm.learningRate;
    this.#noiseMultiplier = optionNumber(options.noiseMultiplier ?? Number.NaN, 0, 0, 'noiseMultiplier');
    keyArgument(options.key);
    this.#key = options.key.slice();
    this.#sampling = checkSampler(options.sampler);
    this.#names = Object.keys(options.layers ?? {});
    if (this.#names.length === 0)
      throw new HeddleError('ERR_ARGUMENT', 'layers: expected at least one layer');
    this.#frozen = new Set(options.frozen ?? []);
    const { mode, stability, gamma } = options;
    this.#clip = { mode, stability, gamma, grouping: groupsOf(options.grouping, this.#names) };
    // Refuses a bad mode, stability or gamma now.
    clipFactorsSync(
      this.#names.map(() => new Float32Array(0)),
      { ...this.#clip, maxNorm: 1 },
    );
    this.#scale = new LossScale(options.lossScale, this.#noiseMultiplier);
    this.#run = { backend: options.backend, threads: options.threads };
    const offset = optionInteger(options.noiseOffset ?? 0, 0, Number.MAX_SAFE_INTEGER, 'noiseOffset');
    this.#slots = slotsOf(options.layers, this.#algorithm, offset);
    const elements = this.#slots.reduce((sum, s) => sum + s.parameter.length, 0);
    const { expectedBatch } = this.#sampling;
    this.#norm = new ClippingNorm(options, expectedBatch, this.#names.length, elements);
    this.#noiseMode = this.#norm.noise().mode;
    this.#end = this.#slots.reduce((end, s) => Math.max(end, s.offset + s.parameter.length), offset);
  }

  /** Steps taken: the number of the next one, which `sampler.batch(optimizer.steps)` draws for. */
  get steps(): number {
    return this.#steps;
  }

  /** What the caller multiplies losses (or the first gradient) by before the backward pass. */
  get lossScale(): number {
    return this.#scale.value;
  }

  /** R of the step to come; with an `AdaptiveClipping` it moves with every step. Its values may be published. */
  get maxNorm(): number {
    return this.#norm.value;
  }

  /** A copy of what was spent. */
  get ledger(): PrivacyLedger {
    return PrivacyLedger.fromJSON(this.#ledger.toJSON());
  }

  /** ε spent so far at `delta`; infinite once a step was taken without noise. */
  epsilon(options: AccountantOptions & { delta: number }): EpsilonResult {
    if (this.#noiseMultiplier === 0 && this.#steps > 0) return { epsilon: Infinity };
    return this.#ledger.epsilon(options);
  }

  #enter(name: string): void {
    if (this.#broken) {
      throw new HeddleError('ERR_DISPOSED', `${name}: an earlier call failed half-way; load a saved state`);
    }
    if (this.#busy)
      throw new HeddleError('ERR_ARGUMENT', `${name}: another call of this optimizer is running`);
    this.#busy = true;
  }

  *#guarded<T>(name: string, body: Steps<T>): Steps<T> {
    this.#enter(name);
    this.#changing = false;
    try {
      return yield* body;
    } catch (error) {
      this.#broken = this.#changing;
      throw error;
    } finally {
      this.#busy = false;
    }
  }

  /** The buffers that a layer's clipped sums are added to. */
  #out(layer: string) {
    const own = this.#slots.filter((s) => s.layer === layer).map((s) => [s.name, s.sum]);
    return Object.fromEntries(own) as NonNullable<ClippedGradientsOptions['out']>;
  }

  *#accumulate(layers: Layers, signal: AbortSignal | undefined): Steps<Accumulated> {
    checkLayers(layers, this.#names, this.#frozen);
    const names = this.#names;
    const run = { ...this.#run, signal };
    const norms: Float32Array[] = [];
    for (const name of names) {
      const squares = yield* step(
        () => perSampleSquaredNormsSync(layers[name], this.#run),
        () => perSampleSquaredNorms(layers[name], run),
      );
      norms.push(squares.data.map((n) => n / this.#scale.value ** 2));
      if (squares.size !== norms[0].length) {
        const expected = `${norms[0].length} as layers.${names[0]}`;
        throw new HeddleError(
          'ERR_SHAPE',
          `layers.${name}: expected ${expected} samples, got ${squares.size}`,
        );
      }
      // Factors of zero: what the kernels would refuse is refused here, before any sum changes.
      clippedGradientsSync(layers[name] as PrivateLayer, new Float32Array(squares.size), {
        ...this.#run,
        out: this.#out(name),
      });
    }
    const factors = clipFactorsSync(norms, { ...this.#clip, maxNorm: this.maxNorm }) as ClipFactors[];
    const unscaled = factors.map((f) => f.data.map((c) => c / this.#scale.value));
    this.#changing = true;
    for (const [i, name] of names.entries()) {
      const c = unscaled[this.#clip.grouping[i]];
      const out = this.#out(name);
      const layer = layers[name] as PrivateLayer;
      yield* step(
        () => clippedGradientsSync(layer, c, { ...this.#run, out }),
        () => clippedGradients(layer, c, { ...run, out }),
      );
    }
    const samples = norms[0].length;
    const { nonFinite } = factors[0];
    this.#norm.collect(norms);
    this.#open = true;
    this.#samples += samples;
    this.#nonFinite += nonFinite.length;
    return { samples, nonFinite };
  }

  *#step(): Steps<StepReport> {
    const number = this.#steps;
    const algorithm = this.#algorithm;
    optionNumber(this.learningRate, 0, 0, 'learningRate');
    this.#changing = true;
    // First the account, then what it is for.
    if (this.#noiseMultiplier > 0) {
      const noiseMultiplier = this.#scale.combined(this.#noiseMultiplier);
      const { sampleRate, overflowProbability } = this.#sampling;
      this.#ledger.record({ noiseMultiplier, sampleRate, overflowProbability, steps: 1 });
    }
    const noise = { ...this.#norm.noise(), key: this.#key, step: number };
    const correction = (beta: number) => 1 / (1 - beta ** (number + 1));
    for (const s of this.#slots) {
      const own = { ...this.#run, ...noise, offset: s.offset };
      if (noise.stddev > 0) {
        yield* step(
          () => addNoiseSync(s.sum, own),
          () => addNoise(s.sum, own),
        );
      }
      const update = {
        rule: algorithm.type,
        parameter: s.parameter,
        gradient: s.sum.data,
        first: s.first,
        second: s.second,
        scale: 1 / this.#sampling.expectedBatch,
        learningRate: this.learningRate,
        weightDecay: algorithm.weightDecay,
        momentum: algorithm.momentum,
        beta2: algorithm.beta2,
        epsilon: algorithm.epsilon,
        correction1: correction(algorithm.momentum),
        correction2: correction(algorithm.beta2),
        nesterov: algorithm.nesterov,
      };
      yield* optimizerUpdate(update, this.#run);
    }
    this.#moveScale();
    this.#norm.update(number);
    const report = {
      step: number,
      samples: this.#samples,
      nonFinite: this.#nonFinite,
      lossScale: this.#scale.value,
    };
    this.#steps++;
    this.#samples = 0;
    this.#nonFinite = 0;
    this.#open = false;
    return report;
  }

  /** Dynamic loss scaling: the number of overflows is released with noise, from the element behind the last parameter. */
  #moveScale(): void {
    const { countNoise } = this.#scale;
    if (countNoise === null) return;
    const noise = { key: this.#key, step: this.#steps, offset: this.#end, stddev: countNoise };
    this.#scale.update(
      this.#nonFinite + gaussianNoiseSync([1], { ...noise, backend: this.#run.backend }).data[0],
    );
  }

  /**
   * Adds one micro-batch: norms, clip factors, clipped sums. The layers are what `Pass.backward` gives, or any backward
   * pass: what each layer read, and the gradients of each sample's own loss, multiplied by {@link lossScale}.
   *
   * A sample with a norm that is NaN or infinite contributes nothing and is counted. An abort half-way leaves sums
   * undone: load a saved state after it.
   *
   * @throws HeddleError `ERR_ARGUMENT` for a layer that is missing, unknown or of a kind that cannot be clipped;
   *   otherwise as `perSampleSquaredNorms` and `clippedGradients`
   */
  async accumulate(layers: Layers, options?: { signal?: AbortSignal }): Promise<Accumulated> {
    checkOptions(options, SIGNAL, 'accumulate');
    return runAsync(this.#guarded('accumulate', this.#accumulate(layers, options?.signal)));
  }

  /** {@link accumulate} on the calling thread. */
  accumulateSync(layers: Layers): Accumulated {
    return runSync(this.#guarded('accumulate', this.#accumulate(layers, undefined)));
  }

  /**
   * Ends a logical step: records it in the ledger, adds noise to the sums, divides by the expected batch, updates the
   * parameters. Without anything accumulated (an empty batch) it is a step of noise alone.
   */
  async step(): Promise<StepReport> {
    return runAsync(this.#guarded('step', this.#step()));
  }

  /** {@link step} on the calling thread. */
  stepSync(): StepReport {
    return runSync(this.#guarded('step', this.#step()));
  }

  /** What must be the same in a run that goes on from a saved state, under the same key. */
  #identity(): Record<string, unknown> {
    const { learningRate: _, ...algorithm } = this.#algorithm;
    const { mode, stability, gamma, grouping } = this.#clip;
    return {
      parameters: this.#slots.map((s) => [s.layer, s.name, s.dims, s.offset]),
      algorithm,
      clipping: {
        maxNorm: this.#norm.identity(),
        mode: mode ?? 'abadi',
        stability: stability ?? null,
        gamma: gamma ?? null,
        grouping,
      },
      noiseMultiplier: this.#noiseMultiplier,
      noise: this.#noiseMode,
      sampler: this.#sampling.identity,
      lossScale: { countNoise: this.#scale.countNoise, growthInterval: this.#scale.growthInterval },
    };
  }

  /**
   * Everything that a later process needs to go on, bit for bit: parameters, moments, step, clipping norm, loss scale,
   * what determines the sampler's batches, and ledger. Copies.
   * @throws HeddleError `ERR_ARGUMENT` between accumulate and step
   */
  state(): OptimizerState {
    this.#enter('state');
    this.#busy = false;
    if (this.#open)
      throw new HeddleError('ERR_ARGUMENT', 'state: a batch is half accumulated; call step first');
    const progress = {
      steps: this.#steps,
      learningRate: this.learningRate,
      lossScale: this.#scale.value,
      quietSteps: this.#scale.quiet,
      clipping: this.#norm.toJSON(),
      ledger: this.#ledger.toJSON(),
    };
    return sealState(this.#identity(), this.#key, progress, this.#slots);
  }

  /**
   * Goes on from a saved state: overwrites the parameters, and what was accumulated is forgotten.
   * @throws HeddleError `ERR_CHECKPOINT` where it is damaged or belongs to another key, model or configuration; nothing
   *   has changed then
   */
  load(state: OptimizerState): void {
    if (this.#busy) throw new HeddleError('ERR_ARGUMENT', 'load: another call of this optimizer is running');
    const { progress, ledger, arrays } = openState(state, this.#identity(), this.#key, this.#slots);
    this.#norm.open(progress.clipping, progress.steps)();
    for (const [array, saved] of arrays) array.set(saved);
    for (const s of this.#slots) s.sum.data.fill(0);
    this.#ledger = ledger;
    this.#steps = progress.steps;
    this.learningRate = progress.learningRate;
    this.#scale.value = progress.lossScale;
    this.#scale.quiet = progress.quietSteps;
    this.#samples = 0;
    this.#nonFinite = 0;
    this.#open = false;
    this.#broken = false;
  }

  /** {@link state} as one safetensors file, replaced as a whole: ledger and parameters cannot part. */
  async save(path: string): Promise<void> {
    return runAsync(writeState(path, this.state()));
  }

  /** {@link save} on the calling thread. */
  saveSync(path: string): void {
    runSync(writeState(path, this.state()));
  }

  /** {@link load} of a file that {@link save} wrote. */
  async loadFile(path: string): Promise<void> {
    this.load(await runAsync(readState(path)));
  }

  /** {@link loadFile} on the calling thread. */
  loadFileSync(path: string): void {
    this.load(runSync(readState(path)));
  }
}
