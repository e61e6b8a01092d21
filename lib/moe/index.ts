export { MOE_MODEL_TYPES } from './config.ts';
export {
  type Activation,
  type ExpertBiases,
  type ExpertSources,
  type ExpertsForwardOptions,
  ExpertWeights,
  expertsForward,
  expertsForwardSync,
  type PackExpertsOptions,
  packExperts,
  packExpertsSync,
  type Stacked,
} from './experts.ts';
export type { ExpertScales } from './expertWeights.ts';
export { MoELayer, type MoELayerOptions } from './layer.ts';
export type { RouterOptions, RouterScore } from './routerOptions.ts';
export {
  type ExpertGroups,
  MAX_EXPERTS,
  type ReplayOptions,
  type RouteTopKOptions,
  type Routing,
  routeTopK,
  routeTopKSync,
  routeWith,
  routeWithSync,
} from './routeTopK.ts';
