/** Differentially private training: per-sample norms, clipping, clipped sums, and accountants. */
export * from './accountants/index.ts';
export { ClipFactors, type ClipFactorsOptions, clipFactors, clipFactorsSync } from './clipFactors.ts';
export {
  type ClippedGradientsOptions,
  clippedGradients,
  clippedGradientsSync,
  type LayerGradients,
} from './clippedGradients.ts';
export type { EmbeddingLayer, GroupNormLayer, LinearLayer, NormLayer, PrivateLayer } from './layer.ts';
export {
  perSampleSquaredNorms,
  perSampleSquaredNormsSync,
  type SquaredNormsOptions,
} from './perSampleSquaredNorms.ts';
