/** Differentially private training: per-sample norms, clipping, clipped sums, noise, sampling, and accountants. */
export * from '../training/index.ts';
export * from './accountants/index.ts';
export { createNoiseKey } from './chacha20.ts';
export { ClipFactors, type ClipFactorsOptions, clipFactors, clipFactorsSync } from './clipFactors.ts';
export {
  type ClippedGradientsOptions,
  clippedGradients,
  clippedGradientsSync,
  type LayerGradients,
} from './clippedGradients.ts';
export type { ConvLayer } from './convLayer.ts';
export {
  addNoise,
  addNoiseSync,
  type GaussianNoiseOptions,
  gaussianNoise,
  gaussianNoiseSync,
  type NoiseOptions,
} from './gaussianNoise.ts';
export type { EmbeddingLayer, GroupNormLayer, LinearLayer, NormLayer, PrivateLayer } from './layer.ts';
export {
  perSampleSquaredNorms,
  perSampleSquaredNormsSync,
  type SquaredNormsOptions,
} from './perSampleSquaredNorms.ts';
export {
  PoissonSampler,
  type SamplerOptions,
  type SamplingGuarantee,
  ShuffledSampler,
  TruncatedPoissonSampler,
} from './samplers.ts';
