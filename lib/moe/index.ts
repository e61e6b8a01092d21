export { type CombineOptions, combine, combineSync } from './combine.ts';
export { type CapacityStyle, type ExpertCapacityOptions, expertCapacity } from './expertCapacity.ts';
export { type PermuteOptions, permute, permuteSync } from './permute.ts';
export {
  type DispatchPlan,
  type DropRule,
  type PlanDispatchOptions,
  planDispatch,
  planDispatchSync,
} from './planDispatch.ts';
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
