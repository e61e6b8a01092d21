/** Differentially private training: per-sample norms, clipping, clipped sums, noise, sampling, and accountants. */
export * from '../training/index.ts';
export * from './accountants/index.ts';
export {
  AdaptiveClipping,
  type AdaptiveClippingOptions,
  type SavedAdaptiveClipping,
} from './adaptiveClipping.ts';
export { createNoiseKey } from './chacha20.ts';
export { ClipFactors, type ClipFactorsOptions, clipFactors, clipFactorsSync } from './clipFactors.ts';
export {
  type ClippedGradientsOptions,
  clippedGradients,
  clippedGradientsSync,
  type LayerGradients,
  type LoraClippedGradientsOptions,
  type LoraGradients,
} from './clippedGradients.ts';
export type { ConvLayer } from './convLayer.ts';
export {
  type DiscreteNoiseOptions,
  type DiscreteNoisePlan,
  discreteNoisePlan,
  noiseGranularity,
} from './discreteNoise.ts';
export type { ExpertsLayer } from './expertsLayer.ts';
export {
  addNoise,
  addNoiseSync,
  type GaussianNoiseOptions,
  gaussianNoise,
  gaussianNoiseSync,
  type NoiseOptions,
} from './gaussianNoise.ts';
export type { EmbeddingLayer, GroupNormLayer, LinearLayer, NormLayer, PrivateLayer } from './layer.ts';
export type { LoraLayer } from './loraLayer.ts';
export {
  perSampleSquaredNorms,
  perSampleSquaredNormsSync,
  type SquaredNormsOptions,
} from './perSampleSquaredNorms.ts';
export {
  PoissonSampler,
  type SamplerOptions,
  type SamplingGuarantee,
  type SavedSampler,
  ShuffledSampler,
  TruncatedPoissonSampler,
} from './samplers.ts';
export type { TiedEmbeddingLayer } from './tiedLayer.ts';
