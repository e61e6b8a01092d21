import { HeddleError } from '../errors.ts';
import { type OpOptions, optionNumber } from '../op.ts';
import type { AdaptiveClipping } from '../privacy/adaptiveClipping.ts';
import type { ClipFactorsOptions } from '../privacy/clipFactors.ts';
import type { PrivateLayer } from '../privacy/layer.ts';
import type { LoraLayer } from '../privacy/loraLayer.ts';
import type { SamplingGuarantee, SavedSampler } from '../privacy/samplers.ts';
import { asTensor, makeTensor, type Tensor, type TensorLike } from '../tensor.ts';
import type { Algorithm, AlgorithmOptions } from './algorithm.ts';
import type { DynamicLossScale } from './lossScale.ts';

export interface PrivateOptimizerOptions {
  /** What is trained: parameters by layer and by name (`model.layers`), float32, updated in place. */
  layers: Readonly<Record<string, Readonly<Record<string, TensorLike>>>>;
  /** Layers that {@link PrivateOptimizer.accumulate} is given but that are not trained; the rest must be in `layers`. */
  frozen?: readonly string[];
  algorithm: AlgorithmOptions;
  /**
   * R: the bound of each sample's gradient over all layers. An `AdaptiveClipping` makes it follow a quantile of the norms
   * over all layers, whatever the grouping; it is copied and draws its noise with this optimizer's key, and
   * {@link PrivateOptimizer.maxNorm} tells where it is.
   */
  maxNorm: number | AdaptiveClipping;
  /**
   * σ: the noise's standard deviation is σ·R. 0 switches privacy off; ε is then infinite. With an adaptive R, σ is that of
   * sum and count together, so the sum's noise is a little larger: `AdaptiveClipping.gradientNoiseMultiplier`.
   */
  noiseMultiplier: number;
  /**
   * The batches: a `PoissonSampler` or `TruncatedPoissonSampler`, or what it would say. The public expected batch is what
   * a step divides by.
   */
  sampler: SamplingParameters;
  /**
   * `continuous` (default): Gaussian noise in float32. `discrete`: sums are rounded to a grid and get discrete Gaussian
   * noise drawn by integers alone, which leaves no pattern of floating point; every parameter must then be in this
   * optimizer. See `discreteNoisePlan`.
   */
  noise?: 'continuous' | 'discrete';
  /** 32 secret bytes, one key per run: `createNoiseKey()`. A resumed run needs the same. */
  key: Uint8Array;
  /** How norms become factors; see `clipFactors`. Default Abadi's. */
  mode?: ClipFactorsOptions['mode'];
  stability?: number;
  gamma?: number;
  /** Layers that are clipped together: all (`flat`, default), each alone (`layer`), or a group number per layer. */
  grouping?: 'flat' | 'layer' | Readonly<Record<string, number>>;
  /** What losses are multiplied by before the backward pass: a power of two (default 1), or dynamic. */
  lossScale?: number | DynamicLossScale;
  /** Global index of the first parameter's first element in the noise. Default 0. */
  noiseOffset?: number;
  backend?: OpOptions['backend'];
  threads?: number;
}

/** What is accounted for of the batches. */
export interface SamplingParameters {
  sampleRate: number;
  expectedBatch: number;
  /** `poisson` (default) or `poisson-truncated`. */
  guarantee?: SamplingGuarantee;
  /** τ of truncated batches: the probability that one is cut. */
  overflowProbability?: number;
  /** What a saved state keeps of a sampler. */
  toJSON?(): SavedSampler;
}

/** @internal */
export const OPTIONS: ReadonlySet<string> = new Set([
  'layers',
  'frozen',
  'algorithm',
  'maxNorm',
  'noiseMultiplier',
  'noise',
  'sampler',
  'key',
  'mode',
  'stability',
  'gamma',
  'grouping',
  'lossScale',
  'noiseOffset',
  'backend',
  'threads',
]);
/** What one micro-batch came to. Private: not for publication. */
export interface Accumulated {
  samples: number;
  /** Samples left out because a norm was NaN or infinite. */
  nonFinite: readonly number[];
}

/** What one step came to. The counts are private: not for publication. */
export interface StepReport {
  /** Number of the step just taken, from 0. */
  step: number;
  /** Samples that were accumulated (0: a step of noise alone), and those of them left out as not finite. */
  samples: number;
  nonFinite: number;
  /** The loss scale from now on. */
  lossScale: number;
}

/** What a backward pass recorded of each layer. */
export type Layers = Readonly<Record<string, PrivateLayer | LoraLayer>>;

/** @internal A trained parameter with its state. */
export interface Slot {
  layer: string;
  name: string;
  parameter: Float32Array;
  dims: readonly number[];
  /** Clipped sums are added to it. */
  sum: Tensor<'float32'>;
  first: Float32Array | null;
  second: Float32Array | null;
  /** Global index of the first element in the noise. */
  offset: number;
}

/** @internal State for every parameter; the noise's indices run through them in their order. */
export function slotsOf(
  layers: PrivateOptimizerOptions['layers'],
  algorithm: Algorithm,
  noiseOffset: number,
): Slot[] {
  const slots: Slot[] = [];
  const moments = algorithm.type !== 'sgd';
  let offset = noiseOffset;
  for (const [layer, parameters] of Object.entries(layers)) {
    for (const [name, value] of Object.entries(parameters)) {
      const { data, dims, size } = asTensor(value, `layers.${layer}.${name}`, ['float32']);
      const twin = slots.find((s) => overlap(s.parameter, data));
      if (twin !== undefined) {
        throw new HeddleError(
          'ERR_ARGUMENT',
          `layers.${layer}.${name} shares memory with layers.${twin.layer}.${twin.name}: register shared parameters once, in a layer kind that knows them`,
        );
      }
      const zeros = () => new Float32Array(size);
      const first = moments || algorithm.momentum > 0 ? zeros() : null;
      const second = moments ? zeros() : null;
      const sum = makeTensor('float32', zeros(), dims);
      slots.push({ layer, name, parameter: data, dims, sum, first, second, offset });
      offset += size;
    }
  }
  return slots;
}

function overlap(a: Float32Array, b: Float32Array): boolean {
  const end = (x: Float32Array) => x.byteOffset + x.byteLength;
  return a.buffer === b.buffer && a.byteOffset < end(b) && b.byteOffset < end(a);
}

/** @internal The batches as the optimizer keeps them. */
export interface Sampling {
  sampleRate: number;
  expectedBatch: number;
  overflowProbability: number;
  /** What determines them, for a saved state. */
  identity: unknown;
}

/** @internal */
export function checkSampler(sampler: PrivateOptimizerOptions['sampler']): Sampling {
  if (sampler === null || typeof sampler !== 'object') {
    throw new HeddleError(
      'ERR_ARGUMENT',
      'sampler: expected a PoissonSampler or TruncatedPoissonSampler, or { sampleRate, expectedBatch }',
    );
  }
  const { sampleRate, expectedBatch, guarantee = 'poisson' } = sampler;
  const truncated = guarantee === 'poisson-truncated';
  if (guarantee !== 'poisson' && !truncated) {
    throw new HeddleError(
      'ERR_OPTION',
      `sampler: its batches are '${guarantee}', and the ledger accounts for Poisson sampling; state sampleRate and expectedBatch that hold for it instead (for a shuffle: sampleRate 1 per epoch)`,
    );
  }
  if (typeof sampleRate !== 'number' || !(sampleRate > 0 && sampleRate <= 1)) {
    throw new HeddleError(
      'ERR_OPTION',
      `sampler.sampleRate must be above 0 and at most 1, got ${String(sampleRate)}`,
    );
  }
  const expected = optionNumber(expectedBatch ?? Number.NaN, 0, 0, 'sampler.expectedBatch');
  if (expected === 0) throw new HeddleError('ERR_OPTION', 'sampler.expectedBatch must be above 0');
  const overflowProbability = truncated ? sampler.overflowProbability : 0;
  if (typeof overflowProbability !== 'number' || !(overflowProbability >= 0 && overflowProbability < 1)) {
    throw new HeddleError(
      'ERR_OPTION',
      `sampler.overflowProbability of truncated batches must be at least 0 and below 1, got ${String(overflowProbability)}: raise maxBatch well above the expected ${expected}`,
    );
  }
  const saved = sampler.toJSON?.() ?? { guarantee, sampleRate };
  const identity = { ...saved, expectedBatch: expected, overflowProbability };
  return { sampleRate, expectedBatch: expected, overflowProbability, identity };
}

/** @internal The group number of each layer. */
export function groupsOf(grouping: PrivateOptimizerOptions['grouping'], names: readonly string[]): number[] {
  if (grouping === undefined || grouping === 'flat') return names.map(() => 0);
  if (grouping === 'layer') return names.map((_, i) => i);
  if (grouping === null || typeof grouping !== 'object') {
    throw new HeddleError(
      'ERR_OPTION',
      `grouping must be flat, layer or a group number per layer, got ${String(grouping)}`,
    );
  }
  const unknown = Object.keys(grouping).find((name) => !names.includes(name));
  if (unknown !== undefined) throw new HeddleError('ERR_OPTION', `grouping.${unknown}: no such layer`);
  return names.map((name) => grouping[name]);
}

/** @internal Every trained layer must be there, and nothing that is not known. */
export function checkLayers(layers: Layers, names: readonly string[], frozen: ReadonlySet<string>): void {
  if (layers === null || typeof layers !== 'object') {
    throw new HeddleError('ERR_ARGUMENT', 'layers: expected an object of layers by name');
  }
  const missing = names.find((name) => !Object.hasOwn(layers, name));
  if (missing !== undefined) {
    throw new HeddleError(
      'ERR_ARGUMENT',
      `layers.${missing} is missing: every trained layer takes part in every batch`,
    );
  }
  const unknown = Object.keys(layers).find((name) => !names.includes(name) && !frozen.has(name));
  if (unknown !== undefined) {
    throw new HeddleError(
      'ERR_ARGUMENT',
      `layers.${unknown} is not a layer of this optimizer; list it in frozen to leave it untrained`,
    );
  }
}
