export { type Mxfp4Blocks, type UnpackMxfp4Options, unpackMxfp4 } from '../gemm/mxfp4.ts';
export { type CombineOptions, combine, combineSync } from './combine.ts';
export { MOE_MODEL_TYPES } from './config.ts';
export type { ExpertCacheStats } from './expertCache.ts';
export { type CapacityStyle, type ExpertCapacityOptions, expertCapacity } from './expertCapacity.ts';
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
export {
  type ExpertGradients,
  type ExpertsBackwardOptions,
  expertsBackward,
  expertsBackwardSync,
  type StackedGradient,
} from './expertsBackward.ts';
export type { ExpertScales } from './expertWeights.ts';
export { type ImportanceLossOptions, importanceLoss, importanceLossSync } from './importanceLoss.ts';
export { MoELayer, type MoELayerOptions } from './layer.ts';
export {
  type LoadBalancingLossOptions,
  type LoadLossOptions,
  loadBalancingLoss,
  loadBalancingLossSync,
  loadLoss,
  loadLossSync,
} from './loadBalancingLoss.ts';
export { type PermuteOptions, permute, permuteSync } from './permute.ts';
export {
  type DispatchPlan,
  type DropRule,
  type PlanDispatchOptions,
  planDispatch,
  planDispatchSync,
} from './planDispatch.ts';
export {
  type ExpertChoice,
  type ExpertChoiceOptions,
  routeExpertChoice,
  routeExpertChoiceSync,
} from './routeExpertChoice.ts';
export type { LossScoreOptions, RouterLoss, RouterLossOptions } from './routerLoss.ts';
export type { RouterOptions, RouterScore } from './routerOptions.ts';
export { routerZLoss, routerZLossSync } from './routerZLoss.ts';
export {
  routeSinkhorn,
  routeSinkhornSync,
  type SinkhornOptions,
  type SinkhornRouting,
} from './routeSinkhorn.ts';
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
export {
  type RouteTopKBackwardOptions,
  routeTopKBackward,
  routeTopKBackwardSync,
} from './routeTopKBackward.ts';
