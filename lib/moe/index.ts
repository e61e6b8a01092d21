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
